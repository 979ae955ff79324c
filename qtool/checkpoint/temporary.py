"""Temporary folders of small files, which are removed when this process ends."""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

PREFIX = ".qtool-gguf-"
NAME = re.compile(re.escape(PREFIX) + "[a-z0-9_]{8}")  # as `tempfile` makes it
MODE = 0o700
YOUNG_S = 60.0  # a younger folder may have no lock yet
_OURS: list[tuple[Path, int]] = []
"""Folders and the id of the process that made each: a fork has those of its parent."""


def write_temporary_folder(texts: Mapping[str, str]) -> Path:
    """Return a new folder that holds ``texts``, removed when this process ends. If the process is
    killed, the next call in another process removes it: the lock of a folder ends with its process.

    Args:
        texts: file name, or folder and file name, to content.
    Raises: OSError.
    """
    _remove_abandoned(Path(tempfile.gettempdir()))
    folder = Path(tempfile.mkdtemp(prefix=PREFIX))
    _OURS.append((folder, os.getpid()))
    fcntl.flock(_open_folder(folder), fcntl.LOCK_EX)  # until the process ends
    for name, text in texts.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def _open_folder(folder: Path) -> int:
    return os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)


@atexit.register
def remove_temporary_folders() -> None:
    """Remove the folders of this process; call it before exits that skip `atexit`."""
    for folder, owner in _OURS:
        if os.getpid() == owner:
            shutil.rmtree(folder, ignore_errors=True)


def _remove_abandoned(parent: Path) -> None:
    """Remove the folders in ``parent`` whose process has ended."""
    for folder in filter(lambda path: NAME.fullmatch(path.name), parent.iterdir()):
        with contextlib.suppress(OSError):
            fd = _open_folder(folder)
            try:
                if _may_be_abandoned(os.fstat(fd)):
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(folder)
            finally:
                os.close(fd)


def _may_be_abandoned(found: os.stat_result) -> bool:
    is_ours = found.st_uid == os.geteuid() and stat.S_IMODE(found.st_mode) == MODE
    return is_ours and time.time() - found.st_mtime > YOUNG_S
