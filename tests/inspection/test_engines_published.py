"""What vLLM and SGLang do with published layouts of FP8, MX and ModelOpt."""

import json

import pytest
from support.published import PUBLISHED

from qtool.checkpoint import open_checkpoint
from qtool.formats import detect
from qtool.inspection.engines import check_engine

UNNAMED = ("E_ENGINE_MODELOPT_UNNAMED",)
QUARK = ("E_ENGINE_QUARK_SCHEME",)
PLUGIN = ("E_ENGINE_GGUF",)
REFUSALS = {  # by vLLM, by SGLang
    "deepseek-v4-flash": ((), ()),
    "gguf-q4_k_m": (PLUGIN, ()),
    "gguf-moe-q4_k_m": (PLUGIN, ()),
    "gguf-moe-mxfp4": (PLUGIN, ("E_ENGINE_GGUF_TYPE",)),
    "deepseek-v4-flash-base": ((), ()),
    "nvidia-deepseek-v4-nvfp4": ((), ()),
    "qwen3-fp8-ue8m0": ((), ()),
    "neuralmagic-llama-3-fp8-kv": ((), ()),
    "meta-llama-3.1-405b-fbgemm-fp8": (("E_ENGINE_DEPRECATED",), ("E_ENGINE_METHOD",)),
    "amd-llama-3.1-fp8-kv": ((), ()),
    "amd-qwen3-moe-mxfp4": ((), QUARK),
    "amd-llama-nvfp4": ((), QUARK),
    "qwen3-32b-fp8-static-per-tensor": (UNNAMED, ()),
    "modelopt-sidecar-without-producer": (UNNAMED, ()),
    "nvidia-qwen3-moe-mixed-experts-parent": ((), ()),
    "modelopt-mixed-fused-names": ((), ()),
    "mistral-small-4-fp8": ((), ()),
    "nvidia-llama-4-fp8": ((), ()),
    "nvidia-llama-4-nvfp4": ((), ("E_ENGINE_EXPERT_STACK",)),
    "nvidia-minimax-m3-nvfp4": (("E_ENGINE_SCALE_NAME",), ()),
    "nvidia-qwen3.6-27b-nvfp4": ((), ()),
    "nvidia-qwen3.6-35b-a3b-nvfp4": ((), ()),
    "nvidia-qwen3.8-flash-next-nvfp4": ((), ()),
}


def refusals(folder):
    checkpoint = open_checkpoint(folder)
    reports = [check_engine(checkpoint, detect(checkpoint), name) for name in ("vllm", "sglang")]
    return tuple(report.refusals for report in reports)


@pytest.mark.parametrize("name", REFUSALS)
def test_engines_load_or_refuse_a_published_layout(tmp_path, name):
    PUBLISHED[name](tmp_path / "model")
    assert refusals(tmp_path / "model") == REFUSALS[name]


@pytest.mark.parametrize("name", ["minimax-m3-mxfp8", "nvidia-minimax-m3-nvfp4"])
def test_vllm_reads_the_scales_of_mxfp8_in_minimax_alone(tmp_path, name):
    PUBLISHED[name](tmp_path / "model")
    assert refusals(tmp_path / "model") == (("E_ENGINE_SCALE_NAME",), ())
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "model_type": "minimax_m3_vl"}))
    assert refusals(tmp_path / "model") == ((), ())


def test_tensorrt_llm_loads_experts_in_stacks(tmp_path):
    PUBLISHED["nvidia-llama-4-fp8"](tmp_path / "model")
    checkpoint = open_checkpoint(tmp_path / "model")
    assert check_engine(checkpoint, detect(checkpoint), "tensorrt-llm").refusals == ()
