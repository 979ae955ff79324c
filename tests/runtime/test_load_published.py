"""Published layouts load as the model that their publishers mean."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.published import PUBLISHED

import qtool
from qtool.checkpoint import open_checkpoint
from qtool.formats import detect
from qtool.runtime.kernels import KERNELS, cached_choice, reference
from qtool.runtime.online import schemes_to_run

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
TOKENS = torch.arange(24).reshape(2, 12) * 7 % 512
FEW = (  # those that were once refused or read wrongly
    "awq-without-version",
    "deepseek-v4-flash",
    "g_idx-of-minus-one",
    "intel-int2-mixed-autoround",
    "intel-int4-autoround-awq",
    "llm-compressor-embedding-alone",
    "minimax-m3-w4a16-embedding",
    "neuralmagic-llama-3-fp8-kv",
    "nvidia-minimax-m3-nvfp4",
    "nvidia-qwen3.6-27b-nvfp4",
    "nvidia-qwen3.6-35b-a3b-nvfp4",
)
# transformers does not have the architectures of Moonshot, or not in this size; the stacks of
# gpt-oss are transposed there, which `tests/runtime/test_experts.py` compares; models of GGUF are
# compared in `tests/formats/test_formats_gguf.py`
NOT_COMPARED = ("gguf", "moonshot", "openai")
OTHERS = sorted(name for name in PUBLISHED if name not in FEW and not name.startswith(NOT_COMPARED))


def dense_model(folder, expected):
    """The same model without quantization, made of what its publisher means."""
    from transformers import AutoModelForCausalLM

    tensors = {
        name: tensor
        for name, tensor in load_file(folder / "model.safetensors").items()
        if name.rpartition(".")[0] not in expected
    }
    tensors |= {f"{name}.weight": weight.contiguous() for name, weight in expected.items()}
    config = json.loads((folder / "config.json").read_text())
    kept = {key: value for key, value in config.items() if not key.endswith("ion_config")}
    dense = folder.with_name("dense")
    dense.mkdir()
    save_file(tensors, dense / "model.safetensors", {"format": "pt"})
    (dense / "config.json").write_text(json.dumps(kept))
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32).eval()
    shutil.rmtree(dense)
    return model


@pytest.fixture
def weights_alone(monkeypatch):
    """Multiply with dequantized weights, and leave inputs as they are."""
    monkeypatch.setitem(KERNELS, "cpu", ("reference",))
    monkeypatch.setattr(reference, "fake_quantize_input", lambda x, *_: x)
    cached_choice.cache_clear()
    yield
    cached_choice.cache_clear()


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [*FEW, *(pytest.param(each, marks=pytest.mark.exhaustive) for each in OTHERS)]
)
def test_logits_are_those_of_the_dequantized_model(tmp_path, weights_alone, name):
    expected = PUBLISHED[name](tmp_path / "model")
    with torch.inference_mode():
        wanted = dense_model(tmp_path / "model", expected)(TOKENS).logits
        found = qtool.load(tmp_path / "model", device="cpu", dtype="float32")(TOKENS).logits
    assert wanted.isfinite().all()
    assert (found - wanted).norm() < 1e-5 * wanted.norm()


def test_the_names_of_vllm_and_sglang_for_auto_round_are_known(tmp_path):
    PUBLISHED["intel-int4-autoround-awq"](tmp_path / "model")
    checkpoint = open_checkpoint(tmp_path / "model")
    for name in ("auto-round", "inc"):
        assert schemes_to_run(checkpoint, detect(checkpoint), name)
