"""What stands where a run writes, and what a run carries along: nothing of others is taken by its
name alone, and what would end a run is found before it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from qtool.checkpoint import check_output, open_checkpoint, source_files, stage_output
from qtool.checkpoint.aux_files import NAMED_TEMPLATES, aux_files
from qtool.checkpoint.manifest import check_manifest
from qtool.checkpoint.staging_folder import MARK, is_mount_point
from qtool.checkpoint.writer import LOG_MARK
from qtool.errors import CheckpointRefused, OutputTaken, QtoolError, ResourceError, file_errors


def tree(folder: Path) -> dict[str, str]:
    """Return what is below ``folder``: the content of files, the target of links."""
    return {
        str(path.relative_to(folder)): str(path.readlink())
        if path.is_symlink()
        else (path.read_text() if path.is_file() else "")
        for path in sorted(folder.rglob("*"))
    }


def fill(folder: Path, content: dict[str, str | None]) -> None:
    """Make ``content`` in ``folder``: text for files, None for folders, ``-> target`` for links."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in content.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if text is None:
            path.mkdir()
        elif text.startswith("-> "):
            path.symlink_to(text[3:])
        else:
            path.write_text(text)


LOCK = MARK.decode()
FOREIGN_STAGING = {
    "files": {"thesis": "x", "photos/p": "x"},
    "names of ours": {"checkpoint/photo": "x", "scratch/y": "x"},
    "a previous": {"previous/photo": "x"},
    "an empty lock beside files": {"lock": "", "photos/p": "x"},
    "an empty lock and a previous": {"lock": "", "previous/photo": "x"},
    "another lock": {"lock": "mine"},
    "a lock that goes on": {"lock": f"{LOCK}more"},
    "a lock that is a folder": {"lock/x": "x"},
    "a lock that is a link": {"lock": "-> ../mine"},
    "a lock that is a dangling link": {"lock": "-> ../none"},
    "our mark beside files": {"lock": LOCK, "thesis": "x"},
    "our mark and a link": {"lock": LOCK, "checkpoint": "-> ../home"},
    "our mark and a file as folder": {"lock": LOCK, "scratch": "x"},
    "our mark and a folder as log": {"lock": LOCK, "log/x": "x"},
}


@pytest.mark.parametrize("case", FOREIGN_STAGING)
def test_a_folder_that_no_run_left_is_refused_and_kept(case, tmp_path):
    fill(tmp_path, {"mine": "x", "home/keep": "x", "source": None})
    fill(tmp_path / ".out.qtool", FOREIGN_STAGING[case])
    before = tree(tmp_path)
    for overwrite in (False, True):
        with pytest.raises(OutputTaken) as checked:
            check_output(tmp_path / "out", inputs=[], overwrite=overwrite)
        with (
            pytest.raises(OutputTaken) as staged,
            stage_output(tmp_path / "out", inputs=[], overwrite=overwrite, need_bytes=0),
        ):
            pass
        assert checked.value.code == staged.value.code == "E_STAGING_PLACE"
        assert staged.value.exit_code == 6
    assert tree(tmp_path) == before


@pytest.mark.parametrize("kind", ["link", "dangling link", "file", "fifo"])
def test_a_staging_name_that_is_no_folder_is_refused_and_kept(kind, tmp_path):
    place = tmp_path / ".out.qtool"
    fill(tmp_path, {"home/keep": "x"})
    if kind == "file":
        place.write_text("mine")
    elif kind == "fifo":
        os.mkfifo(place)
    else:
        place.symlink_to("home" if kind == "link" else "none")
    with (
        pytest.raises(OutputTaken),
        stage_output(tmp_path / "out", inputs=[], overwrite=False, need_bytes=0),
    ):
        pass
    assert os.path.lexists(place)
    assert (tmp_path / "home" / "keep").read_text() == "x"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_a_staging_folder_of_another_user_is_refused(tmp_path):
    fill(tmp_path / ".out.qtool", {"lock": LOCK})
    os.chown(tmp_path / ".out.qtool", 65534, 65534)
    with pytest.raises(OutputTaken, match="another user"):
        check_output(tmp_path / "out", inputs=[], overwrite=False)


@pytest.mark.parametrize("left", [{}, {"lock": ""}, {"lock": LOCK, "log": "x", "scratch/y": "x"}])
def test_what_a_killed_run_left_at_any_moment_is_taken_over(left, tmp_path):
    fill(tmp_path / ".out.qtool", left)
    with stage_output(tmp_path / "out", inputs=[], overwrite=False, need_bytes=0) as staging:
        (staging.checkpoint / "x").write_text("new")
        staging.publish()
    assert tree(tmp_path) == {"out": "", "out/x": "new"}


def test_a_half_removed_former_output_does_not_come_back(tmp_path):
    fill(tmp_path, {"out/new": "x"})
    fill(tmp_path / ".out.qtool", {"lock": LOCK, "previous/old": "x"})
    with (
        pytest.raises(OutputTaken),
        stage_output(tmp_path / "out", inputs=[], overwrite=False, need_bytes=0),
    ):
        pass
    assert tree(tmp_path) == {"out": "", "out/new": "x"}


FOREIGN_OUTPUTS = {
    "weights by name": {"model.safetensors": "x"},
    "an index by name": {"model.safetensors.index.json": "{}", "photos/p": "x"},
    "a manifest that is none": {"qtool-manifest.json": "{}", "photo": "x"},
    "a broken manifest": {"qtool-manifest.json": "x"},
    "a manifest with paths": {"qtool-manifest.json": '{"files": {"../x": {}}}'},
    "a file beside ours": {"qtool-manifest.json": '{"files": {"a": {}}}', "a": "x", "b": "x"},
    "a folder beside ours": {"qtool-manifest.json": '{"files": {"a": {}}}', "b/c": "x"},
    "a folder named as ours": {"qtool-manifest.json": '{"files": {"a": {}}}', "a/c": "x"},
    "an edited card": {
        "qtool-manifest.json": '{"files": {"README.md": {"size_bytes": 5}}}',
        "README.md": "mine",
    },
    "a link named as ours": {"qtool-manifest.json": '{"files": {"a": {}}}', "a": "-> /tmp"},
    "a state by name": {"qtool-state.json": "{}"},
    "a file beside a state": {"qtool-state.json": '{"state_version": 1}', "photo": "x"},
}


@pytest.mark.parametrize("case", FOREIGN_OUTPUTS)
def test_overwrite_replaces_only_what_qtool_wrote(case, tmp_path):
    fill(tmp_path / "out", FOREIGN_OUTPUTS[case])
    before = tree(tmp_path)
    with pytest.raises(OutputTaken, match="qtool did not write") as caught:
        check_output(tmp_path / "out", inputs=[], overwrite=True)
    assert caught.value.code == "E_OUTPUT_EXISTS"
    assert tree(tmp_path) == before


def test_a_mount_point_is_no_output_to_replace(monkeypatch, tmp_path):
    assert is_mount_point(Path("/proc"))
    assert not is_mount_point(tmp_path)
    fill(tmp_path / "out", {"qtool-state.json": '{"state_version": 1}'})
    monkeypatch.setattr("qtool.checkpoint.writer.is_mount_point", lambda path: True)
    with pytest.raises(OutputTaken, match="mount point"):
        check_output(tmp_path / "out", inputs=[], overwrite=True)


@pytest.mark.parametrize("kind", ["folder", "file", "link", "dangling link", "fifo"])
def test_a_log_replaces_only_a_log(kind, tmp_path):
    log = tmp_path / "out.qtool.log"
    fill(tmp_path, {"of a run": LOG_MARK.decode()})
    if kind == "folder":
        log.mkdir()
    elif kind == "fifo":
        os.mkfifo(log)
    elif kind == "file":
        log.write_text("of mine")
    else:
        log.symlink_to("of a run" if kind == "link" else "none")
    with pytest.raises(OutputTaken) as caught:
        check_output(tmp_path / "out", inputs=[], overwrite=True, log=log)
    assert (caught.value.code, caught.value.exit_code) == ("E_LOG_PLACE", 6)


@pytest.mark.parametrize("content", [b"", LOG_MARK, LOG_MARK + b"of a run"])
def test_the_log_of_a_former_run_is_replaced(content, tmp_path):
    (tmp_path / "out.qtool.log").write_bytes(content)
    check_output(tmp_path / "out", inputs=[], overwrite=True, log=tmp_path / "out.qtool.log")


@pytest.mark.parametrize("length", [246, 248, 249, 255])
def test_names_that_are_too_long_for_log_or_staging_are_found(length, tmp_path):
    output = tmp_path / ("x" * length)
    with pytest.raises(ResourceError, match="too long") as caught:
        check_output(
            output, inputs=[], overwrite=False, log=output.with_name(f"{output.name}.qtool.log")
        )
    assert (caught.value.code, caught.value.exit_code) == ("E_OUTPUT_PLACE", 4)


def test_paths_that_are_too_deep_for_a_carried_file_are_found(tmp_path):
    deep = Path(tmp_path, *["x" * 250] * ((4090 - len(str(tmp_path))) // 251))
    with pytest.raises(ResourceError, match="too long"):
        check_output(deep / "out", inputs=[], overwrite=False, names=["t" * 200])


# What is carried along


def make_fifo(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as opened:
        here = Path.cwd()
        os.chdir(path.parent)  # a socket's path is short
        opened.bind(path.name)
        os.chdir(here)


def make_folder(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir()


def make_broken_link(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to("none")


def make_secret_link(path: Path) -> None:
    path.unlink(missing_ok=True)
    (path.parent.parent / "secret").write_text("x")
    path.symlink_to("../secret")


def make_circle(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(path.name)


ODD = {
    make_fifo: "E_NOT_A_FILE",
    make_socket: "E_NOT_A_FILE",
    make_folder: "E_NOT_A_FILE",
    make_broken_link: "E_BROKEN_LINK",
    make_circle: "E_BROKEN_LINK",
    make_secret_link: "E_LINK_OUTSIDE",
}


@pytest.mark.parametrize("name", ["LICENSE", "tokenizer.json", "vocab.txt", "chat_template.jinja"])
@pytest.mark.parametrize("make", ODD)
def test_an_auxiliary_file_that_cannot_be_carried_is_refused(make, name, tiny_copy):
    make(tiny_copy / name)
    with pytest.raises(CheckpointRefused) as caught:
        source_files(open_checkpoint(tiny_copy))
    assert caught.value.code == ODD[make]
    assert name in caught.value.message


def test_a_fifo_that_a_library_would_open_is_refused(tiny_copy):
    make_fifo(tiny_copy / "adapter_config.json")
    with pytest.raises(CheckpointRefused):
        source_files(open_checkpoint(tiny_copy))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize("name", ["LICENSE", "tokenizer.json"])
def test_an_auxiliary_file_without_permission_is_refused(name, tiny_copy):
    (tiny_copy / name).write_text("x")
    (tiny_copy / name).chmod(0)
    for folder in (tiny_copy, *tiny_copy.parents[:3]):
        folder.chmod(0o755)
    os.seteuid(65534)
    try:
        with (
            pytest.raises(QtoolError) as caught,
            file_errors(reading=[tiny_copy]),
        ):
            aux_files(tiny_copy)
    finally:
        os.seteuid(0)
    assert (caught.value.code, caught.value.exit_code) == ("E_UNREADABLE", 3)


@pytest.mark.parametrize("name", [b"tokenizer\xff.json", b"LICENSE\n", b"vocab\x1b[2J"])
def test_an_auxiliary_file_whose_name_no_manifest_can_hold_is_refused(name, tiny_copy):
    (tiny_copy / os.fsdecode(name)).write_text("x")
    with pytest.raises(CheckpointRefused) as caught:
        source_files(open_checkpoint(tiny_copy))
    assert caught.value.code == "E_FILE_NAME"


def test_a_link_to_an_auxiliary_file_elsewhere_is_followed_and_said(tiny_copy, tmp_path):
    (tmp_path / "shared").mkdir()
    (tiny_copy / "tokenizer.json").rename(tmp_path / "shared" / "tokenizer.json")
    (tiny_copy / "tokenizer.json").symlink_to("../shared/tokenizer.json")
    found = source_files(open_checkpoint(tiny_copy))
    assert tiny_copy / "tokenizer.json" in found.aux
    assert [str(tmp_path / "shared" / "tokenizer.json") in note for note in found.notes] == [True]


# What a source was, and what a manifest says


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-2000 % len(data)] ^= 1
    file.write_bytes(data)


def flip_and_set_back(file: Path) -> None:
    before = file.stat()
    flip(file)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def replace(file: Path) -> None:
    before = file.stat()
    other = file.with_name("other")
    other.write_bytes(file.read_bytes())
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(file)


CHANGES = (flip, flip_and_set_back, replace, Path.unlink)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_source_that_changes_during_the_run_is_refused(change, name, tiny_copy):
    checkpoint = open_checkpoint(tiny_copy)
    found = source_files(checkpoint)
    digests = check_digests(tiny_copy)
    found.check_unchanged(digests)
    change(tiny_copy / name)
    with pytest.raises(CheckpointRefused) as caught:
        found.check_unchanged(digests)
    assert (caught.value.code, caught.value.exit_code) == ("E_SOURCE_CHANGED", 3)


def check_digests(folder: Path) -> dict[str, dict[str, object]]:
    from qtool.checkpoint import digest_files

    return digest_files([folder / "model.safetensors"])


def test_a_source_whose_permissions_change_is_the_same(tiny_copy):
    found = source_files(open_checkpoint(tiny_copy))
    digests = check_digests(tiny_copy)
    for file in tiny_copy.iterdir():
        file.chmod(0o600)
    found.check_unchanged(digests)


@pytest.fixture
def verified(tiny_copy):
    """A checkpoint whose manifest is true."""
    from qtool.checkpoint import digest_files

    files = digest_files(list(tiny_copy.iterdir()))
    (tiny_copy / "qtool-manifest.json").write_text(json.dumps({"files": files}))
    return tiny_copy


DIFFERENCES = {  # what is done to the folder -> the field that names it
    "a bit": (lambda folder: flip(folder / "model.safetensors"), "changed", "model.safetensors"),
    "a bit, time set back": (
        lambda folder: flip_and_set_back(folder / "model.safetensors"),
        "changed",
        "model.safetensors",
    ),
    "a config": (
        lambda folder: (folder / "generation_config.json").write_text("{}"),
        "changed",
        "generation_config.json",
    ),
    "missing": (lambda folder: (folder / "tokenizer.json").unlink(), "missing", "tokenizer.json"),
    "added": (lambda folder: (folder / "evil.jinja").write_text("x"), "added", "evil.jinja"),
    "added folder named so": (lambda folder: (folder / "x.md").mkdir(), "added", "x.md"),
    "added folder": (lambda folder: (folder / "more").mkdir(), "added", "more"),
    "added fifo": (lambda folder: os.mkfifo(folder / "pipe"), "added", "pipe"),
    "a fifo instead": (
        lambda folder: make_fifo(folder / "tokenizer_config.json"),
        "changed",
        "tokenizer_config.json",
    ),
}


@pytest.mark.parametrize("case", DIFFERENCES)
def test_what_differs_from_the_manifest_is_named(case, verified):
    (verified / ".cache").mkdir()  # of `hf download`
    (verified / "README.md").write_text("# the card, edited\n![](speed.png)")
    (verified / "speed.png").write_bytes(b"")
    assert check_manifest(verified).matches
    change, field, name = DIFFERENCES[case]
    change(verified)
    found = check_manifest(verified)
    assert getattr(found, field) == (name,)
    assert not found.matches
    assert name in " ".join(found.differences())
    many = dataclasses.replace(found, missing=tuple(map(str, range(200_000)))).differences()
    assert (len(many), many[-1]) == (101, f"{199_900 + (field != 'missing'):,} more files differ")


@pytest.mark.parametrize(
    "manifest",
    [
        "[]",
        "{}",
        '{"files": []}',
        '{"files": {"a": 1}}',
        '{"files": {"../x": {}}}',
        '{"files": {"..": {}}}',
        "x",
    ],
)
def test_a_manifest_that_is_none_verifies_nothing(manifest, tiny_copy):
    (tiny_copy / "qtool-manifest.json").write_text(manifest)
    with pytest.raises(CheckpointRefused):
        check_manifest(tiny_copy)


def inspected(folder: Path, *options: str) -> tuple[int, dict, str]:
    command = [sys.executable, "-m", "qtool.cli", "inspect", *options, "--json"]
    done = subprocess.run([*command, "--model-path", str(folder)], capture_output=True, text=True)
    return done.returncode, json.loads(done.stdout), done.stderr


@pytest.mark.slow
def test_inspect_verify_ends_with_3_when_a_file_differs(verified, tiny_model):
    code, found, _ = inspected(verified, "--verify")
    assert (code, found["manifest"]["matches"]) == (0, True)
    flip(verified / "model.safetensors")
    (verified / "added").write_text("x")
    for option in ("--verify", "--deep"):
        code, found, stderr = inspected(verified, option)
        assert (code, found["manifest"]["changed"]) == (3, ["model.safetensors"])
        assert found["manifest"]["added"] == ["added"]
        assert len(found["damage"]) == 2
        assert "error[E_MANIFEST_DIFFERS]" in stderr
        assert (
            "model.safetensors is not the file that the manifest describes (and 1 more)" in stderr
        )
    code, found, _ = inspected(tiny_model, "--verify")
    assert (code, found["error"]["code"]) == (3, "E_NO_MANIFEST")


def test_chat_templates_in_a_folder_of_their_own_are_carried_along(tiny_copy, tmp_path):
    folder = tiny_copy / NAMED_TEMPLATES
    folder.mkdir()
    (folder / "tool_use.jinja").write_text("{{ messages }}")
    (folder / "readme.txt").write_text("x")
    found = source_files(open_checkpoint(tiny_copy))
    assert f"{NAMED_TEMPLATES}/tool_use.jinja" in found.aux_names
    assert not [name for name in found.aux_names if "readme" in name]
    (tmp_path / "elsewhere.txt").write_text("secret")
    (folder / "rag.jinja").symlink_to(tmp_path / "elsewhere.txt")
    with pytest.raises(CheckpointRefused) as caught:
        source_files(open_checkpoint(tiny_copy))
    assert caught.value.code == "E_LINK_OUTSIDE"
