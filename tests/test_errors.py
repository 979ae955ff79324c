"""What a failed file operation becomes: a code, an exit code and a hint, by errno and by what was
being done.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from qtool.errors import QtoolError, file_errors, from_os_error, library_os_error, naming

SOURCE, OUTPUT = "/models/llama/model.safetensors", "/disk/.out.qtool/checkpoint/config.json"
MEANINGS = {  # errno -> code and exit code when reading the source, then when writing
    "ENOSPC": (("E_DISK", 4), ("E_DISK", 4)),
    "EDQUOT": (("E_DISK", 4), ("E_DISK", 4)),
    "EFBIG": (("E_FILE_SIZE", 4), ("E_FILE_SIZE", 4)),
    "EMFILE": (("E_OPEN_FILES", 4), ("E_OPEN_FILES", 4)),
    "ENOMEM": (("E_OUT_OF_MEMORY", 4), ("E_OUT_OF_MEMORY", 4)),
    "EACCES": (("E_UNREADABLE", 3), ("E_UNWRITABLE", 4)),
    "EIO": (("E_UNREADABLE", 3), ("E_UNWRITABLE", 4)),
    "ENOENT": (("E_UNREADABLE", 3), ("E_UNWRITABLE", 4)),
    "EISDIR": (("E_UNREADABLE", 3), ("E_UNWRITABLE", 4)),
    "ENAMETOOLONG": (("E_UNREADABLE", 3), ("E_UNWRITABLE", 4)),
    "EROFS": (("E_UNREADABLE", 3), ("E_UNWRITABLE", 4)),
    "EBUSY": (("E_UNREADABLE", 3), ("E_OUTPUT_IN_USE", 6)),
    "EEXIST": (("E_UNREADABLE", 3), ("E_OUTPUT_IN_USE", 6)),
    "ENOTEMPTY": (("E_UNREADABLE", 3), ("E_OUTPUT_IN_USE", 6)),
    "EXDEV": (("E_UNREADABLE", 3), ("E_OUTPUT_IN_USE", 6)),
}


def os_error(name: str, file: str | None = None) -> OSError:
    code = getattr(errno, name)
    return OSError(code, os.strerror(code), file)


@pytest.mark.parametrize("name", MEANINGS)
def test_a_failed_file_operation_has_a_code_by_errno_and_by_what_was_done(name):
    for file, expected in zip((SOURCE, OUTPUT), MEANINGS[name], strict=True):
        found = from_os_error(os_error(name, file), reading=[Path("/models/llama")])
        assert (found.code, found.exit_code) == expected
        assert file in found.message
        assert found.hint


def test_no_place_for_temporary_files_is_a_resource_that_is_missing():
    error = FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']")
    assert from_os_error(error, reading=[Path("/")]).exit_code == 4


def test_a_source_behind_a_link_is_still_read(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path)
    for name in (tmp_path / "link" / "x", tmp_path / "x"):
        found = from_os_error(os_error("EACCES", str(name)), reading=[tmp_path / "link"])
        assert found.exit_code == 3


def test_errors_without_a_file_name_get_one_and_those_with_one_keep_it():
    with (
        pytest.raises(QtoolError, match="/models/llama/a cannot be read") as caught,
        file_errors(reading=[Path("/models/llama")]),
        naming(Path("/models/llama/a")),
    ):
        raise OSError(errno.EIO, "Input/output error")
    assert caught.value.exit_code == 3
    with pytest.raises(OSError) as kept, naming(Path("/models/llama/a")):
        raise os_error("EIO", OUTPUT)
    assert kept.value.filename == OUTPUT


def caused_by(cause: BaseException) -> RuntimeError:
    try:
        raise RuntimeError("the library failed") from cause
    except RuntimeError as error:
        return error


FROM_LIBRARIES = {
    "its own": (os_error("ENOSPC", OUTPUT), "ENOSPC"),
    "a cause": (caused_by(os_error("ENOSPC")), "ENOSPC"),
    "Rust": (RuntimeError("I/O error: File too large (os error 27)"), "EFBIG"),
    "C++": (RuntimeError("write failed: No space left on device"), "ENOSPC"),
    "the model": (os_error("EACCES", "/models/llama/config.json"), "EACCES"),
    "a read": (os_error("EBUSY"), "EBUSY"),
    "torch": (RuntimeError("unable to open </disk/a.bin> in mode w: File exists (17)"), "EEXIST"),
    "safetensors": (FileNotFoundError("No such file: /models/llama/a.safetensors"), "ENOENT"),
    "a neighbour": (FileNotFoundError("No such file: /models/llama-2/a.safetensors"), None),
    "a place inside": (RuntimeError("cannot read /mnt/disk/a: Permission denied"), None),
    "Rust, elsewhere": (RuntimeError("No such file or directory (os error 2)"), None),
    "Rust, no name": (Exception("Device or resource busy (os error 16)"), "EBUSY"),
    "Rust, here": (RuntimeError("cannot open /disk/a: Not there (os error 2)"), "ENOENT"),
    "the folder": (RuntimeError("cannot list '/disk': Permission denied"), "EACCES"),
    "words alone": (RuntimeError("the plugin says: Permission denied"), None),
    "another file": (os_error("ENOENT", "/usr/bin/nvcc"), None),
    "a missing file before": (caused_by(os_error("ENOENT", OUTPUT)), None),
    "no file": (ValueError("shapes differ"), None),
    "transformers": (OSError("Can't load the tokenizer"), None),
}


@pytest.mark.parametrize("case", FROM_LIBRARIES)
def test_the_file_operation_behind_the_error_of_a_library_is_found(case):
    error, name = FROM_LIBRARIES[case]
    found = library_os_error(error, [Path("/models/llama"), Path("/disk")])
    assert found is None if name is None else found.errno == getattr(errno, name)
