"""Real checkpoints get the verdicts of the compatibility matrix."""

from __future__ import annotations

import pytest
from support.engine_findings import ENGINES, check

from qtool.checkpoint.reader import open_checkpoint

pytest_plugins = ["support.sample_plugin"]


# sample -> which of sglang, tensorrt-llm, transformers, vllm load it: formats.md, section 16
VERDICTS = {
    "ct/W4A16": "s-tv",
    "ct/W8A16": "s-tv",
    "ct/W2A16": "--tv",
    "ct/W3A16": "--tv",
    "ct/W5A16_ASYM": "--tv",
    "ct/W7A16": "--tv",
    "ct/FP8": "s-tv",
    "ct/FP8_DYNAMIC": "sTtv",
    "ct/FP8_BLOCK": "sTtv",
    "ct/fp8_weight_only": "s-tv",
    "ct/W8A8": "s-tv",
    "ct/W8A8_STATIC_ASYM": "s-tv",
    "ct/W4A8": "--t-",
    "ct/W4AFP8": "--t-",
    "ct/NVFP4": "sTtv",
    "ct/NVFP4A16": "s-tv",
    "ct/MXFP4": "--tv",
    "ct/MXFP4A16": "-Ttv",
    "ct/MXFP8": "--tv",
    "ct/mixed": "s-tv",
    "ct/kv_fp8": "sTtv",
    "gptq/rtn4": "s-tv",
    "gptq/desc_act": "s-t-",
    "gptq/dynamic": "s--v",
    "gptq/gptq3": "--t-",
    "gptq/channel2": "--t-",
    "gptq/asym_v1": "--t-",
    "gptq/asym_v2": "--t-",
    "gptq/rtn_gemm": "--t-",
    "modelopt/FP8": "sT-v",
    "modelopt/FP8_KV": "sT-v",
    "modelopt/FP8_PC_PT": "-T-v",
    "modelopt/FP8_PB_WO": "-T-v",
    "modelopt/NVFP4": "sT-v",
    "modelopt/W4A16_NVFP4": "sT-v",
    "modelopt/MXFP8": "sT-v",
    "modelopt/MXFP4": "----",
    "modelopt/INT4_AWQ": "-T--",
    "modelopt/W4A8_AWQ": "-T--",
    "modelopt/INT8_SQ": "----",
    "modelopt/MIXED": "sT-v",
}


@pytest.mark.parametrize("name", VERDICTS)
def test_real_checkpoints_get_the_verdicts_of_the_matrix(name, sample):
    checkpoint = open_checkpoint(sample(name))
    loads = "".join(
        letter if check(checkpoint, engine).loads else "-"
        for engine, letter in zip(ENGINES, "sTtv", strict=True)
    )
    assert loads == VERDICTS[name]


MINIMUM_GPU = {  # sample -> the first architecture for sglang and vllm
    "ct/W4A16": (80, 75),
    "ct/FP8_DYNAMIC": (80, 75),
    "ct/W8A8": (80, 75),
    "ct/NVFP4": (80, 75),
    "ct/MXFP4A16": (None, 80),
    "gptq/rtn4": (80, 75),
    "modelopt/FP8": (89, 80),
    "modelopt/NVFP4": (80, 75),
    "modelopt/MXFP8": (100, 80),
}


@pytest.mark.parametrize("name", MINIMUM_GPU)
def test_the_first_gpu_is_that_of_the_matrix(name, sample):
    checkpoint = open_checkpoint(sample(name))
    for engine, minimum in zip(("sglang", "vllm"), MINIMUM_GPU[name], strict=True):
        loading = [
            gpu
            for gpu in (70, 75, 80, 86, 89, 90, 100, 120)
            if check(checkpoint, engine, gpu=str(gpu)).loads
        ]
        assert (loading[0] if loading else None) == minimum
