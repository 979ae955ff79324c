"""A source that changes while it is converted, or that is not what its manifest says, is never
published.
"""

from __future__ import annotations

import json
import os

import pytest

from qtool.checkpoint import digest_files
from qtool.conversion import export
from qtool.errors import BackendFailed, CheckpointRefused, QtoolError
from qtool.evaluation.gated import quantize
from qtool.events import ProgressEvent
from qtool.quantization import execution


def flip_a_bit(file):
    before = file.stat()
    data = bytearray(file.read_bytes())
    data[-2000 % len(data)] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def refused(run, folder) -> QtoolError:
    with pytest.raises(CheckpointRefused) as caught:
        run()
    assert caught.value.exit_code == 3
    assert not (folder / "out").exists()
    assert not (folder / ".out.qtool").exists()
    return caught.value


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_source_that_changes_during_the_export_is_not_published(name, tiny_copy, tmp_path):
    def change(event):
        if isinstance(event, ProgressEvent) and event.done == event.total:
            flip_a_bit(tiny_copy / name)

    def run():
        return export(tiny_copy, to="f16", output=tmp_path / "out", on_event=change)

    assert refused(run, tmp_path).code == "E_SOURCE_CHANGED"


def test_a_source_that_changes_before_a_library_fails_is_why(tiny_copy, tmp_path, monkeypatch):
    def run_job(*_, **options):
        assert options["log"].exists()
        flip_a_bit(tiny_copy / "model.safetensors")
        raise BackendFailed("E_BACKEND_FAILED", "the library failed")

    monkeypatch.setattr(execution, "run_job", run_job)

    def run():
        return quantize(tiny_copy, method="fp8_dynamic", output=tmp_path / "out", device="cpu")

    assert refused(run, tmp_path).code == "E_SOURCE_CHANGED"


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: flip_a_bit(folder / "model.safetensors"),
        lambda folder: flip_a_bit(folder / "chat_template.jinja"),
        lambda folder: (folder / "tokenizer_config.json").unlink(),
        lambda folder: (folder / "added.jinja").write_text("x"),
    ],
)
def test_a_source_that_differs_from_its_manifest_is_refused(change, tiny_copy, tmp_path):
    files = digest_files(list(tiny_copy.iterdir()))
    (tiny_copy / "qtool-manifest.json").write_text(json.dumps({"files": files}))
    change(tiny_copy)

    def run():
        return export(tiny_copy, to="f16", output=tmp_path / "out")

    error = refused(run, tmp_path)
    assert error.code == "E_MANIFEST_DIFFERS"
    assert "remove qtool-manifest.json" in error.hint


def test_a_source_that_matches_its_manifest_is_named_with_all_its_bytes(tiny_copy, tmp_path):
    files = digest_files(list(tiny_copy.iterdir()))
    (tiny_copy / "qtool-manifest.json").write_text(json.dumps({"files": files, "made": "by us"}))
    output = export(tiny_copy, to="f16", output=tmp_path / "out").output
    manifest = json.loads((output / "qtool-manifest.json").read_text())
    assert manifest["source_files"] == {"model.safetensors": files["model.safetensors"]}
    assert manifest["source_manifest"] == {"made": "by us"}
