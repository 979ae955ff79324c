"""What ``--quantization`` and ``--torchao-config`` mean: the scheme that each linear layer
runs in.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from qtool.checkpoint import Checkpoint, TensorInfo
from qtool.checkpoint.model import FLOAT_DTYPES
from qtool.errors import CheckpointRefused, UsageError, nearest
from qtool.formats import Layout
from qtool.modules import is_linear, skip_reason
from qtool.scheme import SCHEMES, Activations, Scheme, Weights

# torchao's meanings: torchao 0.18 `quantization/quant_api.py`, the defaults of the classes that
# SGLang 0.5.6 `layers/torchao_utils.py` names.
# int4wo has zero points: torchao keeps them as floats, and here they are whole codes, so a weight
# can come out up to one step apart.
TORCHAO: Mapping[str, Scheme] = {
    "int8wo": SCHEMES["W8A16_CHANNEL"],
    "int8dq": SCHEMES["W8A8"],
    **{
        f"int4wo-{size}": SCHEMES["W4A16_ASYM"].with_group_size(size) for size in (32, 64, 128, 256)
    },
    "fp8wo": SCHEMES["FP8_W8A16"],
    "fp8dq-per_tensor": Scheme(Weights("fp8", "tensor"), Activations("fp8", "tensor")),
    "fp8dq-per_row": SCHEMES["FP8_DYNAMIC"],
}
# What a plain model is quantized to: by the first two as by SGLang 0.5.23 on CUDA
# (`layers/quantization/fp8.py`, `w8a8_fp8.py`).
ONLINE: Mapping[str, Scheme] = {
    "fp8": SCHEMES["FP8_DYNAMIC"],
    "w8a8_fp8": SCHEMES["FP8_DYNAMIC"],
    # what SGLang's `w8a8_int8.py` loads; it wants weights that are int8 already
    "w8a8_int8": SCHEMES["W8A8"],
    "fp8_block": SCHEMES["FP8_BLOCK"],
    "nvfp4": SCHEMES["NVFP4A16"],  # inputs stay in 16 bits: their global scale takes calibration
    "mxfp4": SCHEMES["MXFP4A16"],
    **TORCHAO,
}
OVERRIDES = ("w8a8_fp8", "w8a8_int8")  # on such weights, whatever the checkpoint says of the inputs
# An engine's name for a quantized checkpoint -> the formats it may be in, and where that leaves a
# choice, its weights. `marlin` is a kernel, not
# a format: by that name SGLang and vLLM run GPTQ and AWQ checkpoints with it (SGLang 0.5.23
# `gptq/gptq.py`, `awq/awq.py`:
# `override_quantization_method`). GPTQ that was saved in the kernel's own layout is no format that
# is read.
METHODS: Mapping[str, tuple[tuple[str, ...], str]] = {
    "compressed-tensors": (("compressed-tensors",), ""),
    "gptq": (("gptq",), ""),
    "gptq_marlin": (("gptq",), ""),
    "awq": (("awq",), ""),
    "awq_marlin": (("awq",), ""),
    "marlin": (("gptq", "awq"), ""),
    "modelopt": (("modelopt",), ""),
    "modelopt_fp8": (("modelopt",), "fp8"),
    "modelopt_fp4": (("modelopt",), "fp4"),
    "modelopt_mixed": (("modelopt",), "mixed"),
    "fp8": (("fp8_block",), ""),
    "fp8_block": (("fp8_block",), ""),
    "mxfp4": (("mxfp4",), ""),
    "torchao": (("torchao",), ""),
}


def schemes_to_run(
    checkpoint: Checkpoint, layout: Layout | None, quantization: str | None
) -> dict[str, Scheme]:
    """Return the scheme of each quantized linear layer, by its name in the checkpoint, as it will
    run.

    Args:
        layout: how ``checkpoint`` is quantized; None for a plain one.
        quantization: for a plain model a name in `ONLINE`. A quantized one needs none; it may name
            the method or the scheme that is there, or one
            of `OVERRIDES` where all weights are 8 bits with one scale a row or matrix, whose inputs
            are then rounded per token.
    Raises: UsageError, for an unknown name or one that contradicts the checkpoint;
        CheckpointRefused, when no layer can be quantized.
    """
    # without any, the KV cache alone is quantized
    quantized = layout is not None and bool(layout.modules)
    name = (
        None
        if quantization is None
        else _known(
            quantization,
            [*ONLINE, *METHODS],
            suggested=[*METHODS, *OVERRIDES] if quantized else ONLINE,
        )
    )
    if layout is not None and quantized:
        return _of_quantized(checkpoint, layout, name)
    if name is None:
        return {}
    if name not in ONLINE:
        hint = f"leave it out, or quantize while loading with one of {', '.join(ONLINE)}"
        raise UsageError(
            "E_QUANTIZATION",
            f"`{name}` is for checkpoints quantized with it, and {checkpoint.path} is not "
            "quantized",
            hint=hint,
        )
    scheme = ONLINE[name]
    schemes = {layer: scheme for layer, reason in _candidates(checkpoint, scheme) if not reason}
    if not schemes:
        hint = (
            "; ".join(left_plain(checkpoint, layout, name))
            or "output heads, routers, other towers and Conv1D layers stay in 16 bits"
        )
        raise CheckpointRefused(
            "E_NOTHING_TO_DO", f"{checkpoint.path} has no layer that `{name}` quantizes", hint=hint
        )
    return schemes


def left_plain(
    checkpoint: Checkpoint, layout: Layout | None, quantization: str | None
) -> tuple[str, ...]:
    """Return one line for each reason why layers stay in 16 bits that ``quantization`` is for;
    empty for a quantized checkpoint.
    """
    if (layout is not None and layout.modules) or quantization is None:
        return ()
    left: dict[str, list[str]] = {}
    for layer, reason in _candidates(checkpoint, ONLINE[_known(quantization, ONLINE)]):
        if reason:
            left.setdefault(reason, []).append(layer)
    return tuple(
        f"{reason}, which stay in 16 bits: {_several(layers)}" for reason, layers in left.items()
    )


def flag_named(quantization: str | None, torchao_config: str | None) -> str | None:
    """Return the name for `schemes_to_run` that ``--quantization`` and ``--torchao-config`` give;
    None when neither is given.

    Raises: UsageError, for both at once and for a ``torchao_config`` that is no name of torchao's.
    """
    if not torchao_config:
        return quantization and quantization.lower()
    if quantization is not None:
        message = (
            f"--quantization {quantization} and --torchao-config {torchao_config} cannot both be "
            "meant"
        )
        raise UsageError(
            "E_QUANTIZATION",
            message,
            hint="give one of them: --quantization takes torchao's names too",
        )
    return _known(torchao_config, TORCHAO, "torchao config")


def _known(
    name: str,
    known: Iterable[str],
    kind: str = "quantization",
    suggested: Iterable[str] | None = None,
) -> str:
    if str(name).lower() not in (known := list(known)):
        names = list(suggested or known)
        raise UsageError(
            "E_QUANTIZATION",
            f"unknown {kind} `{name}`",
            hint=nearest(str(name), names) or f"one of {', '.join(names)}",
        )
    return name.lower()


def _candidates(checkpoint: Checkpoint, scheme: Scheme) -> Iterator[tuple[str, str]]:
    """Yield the layers that are quantized unless something is in the way, and what that is."""
    group = scheme.weights.group_size or 1
    for tensor in checkpoint.tensors.values():
        layer = tensor.name.removesuffix(".weight")
        if skip_reason(checkpoint, layer):
            continue
        if is_linear(tensor):
            yield (
                layer,
                f"groups of {group} do not divide the inputs of layers"
                if tensor.shape[1] % group
                else "",
            )
        elif _is_stack(tensor):
            yield layer, "experts are stacked in tensors of three dimensions"


def _is_stack(tensor: TensorInfo) -> bool:
    return (
        len(tensor.shape) == 3
        and tensor.dtype in FLOAT_DTYPES
        and any("expert" in part or "moe" in part for part in tensor.name.split("."))
    )


def _several(names: list[str]) -> str:
    shown = ", ".join(f"`{name}`" for name in names[:2])
    return f"{shown} and {len(names) - 2} more" if len(names) > 2 else shown


def _of_quantized(checkpoint: Checkpoint, layout: Layout, name: str | None) -> dict[str, Scheme]:
    """Return the schemes of a checkpoint that is quantized, run with the flag ``name``."""
    schemes = {layer: module.scheme for layer, module in layout.modules.items()}
    formats = {scheme.weights.format for scheme in schemes.values()}
    kind = "mixed" if len(formats) > 1 else "".join(formats)
    said = (checkpoint.quantization_config or {}).get("quant_method")
    found = said.lower() if isinstance(said, str) else layout.format
    if name is None or name == found:
        return schemes
    meant, weights = METHODS.get(name, ((), ""))
    if layout.format in meant and weights in ("", kind):
        return schemes
    if name in ONLINE and all(scheme == ONLINE[name] for scheme in schemes.values()):
        return schemes
    if name in OVERRIDES and all(
        _per_channel(scheme.weights) == ONLINE[name].weights for scheme in schemes.values()
    ):
        return {
            layer: replace(scheme, activations=ONLINE[name].activations)
            for layer, scheme in schemes.items()
        }
    there = ", ".join(sorted({scheme.name for scheme in schemes.values()}))
    message = (
        f"`{name}` does not fit {checkpoint.path}, which is quantized already: `{found}`, {there}"
    )
    raise UsageError(
        "E_QUANTIZATION",
        message,
        hint="leave the flag out: how a checkpoint is quantized is read from it",
    )


def _per_channel(weights: Weights) -> Weights:
    return replace(weights, granularity="channel") if weights.granularity == "tensor" else weights
