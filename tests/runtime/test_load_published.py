"""Published layouts load as the model that their publishers mean."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.published import PUBLISHED
from support.published.stacks import KINDS

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
    "mistral-small-4-fp8",
    "neuralmagic-llama-3-fp8-kv",
    "nvidia-llama-4-fp8",
    "nvidia-llama-4-nvfp4",
    "nvidia-minimax-m3-nvfp4",
    "nvidia-qwen3.6-27b-nvfp4",
    "nvidia-qwen3.6-35b-a3b-nvfp4",
    "transformers-fp8-experts",
)
# transformers does not have the architectures of Moonshot, or not in this size; the stacks of
# gpt-oss are transposed there, which `tests/runtime/test_experts.py` compares; models of GGUF are
# compared in `tests/formats/test_formats_gguf.py`
NOT_COMPARED = ("gguf", "moonshot", "openai")
QUANTIZATION = ("quantization_config", "compression_config")
OTHERS = sorted(name for name in PUBLISHED if name not in FEW and not name.startswith(NOT_COMPARED))


def dense_model(folder, expected):
    """The same model without quantization, made of what its publisher means."""
    import transformers

    stored = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    model_class = transformers.AutoModelForCausalLM
    dense = {f"{name}.weight": weight for name, weight in expected.items()}
    if stacks := dense_stacks(stored, expected, is_transposed=config["model_type"] == "llama4"):
        if "lm_head.weight" in stored and config["model_type"] == "llama4":
            config = {**config["text_config"], "architectures": ["Llama4ForCausalLM"]}
        model_class = getattr(transformers, config["architectures"][0])
        dense = {name: dense[name] for name in dense if ".experts." not in name} | stacks
    tensors = {
        name: each for name, each in stored.items() if name.rpartition(".")[0] not in expected
    }
    tensors |= {name: tensor.contiguous() for name, tensor in dense.items()}
    kept = {key: value for key, value in config.items() if not key.endswith(QUANTIZATION)}
    place = folder.with_name("dense")
    place.mkdir()
    save_file(tensors, place / "model.safetensors", {"format": "pt"})
    (place / "config.json").write_text(json.dumps(kept))
    model = model_class.from_pretrained(place, dtype=torch.float32).eval()
    shutil.rmtree(place)
    return model


def dense_stacks(stored, expected, *, is_transposed):
    """The stacks of experts in ``stored``, which transformers has in one parameter each."""
    stacks = {}
    for name in stored:
        holder, _, projection = name.rpartition(".")
        if f"{holder}.0.down_proj" not in expected or projection not in KINDS:
            continue
        experts = range(sum(each.startswith(f"{holder}.") for each in expected) // 3)
        matrices = [
            torch.cat([expected[f"{holder}.{expert}.{kind}"] for kind in KINDS[projection]])
            for expert in experts
        ]
        stacks[name] = torch.stack([each.T if is_transposed else each for each in matrices])
    return stacks


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
