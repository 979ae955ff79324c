"""The files that a conversion writes, what keeps it from publishing them, and the command."""

from __future__ import annotations

import hashlib
import importlib
import json
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.conversion import (
    CT,
    FP8,
    GPTQ,
    MODELOPT,
    edit,
    random_weight,
    write_layers,
)

from qtool.checkpoint import open_checkpoint
from qtool.checkpoint.manifest import MANIFEST, check_manifest
from qtool.conversion import TARGETS, export
from qtool.errors import CheckpointRefused, OutputTaken, ResourceError, UsageError
from qtool.events import ProgressEvent
from qtool.formats import detect
from qtool.scheme import SCHEMES

pytestmark = pytest.mark.usefixtures("one_thread")
pytest_plugins = ["support.sample_plugin"]


@pytest.mark.parametrize("limit", ["1MiB", "1500kB", "3 MB"])
def test_files_end_before_max_shard_size_unless_one_tensor_is_larger(sample, tmp_path, limit):
    result = export(sample("ct/W4A16"), to=GPTQ, output=tmp_path / "out", max_shard_size=limit)
    size = {"1MiB": 1 << 20, "1500kB": 1_500_000, "3 MB": 3_000_000}[limit]
    checkpoint = open_checkpoint(result.output)
    files = sorted(path.name for path in result.output.glob("*.safetensors"))
    assert files == [
        f"model-{index + 1:05}-of-{result.files:05}.safetensors" for index in range(result.files)
    ]
    assert 1 < result.files < checkpoint.size_bytes / size + 4
    tensors = {
        name: [tensor for tensor in checkpoint.tensors.values() if tensor.file.name == name]
        for name in files
    }
    assert all(
        len(held) == 1 or sum(tensor.size_bytes for tensor in held) <= size
        for held in tensors.values()
    )
    index = json.loads((result.output / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {
        tensor.name: tensor.file.name for tensor in checkpoint.tensors.values()
    }
    assert index["metadata"]["total_size"] == sum(
        tensor.size_bytes for tensor in checkpoint.tensors.values()
    )
    widths = {"I32": 4, "F32": 4, "BF16": 2, "F16": 2, "I64": 8}
    # mapped, each can be used in place
    assert not [
        tensor.name
        for tensor in checkpoint.tensors.values()
        if tensor.offset % widths[tensor.dtype]
    ]
    assert load_file(result.output / files[0]).keys() == {
        tensor.name for tensor in tensors[files[0]]
    }


@pytest.mark.parametrize("size", ["0", "1kB", "-5GB", "5XB", "many", ""])
def test_a_shard_size_that_is_none_is_refused_before_anything_is_read(tmp_path, size):
    with pytest.raises(UsageError) as caught:
        export(tmp_path / "no such model", to=GPTQ, output=tmp_path / "out", max_shard_size=size)
    assert caught.value.code == "E_SIZE"
    assert "5GB" in caught.value.hint


def test_aux_files_are_carried_along_and_code_is_not(copy, tmp_path):
    source = copy("ct/W4A16")
    extra = {
        "tokenizer.json": "{}",
        "LICENSE": "mine",
        "chat_template.jinja": "{{ x }}",
        "modeling_own.py": "raise SystemExit",
        "notes.txt": "n",
        "optimizer.bin": "pickle",
    }
    for name, text in extra.items():
        (source / name).write_text(text)
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    result = export(source, to=GPTQ, output=tmp_path / "out")
    names = {path.name for path in result.output.iterdir()}
    assert names >= {
        "tokenizer.json",
        "generation_config.json",
        "LICENSE",
        "chat_template.jinja",
        "qtool-manifest.json",
    }
    assert not names & {"modeling_own.py", "notes.txt", "optimizer.bin", "recipe.yaml"}
    assert (result.output / "tokenizer.json").read_bytes() == before["tokenizer.json"]
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before
    assert json.loads((result.output / "config.json").read_text()).keys() >= {
        "architectures",
        "model_type",
        "vocab_size",
    }


NESTED = {
    "additional_chat_templates/tool_use.jinja": "{{ tools }}",
    "modules.json": "[]",
    "1_Pooling/config.json": '{"pooling_mode": "mean"}',
}


def write_nested(folder):
    """Add chat templates and modules of sentence-transformers, in folders of their own."""
    for name, text in NESTED.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    (folder / "1_Pooling" / "notes.txt").write_text("n")
    (folder / "2_Dense").mkdir()
    (folder / "2_Dense" / "config.json").write_text("{}")
    (folder / "2_Dense" / "model.safetensors").write_text("weights")


def test_files_in_folders_are_carried_along_checked_and_replaced(sample, copy, tmp_path):
    source = copy("ct/W4A16")
    write_nested(source)
    for _ in range(2):
        result = export(source, to=GPTQ, output=tmp_path / "out", overwrite=True)
        for name, text in NESTED.items():
            assert (result.output / name).read_text() == text
        assert {path.name for path in (result.output / "1_Pooling").iterdir()} == {"config.json"}
    assert [note for note in result.notes if "2_Dense" in note]
    checked = check_manifest(result.output)
    assert checked.matches
    assert NESTED.keys() <= json.loads((result.output / MANIFEST).read_text())["files"].keys()
    assert export(result.output, to=CT, output=tmp_path / "again").output
    (result.output / "1_Pooling" / "config.json").write_text('{"pooling_mode": "last"}')
    (result.output / "1_Pooling" / "other.json").write_text("{}")
    changed = check_manifest(result.output)
    assert (changed.changed, changed.added) == (
        ("1_Pooling/config.json",),
        ("1_Pooling/other.json",),
    )
    with pytest.raises(OutputTaken, match="1_Pooling/other"):
        export(source, to=GPTQ, output=tmp_path / "out", overwrite=True)


def test_the_manifest_tells_where_the_checkpoint_comes_from_and_what_it_is(sample, tmp_path):
    first = export(sample("ct/FP8_DYNAMIC"), to=MODELOPT, output=tmp_path / "first").output
    second = export(first, to=CT, output=tmp_path / "second", max_shard_size="2MB").output
    manifest = json.loads((second / "qtool-manifest.json").read_text())
    assert manifest["conversion"] == {"from": MODELOPT, "to": CT, "rounded": {}, "notes": []}
    assert manifest["source_manifest"]["conversion"]["from"] == CT
    assert "files" not in manifest["source_manifest"]
    assert manifest["source_files"].keys() == {"model.safetensors"}
    assert "converted it from modelopt to compressed-tensors" in (second / "README.md").read_text()
    assert manifest["files"] == {
        path.name: {
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "size_bytes": path.stat().st_size,
        }
        for path in second.iterdir()
        if path.name != "qtool-manifest.json"
    }


def test_the_output_never_touches_what_is_there(sample, copy, tmp_path):
    source = copy("ct/W4A16")
    for place in (source, source / "inside", source.parent):
        with pytest.raises(UsageError) as caught:
            export(source, to=GPTQ, output=place)
        assert caught.value.code == "E_OUTPUT_PLACE"
    foreign = shutil.copytree(sample("ct/FP8"), tmp_path / "foreign")
    own = export(source, to="bf16", output=tmp_path / "own").output
    for taken, overwrite, format_there in (
        (foreign, False, CT),
        (foreign, True, CT),  # qtool did not write it
        (own, False, None),
    ):
        with pytest.raises(OutputTaken) as caught:
            export(source, to=GPTQ, output=taken, overwrite=overwrite)
        layout = detect(open_checkpoint(taken))
        assert (caught.value.code, layout and layout.format) == ("E_OUTPUT_EXISTS", format_there)
    export(source, to=GPTQ, output=own, overwrite=True)
    assert detect(open_checkpoint(own)).format == GPTQ
    assert {path.name for path in tmp_path.iterdir()} == {"copy", "foreign", "own"}


@pytest.mark.parametrize(
    ("to", "spoiled", "value", "named"),
    [
        (
            GPTQ,
            "model.layers.1.mlp.up_proj.weight_scale",
            float("nan"),
            "model.layers.1.mlp.up_proj.scales",
        ),
        (GPTQ, "model.embed_tokens.weight", float("inf"), "model.embed_tokens.weight"),
        (
            "bf16",
            "model.layers.1.mlp.up_proj.weight_scale",
            float("nan"),
            "model.layers.1.mlp.up_proj.weight",
        ),
        ("f16", "model.norm.weight", 1e30, "model.norm.weight"),
        (
            "f16",
            "model.layers.1.mlp.up_proj.weight_scale",
            1e5,
            "model.layers.1.mlp.up_proj.weight",
        ),
    ],
)
def test_numbers_that_are_none_are_never_published(copy, tmp_path, to, spoiled, value, named):
    source = edit(copy("ct/W4A16"), lambda tensors: tensors[spoiled].view(-1)[:1].fill_(value))
    with pytest.raises(CheckpointRefused, match=f"`{named}` holds NaN or infinity") as caught:
        export(source, to=to, output=tmp_path / "out")
    assert caught.value.code == "E_VALUES"
    assert {path.name for path in tmp_path.iterdir()} == {"copy"}


def test_codes_that_belong_to_no_layer_are_not_passed_off_as_weights(copy, tmp_path):
    """Stacked FP8 experts, which no format here reads: copied, they would be garbage under a config
    that says nothing of them.
    """
    experts = {
        "model.layers.0.mlp.experts.gate_up_proj": torch.zeros(2, 64, 32, dtype=torch.float8_e4m3fn)
    }
    source = edit(copy("ct/FP8_BLOCK"), lambda tensors: tensors.update(experts))
    for to in ("bf16", CT, FP8):
        with pytest.raises(CheckpointRefused, match=r"experts\.gate_up_proj"):
            export(source, to=to, output=tmp_path / "out")
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["gptq/rtn4", "gptq/rtn_gemm"])
def test_zero_points_that_deny_symmetry_are_not_dropped(copy, tmp_path, name):
    zeros = "model.layers.1.mlp.up_proj.qzeros"
    source = edit(copy(name), lambda tensors: tensors[zeros].fill_(0x33333333))
    with pytest.raises(CheckpointRefused, match="zero points are 3") as caught:
        export(source, to=CT, output=tmp_path / "out")
    assert caught.value.code == "E_ZERO_POINT"
    assert not (tmp_path / "out").exists()


def test_a_nan_among_the_scales_of_stacked_experts_is_found(gpt_oss, tmp_path):
    scales = "model.layers.0.mlp.experts.down_proj_scales"
    edit(gpt_oss, lambda tensors: tensors[scales].view(-1)[-1:].fill_(255))
    with pytest.raises(CheckpointRefused, match=rf"`{scales}` holds a NaN scale") as caught:
        export(gpt_oss, to="mxfp4", output=tmp_path / "out")
    assert caught.value.code == "E_VALUES"


def test_a_write_that_fails_on_its_way_to_the_disk_is_no_success(sample, tmp_path, monkeypatch):
    def fail(path):
        raise OSError(5, "Input/output error", str(path))

    monkeypatch.setattr(importlib.import_module("qtool.conversion.streaming"), "make_durable", fail)
    with pytest.raises(ResourceError, match="Input/output error") as caught:
        export(sample("ct/W4A16"), to=GPTQ, output=tmp_path / "out")
    assert caught.value.code == "E_UNWRITABLE"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_more_files_than_a_process_may_open_are_written(sample, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(list(Path("/proc/self/fd").iterdir()))
    layers = {
        f"model.layers.{layer}.mlp.up_proj": (random_weight(1024, 1024), SCHEMES["FP8_DYNAMIC"])
        for layer in range(40)
    }
    source = write_layers(tmp_path / "source", layers)
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 25, hard))
    try:
        assert (
            export(source, to=MODELOPT, output=tmp_path / "out", max_shard_size="1MiB").files >= 40
        )
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_options_of_the_other_way_to_export_are_mistakes(sample, tmp_path):
    for options in (
        {"to": GPTQ, "method": "modelopt_fp8"},
        {"checkpoint_restore_path": "state", "requantize": True},
    ):
        with pytest.raises(UsageError) as caught:
            export(sample("ct/W4A16"), output=tmp_path / "out", **options)
        assert caught.value.code == "E_EXPORT_UNUSED"


def test_a_disk_that_is_too_small_is_seen_before_anything_is_written(sample, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=20_000_000))
    with pytest.raises(
        ResourceError, match=r"\d\d\.\d\d MB are needed for the output and 20\.00 MB are free"
    ) as caught:
        export(sample("ct/W4A16"), to="bf16", output=tmp_path / "out")
    assert caught.value.code == "E_DISK"
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["middle", "checking"])
def test_killed_at_any_moment_it_leaves_no_checkpoint_and_the_next_run_cleans_up(
    sample, tmp_path, moment
):
    code = """if True:
        import os, signal, sys
        from qtool.conversion import export
        def die(event):
            done = getattr(event, "done", -1) >= {"middle": 3, "checking": 1e9}[sys.argv[3]]
            if done or getattr(event, "what", None) == "checking the result":
                os.kill(os.getpid(), signal.SIGKILL)
        export(sys.argv[1], to="gptq", output=sys.argv[2], max_shard_size="1MiB", on_event=die)"""
    run = subprocess.run(
        [sys.executable, "-c", code, sample("ct/W4A16"), tmp_path / "out", moment],
        capture_output=True,
        text=True,
    )
    assert run.returncode == -9, run.stderr
    assert {path.name for path in tmp_path.iterdir()} == {".out.qtool"}
    export(sample("ct/W4A16"), to=GPTQ, output=tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_an_error_in_the_middle_leaves_nothing(sample, tmp_path):
    def fail(event):
        if isinstance(event, ProgressEvent):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(sample("ct/W4A16"), to=GPTQ, output=tmp_path / "deep" / "out", on_event=fail)
    assert not list(tmp_path.iterdir())


@pytest.mark.exhaustive
@pytest.mark.slow
def test_converting_holds_less_than_two_files_in_memory(tmp_path):
    layer = random_weight(1024, 1024), SCHEMES["W4A16"]
    source = write_layers(
        tmp_path / "source", {f"model.layers.{number}.mlp.up_proj": layer for number in range(300)}
    )
    code = """if True:
        import re, sys
        from pathlib import Path
        from qtool.conversion import export, plan, streaming
        def peak_mb():
            status = Path("/proc/self/status").read_text()
            return int(re.search(r"VmHWM:\\s+(\\d+) kB", status)[1]) / 1024
        before = peak_mb()
        result = export(sys.argv[1], to="bf16", output=sys.argv[2], max_shard_size="200MiB")
        assert result.files == 3
        print(peak_mb() - before)"""
    run = subprocess.run(
        [sys.executable, "-c", code, source, tmp_path / "out"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert float(run.stdout) < 400


@pytest.mark.slow
def test_the_command_converts_and_says_what_it_did(run_cli, sample, tmp_path):
    result = run_cli(
        "export", "--model-path", sample("ct/W4A16"), "--to", "gptq", "--output", "out"
    )
    assert result.exit_code == 0
    assert re.fullmatch(
        rf"{tmp_path}/out: compressed-tensors -> gptq, 42 layers, codes and scales unchanged, "
        r"[\d.]+ s\nsize: [\d.]+ MB -> [\d.]+ MB in 1 file\n",
        result.stdout,
    )
    assert "converting" in result.stderr
    again = run_cli(
        "export",
        "--model",
        "out",
        "--to",
        "bf16",
        "-o",
        "plain",
        "--json",
        "--quiet",
        "--max-shard-size",
        "4MB",
    )
    data = json.loads(again.stdout)
    wanted = {
        "source_format": GPTQ,
        "format": "bf16",
        "layers": 42,
        "rounded_layers": 0,
        "files": 3,
        "output": str(tmp_path / "plain"),
    }
    assert (again.stderr, data | wanted) == ("", data)


@pytest.mark.parametrize(
    ("arguments", "exit_code", "code", "says"),
    [
        (["--to", "gtpq"], 2, "E_UNKNOWN_FORMAT", "did you mean `gptq`"),
        ([], 2, "E_EXPORT_WHAT", "--checkpoint-restore-path STATE"),
        (["--to", "gptq", "--checkpoint-restore-path", "state"], 2, "E_EXPORT_WHAT", "--to"),
    ],
)
def test_the_command_refuses_with_code_and_hint_on_stderr(
    run_cli, sample, tmp_path, arguments, exit_code, code, says
):
    result = run_cli(
        "export", "--model-path", sample("ct/W8A16"), "--output", "out", *arguments, "--json"
    )
    assert (result.exit_code, json.loads(result.stdout)["error"]["code"]) == (exit_code, code)
    assert f"error[{code}]" in result.stderr
    assert says in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name", ["fp8", "FP16", "compressed_tensors", "gptq-v2", "BFloat16", "awq"]
)
def test_formats_may_be_spelled_as_people_do(name):
    from qtool.conversion.targets import target_named

    assert target_named(name) in TARGETS
