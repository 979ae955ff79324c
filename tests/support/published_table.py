"""The table of published layouts in docs/formats.md: `python tests/support/published_table.py`
writes it again.

Who publishes what stands here; what each layout is, and what becomes of it, the program says.
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]

from support.published import PUBLISHED  # noqa: E402
from support.published.not_read import NOT_READ  # noqa: E402

DOCUMENT = ROOT / "docs" / "formats.md"
BLOCK = re.compile(r"(<!-- published layouts -->\n).*?(<!-- end -->)", re.DOTALL)
HEAD = (
    "| publisher | models | layout | read as | loaded | served by | converted to |\n"
    "|---|---|---|---|---|---|---|"
)
TARGETS = ("compressed-tensors", "modelopt", "gptq", "awq", "fp8_block", "mxfp4")
ENGINES = {"vllm": "vLLM", "sglang": "SGLang"}


class Origin(NamedTuple):
    """Where a layout comes from."""

    publisher: str
    models: str


ORIGINS: Mapping[str, Origin] = {
    "amd-deepseek-mxfp4-fp8-attention": Origin("AMD (Quark)", "DeepSeek-R1"),
    "amd-gpt-oss-mxfp4-fp8-inputs": Origin("AMD (Quark)", "gpt-oss"),
    "amd-llama-3.1-fp8-kv": Origin("AMD (Quark)", "Llama 3.1"),
    "amd-llama-nvfp4": Origin("AMD (Quark)", "Llama"),
    "amd-llama-ptpc-fp8": Origin("AMD (Quark)", "Llama"),
    "amd-qwen3-moe-mxfp4": Origin("AMD (Quark)", "Qwen3 MoE"),
    "ascend-modelslim": Origin("Huawei (ModelSlim)", "DeepSeek, Qwen3"),
    "autofp8-kv-output-scale": Origin("Neural Magic (AutoFP8)", "Llama 3"),
    "autoround-mx_int4": Origin("Intel (AutoRound)", "Qwen3"),
    "autoround-rotated": Origin("Intel (AutoRound)", "Qwen3"),
    "awq-gemv": Origin("AutoAWQ users", "Llama 2"),
    "awq-without-version": Origin("AutoAWQ users", "Llama, Qwen"),
    "baidu-ernie-4.5-paddle": Origin("Baidu", "ERNIE 4.5"),
    "bnb-fp4-bf16-storage": Origin("bitsandbytes users", "Llama"),
    "bnb-llm-int8": Origin("bitsandbytes users", "Llama, Mistral"),
    "bnb-qwen3-moe": Origin("unsloth", "Qwen3 MoE"),
    "bnb-without-method": Origin("bitsandbytes users", "Llama, OPT"),
    "deepseek-v4-flash": Origin("DeepSeek", "DeepSeek-V4"),
    "deepseek-v4-flash-base": Origin("DeepSeek", "DeepSeek-V4"),
    "eetq-int8": Origin("EETQ users", "Llama"),
    "exl3-without-config": Origin("turboderp", "Llama, Qwen3"),
    "g_idx-of-minus-one": Origin("LLM Compressor users", "Llama"),
    "gguf-dynamic-q2_k": Origin("unsloth", "Llama 3, Qwen3"),
    "gguf-iq2_xxs": Origin("unsloth, bartowski", "DeepSeek, Qwen3, Kimi"),
    "gguf-iq4_xs": Origin("bartowski", "Llama 3, Qwen3"),
    "gguf-moe-mxfp4": Origin("llama.cpp users", "Qwen3 MoE, gpt-oss"),
    "gguf-moe-q4_k_m": Origin("unsloth, bartowski", "Qwen3 MoE"),
    "gguf-q4_0": Origin("bartowski", "Llama 3, Qwen3"),
    "gguf-q4_k_m": Origin("bartowski, ggml-org, lmstudio-community", "Llama 3, Qwen3, Gemma 3"),
    "gguf-q8_0": Origin("ggml-org, Qwen", "Llama 3, Qwen3"),
    "gguf-tq1_0": Origin("unsloth", "DeepSeek, Kimi"),
    "gptq-for-llama-2023": Origin("TheBloke", "Llama"),
    "gptq-marlin": Origin("IST-DASLab, ModelCloud", "Llama"),
    "gptqmodel-awq-sym": Origin("ModelCloud (GPTQModel)", "Qwen3"),
    "gptqmodel-gguf-blocks": Origin("ModelCloud (GPTQModel)", "Llama, Qwen3"),
    "intel-autoround-asym": Origin("Intel, OPEA (AutoRound)", "Qwen2.5, Llama 3"),
    "intel-autoround-awq-mixed": Origin("Intel (AutoRound)", "Qwen3"),
    "intel-fp8-block-autoround": Origin("Intel (AutoRound)", "Qwen3"),
    "intel-int2-mixed-autoround": Origin("Intel, OPEA (AutoRound)", "DeepSeek-R1, Qwen3"),
    "intel-int4-autoround-awq": Origin("Intel (AutoRound)", "Qwen3, Llama 3"),
    "intel-mxfp4-autoround": Origin("Intel (AutoRound)", "Qwen3"),
    "intel-mxfp8-autoround": Origin("Intel (AutoRound)", "Qwen3"),
    "intel-qwen3-30b-a3b-autoround": Origin("Intel (AutoRound)", "Qwen3 MoE"),
    "intel-qwen3-int4-autoround": Origin("Intel (AutoRound)", "Qwen3, Llama 3, Gemma 3"),
    "ista-aqlm-2bit": Origin("ISTA-DASLab", "Llama 3"),
    "ista-fp-quant": Origin("ISTA-DASLab", "Llama 3, Qwen3"),
    "ista-higgs": Origin("ISTA-DASLab", "Llama 3"),
    "ista-spqr": Origin("ISTA-DASLab", "Llama 2"),
    "llama-3-gptq-asym": Origin("AutoGPTQ users", "Llama 3"),
    "llama-3.1-awq-int4": Origin("hugging-quants, casperhansen", "Llama 3.1, Mistral"),
    "llm-compressor-embedding-4bit": Origin("LLM Compressor users", "Llama"),
    "llm-compressor-embedding-alone": Origin("LLM Compressor users", "Llama"),
    "llm-compressor-quantized-head": Origin("LLM Compressor users", "Llama"),
    "meituan-block-int8": Origin("Meituan", "DeepSeek-R1"),
    "meta-llama-3.1-405b-fbgemm-fp8": Origin("Meta", "Llama 3.1 405B"),
    "microsoft-bitnet-b1.58": Origin("Microsoft", "BitNet b1.58"),
    "minimax-m3-mxfp8": Origin("MiniMax", "MiniMax-M3"),
    "minimax-m3-w4a16-embedding": Origin("LLM Compressor users", "MiniMax-M3"),
    "mit-qserve-w4a8": Origin("mit-han-lab", "Llama 3"),
    "mistral-small-4-fp8": Origin("Mistral AI", "Mistral Small 4"),
    "mlx-community-4bit": Origin("mlx-community", "all"),
    "mobiuslabs-hqq": Origin("mobiuslabsgmbh", "Llama 3, Mixtral"),
    "modelcloud-gptq-2bit-rows": Origin("ModelCloud (GPTQModel)", "Llama"),
    "modelcloud-gptq-dynamic": Origin("ModelCloud (GPTQModel)", "Llama 3, Qwen2.5"),
    "modelcloud-gptq-v2-3bit": Origin("ModelCloud (GPTQModel)", "Llama"),
    "modelopt-mixed-fused-names": Origin("NVIDIA (ModelOpt)", "Nemotron, Qwen3"),
    "modelopt-nvfp4-without-method-or-producer": Origin("ModelOpt users", "Llama"),
    "modelopt-sidecar-without-producer": Origin("ModelOpt users", "Llama"),
    "moonshot-kimi-k2-thinking": Origin("Moonshot", "Kimi-K2-Thinking"),
    "moonshot-kimi-k2.5": Origin("Moonshot", "Kimi-K2.5, K2.6"),
    "moonshot-kimi-k2.5-short-list": Origin("Moonshot", "Kimi-K2.5"),
    "moonshot-kimi-k3": Origin("Moonshot", "Kimi-K3"),
    "neuralmagic-llama-3-fp8-kv": Origin("Neural Magic (AutoFP8)", "Llama 3"),
    "neuralmagic-llama-3.1-fp8": Origin("Neural Magic", "Llama 3.1"),
    "neuralmagic-sparse24": Origin("Neural Magic", "Sparse Llama"),
    "nvidia-deepseek-v4-nvfp4": Origin("NVIDIA (ModelOpt)", "DeepSeek-V4"),
    "nvidia-llama-4-fp8": Origin("NVIDIA (ModelOpt)", "Llama 4"),
    "nvidia-llama-4-nvfp4": Origin("NVIDIA (ModelOpt)", "Llama 4"),
    "nvidia-llama-nvfp4": Origin("NVIDIA (ModelOpt)", "Llama 3.1, 3.3"),
    "nvidia-minimax-m3-nvfp4": Origin("NVIDIA (ModelOpt)", "MiniMax-M3"),
    "nvidia-qwen3-moe-mixed-experts-parent": Origin("NVIDIA (ModelOpt)", "Qwen3 MoE"),
    "nvidia-qwen3.6-27b-nvfp4": Origin("NVIDIA (ModelOpt)", "Qwen3.6"),
    "nvidia-qwen3.6-35b-a3b-nvfp4": Origin("NVIDIA (ModelOpt)", "Qwen3.6 MoE"),
    "nvidia-qwen3.8-flash-next-nvfp4": Origin("NVIDIA (ModelOpt)", "Qwen3.8-Flash-Next"),
    "opea-int4-sym-inc": Origin("OPEA, Intel (AutoRound 0.3)", "Qwen2.5, Llama 3"),
    "openai-gpt-oss": Origin("OpenAI", "gpt-oss"),
    "pytorch-int4-hqq": Origin("PyTorch (torchao)", "Qwen3, Gemma 3"),
    "pytorch-phi-4-int8-int4-embedding": Origin("PyTorch (torchao)", "Phi-4-mini, Qwen3"),
    "pytorch-qwen3-fp8": Origin("PyTorch (torchao)", "Qwen3"),
    "pytorch-qwen3-int8-int4": Origin("PyTorch (torchao)", "Qwen3"),
    "qqq-w4a8": Origin("HandH1998", "Llama"),
    "quanto-int4": Origin("quanto users", "Llama"),
    "qwen2.5-gptq-int4": Origin("Qwen", "Qwen2.5"),
    "qwen2.5-gptq-int8": Origin("Qwen", "Qwen2.5"),
    "qwen3-30b-a3b-awq": Origin("Qwen users", "Qwen3 MoE"),
    "qwen3-30b-a3b-gptq-int4": Origin("Qwen", "Qwen3 MoE"),
    "qwen3-32b-fp8-static-per-tensor": Origin("NVIDIA (ModelOpt)", "Qwen3"),
    "qwen3-fp8-bf16-scales": Origin("Qwen", "Qwen3 MoE"),
    "qwen3-fp8-ue8m0": Origin("DeepSeek, Qwen", "DeepSeek-V3.1, Qwen3"),
    "redhat-fp8-attention-nvfp4-mlp": Origin("Red Hat", "Llama, Qwen3"),
    "redhat-fp8-block": Origin("Red Hat", "Qwen3, Llama 4"),
    "redhat-fp8-dynamic": Origin("Red Hat", "Llama 3, Qwen3, Gemma 3"),
    "redhat-llama-3.1-w4a16": Origin("Red Hat", "Llama 3.1, Qwen3, Gemma 3"),
    "redhat-nvfp4": Origin("Red Hat", "Llama 3, Qwen3"),
    "redhat-nvfp4a16": Origin("Red Hat", "Llama 3, Qwen3"),
    "redhat-qwen3-mxfp4": Origin("Red Hat", "Qwen3"),
    "redhat-qwen3-mxfp8": Origin("Red Hat", "Qwen3"),
    "redhat-w4a16-asym": Origin("Red Hat, cyankiwi", "Llama 3, Qwen3"),
    "redhat-w4a8-int8-codes": Origin("Red Hat", "Llama 3"),
    "redhat-w4afp8": Origin("Red Hat", "Qwen3 MoE"),
    "redhat-w8a16": Origin("Red Hat", "Llama 3.1"),
    "redhat-w8a8-int8": Origin("Red Hat", "Llama 3.1, Qwen2.5"),
    "relaxml-quip-sharp": Origin("relaxml", "Llama 2, 3"),
    "sglang-w8a8-int8": Origin("SGLang users", "Llama, DeepSeek"),
    "stepfun-step-3.5-fp8": Origin("StepFun", "Step-3.5-Flash"),
    "targets-by-names-of-engines": Origin("tools that write vLLM's names", "Qwen3 MoE"),
    "thebloke-llama-2-awq": Origin("TheBloke", "Llama 2, Mistral"),
    "thebloke-llama-2-gptq": Origin("TheBloke", "Llama 2, Mistral"),
    "torchao-before-0.10": Origin("torchao users", "Llama 3"),
    "torchao-int8-dynamic": Origin("torchao users", "Llama 3"),
    "torchao-int8-weight-only": Origin("torchao users", "Llama 3"),
    "torchao-intx-mixed": Origin("torchao users", "Llama 3, Phi-4"),
    "transformers-fp8-experts": Origin("transformers users", "Gemma 4 MoE"),
    "turboderp-exl2": Origin("turboderp, bartowski", "Llama 3, Mistral"),
    "turboderp-exl3": Origin("turboderp", "Llama 3, Qwen3"),
    "unsloth-bnb-4bit": Origin("unsloth", "Llama 3, Gemma 3, Qwen3"),
    "vptq-community": Origin("VPTQ-community", "Llama 3.1, Qwen2.5"),
    "weight_shape-in-int32": Origin("tools of their own", "Llama"),
    "z-lab-paroquant": Origin("z-lab, ModelCloud (GPTQModel)", "Llama 3, Qwen3"),
}


def row(name: str) -> str:
    """Return the row of a layout, which the program reads, plans and checks."""
    with tempfile.TemporaryDirectory() as place:
        cells = _cells(name, Path(place) / "model")
    return "| " + " | ".join((*ORIGINS[name], *cells)) + " |"


def _cells(name: str, folder: Path) -> tuple[str, ...]:
    from qtool import formats
    from qtool.checkpoint import open_checkpoint
    from qtool.errors import CheckpointRefused

    if name in NOT_READ:
        NOT_READ[name].write(folder)
        try:
            formats.detect(open_checkpoint(folder))
        except CheckpointRefused as error:
            what = re.sub(rf"{re.escape(str(folder))}\S*:? (holds )?", "", error.message)
            what = what.partition(", which qtool")[0]
            way_on = error.hint.partition("; or start from")[0]
            return what, f"no, `{error.code}`", "no", way_on, ""
        raise AssertionError(f"{name} is read")
    writer = PUBLISHED[name]
    writer(folder)
    checkpoint = open_checkpoint(folder)
    layout = formats.detect(checkpoint)
    assert layout is not None and writer.__doc__
    schemes = sorted({module.scheme.name for module in layout.modules.values()})
    is_loaded, is_served = _runs(checkpoint)
    served = (*(("qtool",) if is_served else ()), *_engines(checkpoint, layout))
    return (
        writer.__doc__.partition("\n")[0].strip().removesuffix(".").replace("``", "`"),
        ", ".join(schemes),
        "yes" if is_loaded else "no",
        ", ".join(served),
        ", ".join(_targets(checkpoint, layout)),
    )


def _runs(checkpoint) -> tuple[bool, bool]:  # type: ignore[no-untyped-def]
    """Whether `qtool.load` loads it, and whether the engine serves it."""
    import torch

    from qtool.engine.requirements import check_by_name
    from qtool.errors import QtoolError
    from qtool.runtime.load_plan import plan_load

    try:
        plan = plan_load(checkpoint, torch.device("cpu"))
    except QtoolError:
        return False, False
    try:
        check_by_name(plan)
    except QtoolError:
        return True, False
    return True, True


def _engines(checkpoint, layout) -> list[str]:  # type: ignore[no-untyped-def]
    from qtool.inspection.engines import check_engine

    found = []
    for engine, name in ENGINES.items():
        report = check_engine(checkpoint, layout, engine)
        is_known = all(each.code != "W_ENGINE_EXPERT_STACK" for each in report.findings)
        if report.loads and is_known:
            found.append(name)
    return found


def _targets(checkpoint, layout) -> list[str]:  # type: ignore[no-untyped-def]
    from qtool.conversion.plan import plan_conversion
    from qtool.conversion.request import make_request
    from qtool.errors import CheckpointRefused

    found = []
    for to in TARGETS:
        if to == (checkpoint.quantization_config or {}).get("quant_method", layout.format):
            continue
        try:
            plan_conversion(make_request(checkpoint, to, requantize=False, scheme=None))
        except CheckpointRefused:
            continue
        found.append(to)
    return [*found, "bf16"]


def documented() -> str:
    """Return the table."""
    names = [*PUBLISHED, *NOT_READ]
    names.sort(key=lambda name: (name in NOT_READ, *map(str.lower, ORIGINS[name]), name))
    return "\n".join((HEAD, *map(row, names)))


def write() -> None:
    """Write the table again."""
    old = DOCUMENT.read_text(encoding="utf-8")
    new = BLOCK.sub(lambda match: f"{match[1]}{documented()}\n{match[2]}", old)
    if new != old:
        DOCUMENT.write_text(new, encoding="utf-8")
        print(f"written: {DOCUMENT.name}")


if __name__ == "__main__":
    write()
