"""Quantized checkpoints that qtool does not read: what they are, and which tool reads them.

Sources: transformers 5.17, `utils/quantization_config.py`; vLLM 0.33 and SGLang 0.5.23,
`layers/quantization`; the repositories of the methods.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from qtool.checkpoint import Checkpoint
from qtool.checkpoint.strict_json import Json
from qtool.errors import CheckpointRefused
from qtool.formats.layout import Parts, modules_of


@dataclass(frozen=True)
class Method:
    """A way of quantizing that qtool does not read."""

    name: str
    """As configs write it."""
    what: str
    """What its weights are, for a sentence that begins with the checkpoint."""
    readers: str
    """The tools that load it."""


_BY_TRANSFORMERS = "transformers loads it, with the package `{}`"
_METHODS = (
    Method("aqlm", "AQLM codebooks", _BY_TRANSFORMERS.format("aqlm")),
    Method("bitblas", "weights in BitBLAS's order", "older releases of vLLM load it"),
    Method("bitnet", "BitNet's ternary weights", "transformers and bitnet.cpp load it"),
    Method("blockwise_int8", "int8 in blocks, as SGLang serves it", "SGLang loads it"),
    Method("deepspeedfp", "DeepSpeed's FP6 and FP8 weights", "DeepSpeed loads it"),
    Method("eetq", "EETQ's int8 weights", _BY_TRANSFORMERS.format("eetq")),
    Method("exl2", "EXL2 weights", "exllamav2 and TabbyAPI load it"),
    Method("exl3", "EXL3 weights, a trellis of rotated weights", "exllamav3 and TabbyAPI load it"),
    Method("fouroversix", "Four Over Six's NVFP4", _BY_TRANSFORMERS.format("fouroversix")),
    Method("fp_quant", "FP-Quant's rotated FP4 weights", _BY_TRANSFORMERS.format("fp_quant")),
    Method("gemma", "Gemma's own quantization-aware weights", "transformers loads it"),
    Method("gguf", "GGUF's blocks in safetensors", "GPTQModel loads it"),
    Method(
        "gptq_marlin_24",
        "GPTQ with 2:4 sparsity in Marlin's order",
        "older releases of vLLM load it",
    ),
    Method("higgs", "HIGGS, rotated weights in a grid", _BY_TRANSFORMERS.format("flute-kernel")),
    Method("hqq", "HQQ weights with float zero points", _BY_TRANSFORMERS.format("hqq")),
    Method("humming", "weights in Humming's order", "vLLM and SGLang load it"),
    Method("marlin", "GPTQ in Marlin's order", "older releases of vLLM load it"),
    Method("metal", "affine weights for Apple's Metal", "transformers loads it on a Mac"),
    Method("mlx", "MLX weights: uint32 words, scales and biases", "mlx-lm loads it, on a Mac"),
    Method("modelslim", "ModelSlim's weights for Ascend NPUs", "vLLM Ascend and SGLang load it"),
    Method("moe_wna16", "GPTQ's or AWQ's experts under vLLM's own name", "vLLM and SGLang load it"),
    Method("paddle", "weights for PaddlePaddle", "FastDeploy loads it"),
    Method("paroquant", "ParoQuant's rotated int4 weights", "GPTQModel loads it"),
    Method("petit_nvfp4", "NVFP4 for AMD's Petit kernels", "SGLang loads it"),
    Method("qoq", "QServe's W4A8", "older releases of SGLang load it"),
    Method("qqq", "QQQ's W4A8 in Marlin's order", "older releases of vLLM load it"),
    Method("quanto", "quanto weights", _BY_TRANSFORMERS.format("optimum-quanto")),
    Method("quip", "QuIP# or QTIP codebooks of rotated weights", "the authors' own code loads it"),
    Method("sinq", "SINQ weights with two scales", _BY_TRANSFORMERS.format("sinq")),
    Method("spqr", "SpQR weights with sparse outliers", _BY_TRANSFORMERS.format("spqr_quant")),
    Method("squeezellm", "SqueezeLLM's lookup tables", "older releases of vLLM load it"),
    Method("vptq", "VPTQ codebooks", _BY_TRANSFORMERS.format("vptq")),
    Method("w4afp8", "int4 experts with FP8 inputs, as SGLang serves them", "SGLang loads it"),
    Method("w8a8_fp8", "FP8 for each channel, as SGLang serves it", "SGLang loads it"),
    Method("w8a8_int8", "int8 for each channel, as SGLang serves it", "SGLang loads it"),
)
METHODS: Mapping[str, Method] = {method.name: method for method in _METHODS}
ALIASES = {"quip#": "quip", "quip_sharp": "quip", "qtip": "quip"}
TENSORS: Mapping[str, frozenset[str]] = {  # method -> the tensors of a layer that only it has
    "aqlm": frozenset({"codes", "codebooks"}),
    "exl2": frozenset({"q_weight", "q_scale"}),
    "exl3": frozenset({"trellis"}),
    "hqq": frozenset({"W_q"}),
    "mlx": frozenset({"weight", "scales"}),
    "quip": frozenset({"Qidxs"}),
    "spqr": frozenset({"dense_weights"}),
    "vptq": frozenset({"centroids"}),
}
STACK_DTYPES = frozenset({"F8_E4M3", "F8_E5M2", "I8", "U8"})
STACK_SCALES = ("_scale_inv", "_scale", "_weight_scale")  # behind the name of the stack
PADDLE_FIELDS = frozenset({"dense_quant_type", "moe_quant_type"})  # in a config without a method
FIELDS: Mapping[str, str] = {"quip_params": "quip", "aqlm": "aqlm"}
"""Fields that stand in config.json where there is no quantization config."""


def method_of(checkpoint: Checkpoint, config: Json | None) -> Method | None:
    """Return the method of a checkpoint that qtool does not read; None for all others.

    Args:
        checkpoint: the checkpoint.
        config: its quantization config, if it has one.
    """
    named = _named(config or {})
    if named is METHODS["gguf"] and checkpoint.gguf_file:
        return None
    if named or (config or {}).get("quant_method"):
        return named
    if not PADDLE_FIELDS.isdisjoint(config or {}):
        return METHODS["paddle"]
    for field, name in FIELDS.items():
        if checkpoint.config.get(field):
            return METHODS[name]
    # a config without a name: the tensors tell
    return next(filter(None, map(_of_tensors, modules_of(checkpoint))), None)


def check(checkpoint: Checkpoint, config: Json | None) -> None:
    """Raise CheckpointRefused, which names the method and who reads it, when qtool does not."""
    method = method_of(checkpoint, config)
    if method is not None:
        raise CheckpointRefused(
            "E_QUANT_METHOD",
            f"{checkpoint.source} holds {method.what} (`{method.name}`), which qtool does not read",
            hint=f"{method.readers}; or start from the 16-bit model it was made of",
        )


def check_stacks(checkpoint: Checkpoint) -> None:
    """Raise CheckpointRefused when experts lie in a quantized stack that `checkpoint.expert_stacks`
    does not take apart: `moe.gate_proj.weight` of Step, int4, or with biases, as ModelOpt writes
    gpt-oss.

    Source: vLLM 0.33, `models/step3p5.py` load_weights; nvidia-modelopt 0.47,
        `torch/export/unified_export_hf.py`.
    """
    for tensor in checkpoint.tensors.values():
        if len(tensor.shape) < 3 or tensor.dtype not in STACK_DTYPES:
            continue
        scales = (f"{tensor.name}{suffix}" for suffix in STACK_SCALES)
        scale = next((name for name in scales if name in checkpoint.tensors), None)
        if scale:
            raise CheckpointRefused(
                "E_EXPERT_STACK",
                f"{checkpoint.source} holds experts in one stack of {tensor.dtype} "
                f"(`{tensor.name}`, with `{scale}`), which qtool does not read",
                hint="transformers, vLLM and SGLang load such stacks of models that they know; or "
                "start from the 16-bit model it was made of",
            )


def _named(config: Json) -> Method | None:
    name = str(config.get("quant_method") or "").lower()
    return METHODS.get(ALIASES.get(name, name))


def _of_tensors(parts: Parts) -> Method | None:
    for name, suffixes in TENSORS.items():
        if suffixes <= parts.tensors.keys() and (name != "mlx" or _is_mlx(parts)):
            return METHODS[name]
    return None


def _is_mlx(parts: Parts) -> bool:
    return parts["weight"].dtype == "U32"
