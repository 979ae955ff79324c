"""Whole runs on the tiny model: what is written, that it is good, that it is the same twice, and
what happens when a run is stopped.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import ROOT
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PretrainedConfig,
    Qwen3MoeConfig,
)

import qtool
from qtool.checkpoint import open_checkpoint
from qtool.errors import CheckpointRefused
from qtool.evaluation.perplexity import load_dequantized, perplexity
from qtool.formats import detect

MODEL = ROOT / "examples" / "tiny-python-llama"
DATA = {
    "calibration": str(MODEL / "calibration.jsonl"),
    "num_samples": 4,
    "seq_len": 256,
    "pack": True,
    "device": "cpu",
}


@pytest.fixture(scope="session")
def quantized(tmp_path_factory):
    """Run a method once, whoever asks; returns its folder."""
    done: dict[str, Path] = {}

    def run(method: str, **options) -> Path:
        if method not in done:
            folder = tmp_path_factory.mktemp(method)
            qtool.quantize(MODEL, method=method, output=folder / "out", **{**DATA, **options})
            done[method] = folder / "out"
        return done[method]

    return run


@pytest.fixture(scope="session")
def held_out():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    return [
        tokenizer(json.loads(line)["text"])["input_ids"][:384]
        for line in (MODEL / "evaluation.jsonl").read_text().splitlines()[:10]
    ]


@pytest.fixture(scope="session")
def plain_perplexity(held_out):
    return perplexity(load_dequantized(open_checkpoint(MODEL), dtype=torch.float32), held_out)


SIZES = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
}


def write_random(config: PretrainedConfig, folder: Path) -> Path:
    """Write a random model with the tiny model's tokenizer, and return its folder."""
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL / name, folder / name)
    return folder


BOUNDS = {"modelopt_fp8": 1.02, "w4a16_gptq": 1.05, "gptq_int4": 1.05}
EACH_METHOD = pytest.mark.parametrize(
    "method",  # in one process, so that `quantized` runs it once
    [pytest.param(name, marks=pytest.mark.xdist_group(f"quantize {name}")) for name in BOUNDS],
)


@EACH_METHOD
def test_each_backend_keeps_one_method_to_its_bound(method, quantized, held_out, plain_perplexity):
    model = load_dequantized(open_checkpoint(quantized(method)), dtype=torch.float32)
    found = perplexity(model, held_out)
    assert found <= BOUNDS[method] * plain_perplexity


@EACH_METHOD
def test_the_output_is_complete_and_its_manifest_is_true(method, quantized):
    output = quantized(method)
    manifest = json.loads((output / "qtool-manifest.json").read_text())
    names = {path.name for path in output.iterdir()} - {"qtool-manifest.json"}
    assert set(manifest["files"]) == names
    for name, facts in manifest["files"].items():
        digest = subprocess.run(
            ["sha256sum", output / name], capture_output=True, text=True, check=True
        ).stdout.split()[0]
        assert (facts["sha256"], facts["size_bytes"]) == (digest, (output / name).stat().st_size)
    assert manifest["recipe"]["name"] == method
    assert not [path for path in output.parent.iterdir() if path.name.startswith(".")], (
        "a temporary folder stayed"
    )


@EACH_METHOD
def test_tokenizer_template_and_generation_config_are_those_of_the_source(method, quantized):
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "generation_config.json",
    ):
        assert (quantized(method) / name).read_bytes() == (MODEL / name).read_bytes(), name


@pytest.mark.exhaustive
@EACH_METHOD
def test_no_written_config_names_a_path_of_this_machine(method, quantized):
    for path in quantized(method).glob("*.json"):
        if not path.name.startswith("tokenizer"):
            assert not re.search(r'"[/~][^"]*/', path.read_text()), path.name


@pytest.mark.exhaustive
@pytest.mark.parametrize(  # those whose sums depend on an order
    "method",
    [
        pytest.param(name, marks=pytest.mark.xdist_group(f"quantize {name}"))
        for name in ("w4a16_gptq", "gptq_int4")
    ],
)
def test_two_runs_write_the_same_weights(method, quantized, tmp_path):
    again = qtool.quantize(MODEL, method=method, output=tmp_path / "again", **DATA).output
    assert (again / "model.safetensors").read_bytes() == (
        quantized(method) / "model.safetensors"
    ).read_bytes()


@pytest.mark.slow
def test_a_gptq_checkpoint_has_the_group_size_the_modules_and_the_head_asked_for(tmp_path):
    config = LlamaConfig(**SIZES, vocab_size=4096, tie_word_embeddings=False)
    options = {**DATA, "num_samples": 2, "seq_len": 64, "group_size": 64, "ignore": ["down_proj"]}
    output = qtool.quantize(
        write_random(config, tmp_path / "model"),
        method="gptq_int4",
        lm_head=True,
        output=tmp_path / "out",
        **options,
    ).output
    layout = detect(open_checkpoint(output))
    assert len(layout.modules) == 6 + 1
    assert not [name for name in layout.modules if name.endswith("down_proj")]
    assert {str(module.scheme) for module in layout.modules.values()} == {"int4 g64"}


@pytest.mark.exhaustive
@pytest.mark.slow
def test_rules_give_modules_other_schemes(tmp_path):
    recipe = tmp_path / "mixed.yaml"
    recipe.write_text(
        "summary: FP8 attention, INT4 elsewhere\nbackend: llmcompressor\nscheme: W4A16\n"
        "rules:\n  - {modules: 're:.*self_attn', scheme: FP8_DYNAMIC}\n  - {modules: "
        "model.layers.0.mlp.down_proj, scheme: null}\n"
    )
    layout = detect(
        open_checkpoint(
            qtool.quantize(MODEL, recipe=str(recipe), output=tmp_path / "out", device="cpu").output
        )
    )
    assert layout.modules["model.layers.3.self_attn.k_proj"].scheme.name == "FP8_DYNAMIC"
    assert layout.modules["model.layers.1.mlp.down_proj"].scheme.name == "W4A16"
    assert "model.layers.0.mlp.down_proj" not in layout.modules


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.parametrize("backend", ["llmcompressor", "gptqmodel"])
def test_awq_runs_without_a_gpu(backend, two_layers, tmp_path):
    options = {**DATA, "num_samples": 4, "seq_len": 128}
    output = qtool.quantize(
        two_layers, method="awq_int4", backend=backend, output=tmp_path / "out", **options
    ).output
    layout = detect(open_checkpoint(output))
    assert {str(module.scheme) for module in layout.modules.values()} == {"int4 g128 asym"}
    assert layout.format == {"llmcompressor": "compressed-tensors", "gptqmodel": "awq"}[backend]


@pytest.mark.slow
def test_kv_cache_scales_can_be_all_that_is_added(two_layers, tmp_path):
    output = qtool.quantize(two_layers, method="kv_fp8", output=tmp_path / "out", **DATA).output
    checkpoint = open_checkpoint(output)
    assert detect(checkpoint).kv_cache == "fp8"
    assert sum(name.endswith("k_scale") for name in checkpoint.tensors) == 2


def start(*arguments: str) -> subprocess.Popen:
    command = [
        sys.executable,
        "-m",
        "qtool.cli",
        "quantize",
        "--model-path",
        str(MODEL),
        "--device",
        "cpu",
        *arguments,
    ]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_worker(run: subprocess.Popen) -> int:
    """Return the process id of the run's worker as soon as it says what it is doing."""
    for line in run.stderr:
        if "] " in line:
            return int(Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()[0])
    raise AssertionError("the run ended before its worker began")


@pytest.mark.slow
def test_an_interrupted_run_leaves_nothing(tmp_path):
    run = start("--method", "fp8_dynamic", "--output", str(tmp_path / "out"))
    worker = wait_for_worker(run)
    time.sleep(1)
    run.send_signal(signal.SIGINT)
    assert run.wait(20) == 130
    assert list(tmp_path.iterdir()) == []
    assert not Path(f"/proc/{worker}").exists()


@pytest.mark.slow
def test_a_worker_killed_for_memory_says_what_was_needed(tmp_path):
    run = start("--method", "fp8_dynamic", "--output", str(tmp_path / "out"))
    os.kill(wait_for_worker(run), signal.SIGKILL)  # as the system does when memory runs out
    _, stderr = run.communicate(timeout=20)
    assert run.returncode == 4
    assert "error[E_OUT_OF_MEMORY]" in stderr
    assert "MB were needed" in stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_worker_ends_when_its_parent_is_killed(tmp_path):
    run = start("--method", "fp8_dynamic", "--output", str(tmp_path / "out"))
    worker = wait_for_worker(run)
    run.kill()
    run.wait()
    deadline = time.monotonic() + 5
    while Path(f"/proc/{worker}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{worker}").exists()


@pytest.mark.slow
def test_a_library_error_names_library_place_and_log(tmp_path, monkeypatch):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "sitecustomize.py").write_text(
        "import torch\n"
        "def cholesky(*_, **__):\n"
        "    raise RuntimeError('this machine cannot do it')\n"
        "torch.linalg.cholesky = cholesky\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "broken"), prepend=os.pathsep)
    with pytest.raises(qtool.QtoolError) as caught:
        qtool.quantize(
            MODEL, method="w4a16_gptq", output=tmp_path / "out", **{**DATA, "num_samples": 2}
        )
    assert caught.value.exit_code == 5
    assert re.search(r"llmcompressor 0\.\S+ failed after layers 1 of 7", caught.value.message)
    assert str(tmp_path / "out.qtool.log") in caught.value.hint
    assert "Traceback" in (tmp_path / "out.qtool.log").read_text(errors="replace")
    assert not (tmp_path / "out").exists()


def test_a_source_with_a_weight_that_is_no_number_is_refused_while_the_library_starts(tmp_path):
    layer = "model.layers.1"
    tensors = load_file(MODEL / "model.safetensors")
    # one stays in 16 bits, the other does not
    tensors[f"{layer}.input_layernorm.weight"][-1] = float("nan")
    tensors[f"{layer}.mlp.up_proj.weight"][-1, -1] = float("inf")
    shutil.copytree(MODEL, tmp_path / "model")
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    for method in ("fp8_dynamic", "torchao_int8wo"):
        with pytest.raises(CheckpointRefused, match=r"`model\.layers\.1\..*\(and 1 more") as caught:
            qtool.quantize(tmp_path / "model", method=method, output=tmp_path / "out", device="cpu")
        assert (caught.value.code, caught.value.exit_code) == ("E_VALUES", 3)
        assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.slow
def test_overwrite_replaces_a_whole_output_and_neither_code_nor_pickles_are_carried_along(tmp_path):
    model = tmp_path / "model"
    shutil.copytree(MODEL, model)
    for name in ("tokenizer.py", "vocab.pkl"):
        (model / name).write_text("x")
    (model / "NOTICE").write_text("kept")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "qtool-manifest.json").write_text('{"files": {"old": {}}}')
    (tmp_path / "out" / "old").write_text("precious")
    with pytest.raises(qtool.QtoolError) as caught:
        qtool.quantize(model, method="fp8_dynamic", output=tmp_path / "out", device="cpu")
    assert caught.value.exit_code == 6
    assert (tmp_path / "out" / "old").read_text() == "precious"
    qtool.quantize(
        model, method="fp8_dynamic", output=tmp_path / "out", device="cpu", overwrite=True
    )
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert "NOTICE" in names
    assert not names & {"old", "tokenizer.py", "vocab.pkl", "corpus.py", "train.py"}
    assert detect(open_checkpoint(tmp_path / "out")).format == "compressed-tensors"


def refusal(**options) -> qtool.QtoolError:
    with pytest.raises(qtool.QtoolError) as caught:
        qtool.quantize(MODEL, **{"device": "cpu", **options})
    return caught.value


def test_a_misspelt_option_is_refused_with_the_nearest_name(tmp_path):
    error = refusal(method="fp8_dynamic", output=tmp_path / "out", overwite=True)
    assert (error.code, error.exit_code) == ("E_UNKNOWN_OPTION", 2)
    assert "`overwrite`" in error.hint


@pytest.mark.parametrize("state", ["out", "out/state", "."])
def test_a_state_and_an_output_inside_each_other_are_refused_before_any_work(state, tmp_path):
    error = refusal(
        method="modelopt_fp8",
        output=tmp_path / "out",
        checkpoint_save_path=tmp_path / state,
        **{**DATA, "num_samples": 1},
    )
    assert (error.code, error.exit_code) == ("E_OUTPUT_PLACE", 2)
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_would_replace_the_calibration_file_is_refused(tmp_path):
    data = tmp_path / "out" / "data.jsonl"
    data.parent.mkdir()
    data.write_bytes((MODEL / "calibration.jsonl").read_bytes())
    assert (
        refusal(
            method="modelopt_fp8", output=tmp_path / "out", calibration=str(data), overwrite=True
        ).code
        == "E_OUTPUT_PLACE"
    )
    assert data.exists()


@pytest.mark.slow
@pytest.mark.parametrize(  # LLM Compressor's experts: the sweep of architectures
    "method", [pytest.param("fp8_static", marks=pytest.mark.exhaustive), "modelopt_fp8"]
)
def test_experts_and_an_output_head_are_quantized_and_a_router_is_not(method, tmp_path):
    config = Qwen3MoeConfig(
        **SIZES,
        num_key_value_heads=2,
        head_dim=32,
        vocab_size=4096,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=128,
        tie_word_embeddings=False,
    )
    model = write_random(config, tmp_path / "model")
    options = {**DATA, "num_samples": 4, "seq_len": 64, "lm_head": True}
    output = qtool.quantize(model, method=method, output=tmp_path / method, **options).output
    layout = detect(open_checkpoint(output))
    assert len([name for name in layout.modules if ".experts." in name]) == 12
    assert not [name for name in layout.modules if name.endswith("mlp.gate")]
    assert layout.modules["lm_head"].scheme.name == "FP8"
