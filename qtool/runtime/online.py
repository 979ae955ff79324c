"""The scheme of each linear layer, by checkpoint, ``--quantization`` and ``--torchao-config``."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace

from qtool.checkpoint import Checkpoint, TensorInfo
from qtool.checkpoint.model import FLOAT_DTYPES
from qtool.errors import CheckpointRefused, UsageError, nearest
from qtool.formats import Layout
from qtool.modules import is_linear, skip_reason
from qtool.scheme import SCHEMES, Activations, Scheme, Weights

# As in torchao 0.18 `quantization/quant_api.py`: the defaults of the classes that SGLang 0.5.6
# `layers/torchao_utils.py` names. int4wo has zero points: torchao keeps them as floats, and here
# they are integer codes, so a weight can differ by up to one step.
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
# What an unquantized model is quantized to; the first two as in SGLang 0.5.23 on CUDA
# (`layers/quantization/fp8.py`, `w8a8_fp8.py`).
ONLINE: Mapping[str, Scheme] = {
    "fp8": SCHEMES["FP8_DYNAMIC"],
    "w8a8_fp8": SCHEMES["FP8_DYNAMIC"],
    # as in SGLang's `w8a8_int8.py`, which loads only weights that are int8 already
    "w8a8_int8": SCHEMES["W8A8"],
    "fp8_block": SCHEMES["FP8_BLOCK"],
    "nvfp4": SCHEMES["NVFP4A16"],  # inputs stay in 16 bits: their global scale takes calibration
    "mxfp4": SCHEMES["MXFP4A16"],
    "bitsandbytes": SCHEMES["NF4"],  # as in SGLang, which quantizes scales too where a config says
    **TORCHAO,
}
# these also round the inputs of a checkpoint with such weights, whatever its config says
OVERRIDES = ("w8a8_fp8", "w8a8_int8")
# An engine's name for a quantized checkpoint -> the formats it may have and, where these leave a
# choice, the format of its weights. `marlin` is a kernel, not a format: by that name SGLang and
# vLLM run GPTQ and AWQ checkpoints with it (SGLang 0.5.23 `gptq/gptq.py`, `awq/awq.py`:
# `override_quantization_method`). qtool does not read GPTQ saved in the kernel's own layout.
METHODS: Mapping[str, tuple[tuple[str, ...], str]] = {
    "compressed-tensors": (("compressed-tensors",), ""),
    "gptq": (("gptq",), ""),
    "gptq_marlin": (("gptq",), ""),
    "awq": (("awq",), ""),
    "awq_marlin": (("awq",), ""),
    "marlin": (("gptq", "awq"), ""),
    "auto-round": (("gptq", "awq"), ""),
    "inc": (("gptq", "awq"), ""),
    "modelopt": (("modelopt",), ""),
    "modelopt_fp8": (("modelopt",), "fp8"),
    "modelopt_fp4": (("modelopt",), "fp4"),
    "modelopt_mixed": (("modelopt",), "mixed"),
    "fp8": (("fp8_block",), ""),
    "fp8_block": (("fp8_block",), ""),
    "quark": (("quark",), ""),
    "mxfp4": (("mxfp4",), ""),
    "torchao": (("torchao",), ""),
    "bitsandbytes": (("bitsandbytes",), ""),
    "gguf": (("gguf",), ""),
}


def schemes_to_run(
    checkpoint: Checkpoint, layout: Layout | None, quantization: str | None
) -> dict[str, Scheme]:
    """Return the scheme that each quantized linear layer runs in, by its name in the checkpoint.

    Args:
        checkpoint: what is loaded.
        layout: how ``checkpoint`` is quantized; None for an unquantized one.
        quantization: for an unquantized model a name in `ONLINE`. A quantized one needs none; it
            may name the method or scheme of the checkpoint. One of `OVERRIDES` rounds the inputs
            per token, if all weights have 8 bits and one scale for each row or matrix.
    Raises: UsageError, for an unknown name or one that contradicts the checkpoint;
        CheckpointRefused, when no layer can be quantized.
    """
    # without modules only the KV cache is quantized
    if layout is not None and layout.modules:
        return _schemes_of_quantized(checkpoint, layout, quantization)
    if quantization is None:
        return {}
    name = _known(quantization, [*ONLINE, *METHODS], suggested=ONLINE)
    if name == "gguf" and checkpoint.gguf_file:  # of floats alone
        return {}
    if name not in ONLINE:
        raise UsageError(
            "E_QUANTIZATION",
            f"`{name}` is for checkpoints quantized with it, and {checkpoint.source} is not "
            "quantized",
            hint=f"leave it out, or quantize while loading with one of {', '.join(ONLINE)}",
        )
    scheme = ONLINE[name]
    schemes = {layer: scheme for layer, reason in _candidates(checkpoint, scheme) if not reason}
    if not schemes:
        reasons = "; ".join(skip_reasons(checkpoint, layout, name))
        raise CheckpointRefused(
            "E_NOTHING_TO_DO",
            f"{checkpoint.source} has no layer that `{name}` quantizes",
            hint=reasons or "output heads, routers, other towers and Conv1D layers stay in 16 bits",
        )
    return schemes


def skip_reasons(
    checkpoint: Checkpoint, layout: Layout | None, quantization: str | None
) -> tuple[str, ...]:
    """Return why ``quantization`` leaves layers in 16 bits, one line for each reason.

    Empty for a quantized checkpoint.
    """
    if (layout is not None and layout.modules) or quantization in (None, "gguf"):
        return ()
    skipped: dict[str, list[str]] = {}
    for layer, reason in _candidates(checkpoint, ONLINE[_known(quantization, ONLINE)]):
        if reason:
            skipped.setdefault(reason, []).append(layer)
    return tuple(
        f"{reason}, which stay in 16 bits: {_shorten(layers)}" for reason, layers in skipped.items()
    )


def flag_named(quantization: str | None, torchao_config: str | None) -> str | None:
    """Return the name for `schemes_to_run` that the two flags give; None without either.

    Raises: UsageError, for both at once and for an unknown ``torchao_config``.
    """
    if not torchao_config:
        return quantization and quantization.lower()
    if quantization is not None:
        raise UsageError(
            "E_QUANTIZATION",
            f"--quantization {quantization} and --torchao-config {torchao_config} exclude each "
            "other",
            hint="give one of them: --quantization also takes the names of torchao",
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
    """Yield the linear layers, and why ``scheme`` cannot quantize each; empty where it can."""
    group = scheme.weights.group_size or 1
    for tensor in checkpoint.tensors.values():
        layer = tensor.name.removesuffix(".weight")
        if skip_reason(checkpoint, layer):
            continue
        if is_linear(tensor):
            reason = f"groups of {group} do not divide the inputs of layers"
            yield layer, reason if tensor.shape[1] % group else ""
        elif _is_stack(tensor):
            yield layer, "experts are stacked in tensors of three dimensions"


def _is_stack(tensor: TensorInfo) -> bool:
    return (
        len(tensor.shape) == 3
        and tensor.dtype in FLOAT_DTYPES
        and any("expert" in part or "moe" in part for part in tensor.name.split("."))
    )


def _shorten(names: list[str]) -> str:
    shown = ", ".join(f"`{name}`" for name in names[:2])
    return f"{shown} and {len(names) - 2} more" if len(names) > 2 else shown


def _schemes_of_quantized(
    checkpoint: Checkpoint, layout: Layout, quantization: str | None
) -> dict[str, Scheme]:
    """Return the schemes of a quantized checkpoint, run with the flag ``quantization``."""
    schemes = {layer: module.scheme for layer, module in layout.modules.items()}
    if quantization is None:
        return schemes
    name = _known(quantization, [*ONLINE, *METHODS], suggested=[*METHODS, *OVERRIDES])
    found = _declared_method(checkpoint, layout)
    if name == found or _describes(name, layout.format, schemes.values()):
        return schemes
    if name in OVERRIDES and _has_weights(schemes.values(), ONLINE[name].weights):
        activations = ONLINE[name].activations
        return {
            layer: replace(scheme, activations=activations) for layer, scheme in schemes.items()
        }
    found_schemes = ", ".join(sorted({scheme.name for scheme in schemes.values()}))
    raise UsageError(
        "E_QUANTIZATION",
        f"`{name}` does not fit {checkpoint.source}, which is quantized already: `{found}`, "
        f"{found_schemes}",
        hint="leave the flag out: qtool reads from the checkpoint how it is quantized",
    )


def _declared_method(checkpoint: Checkpoint, layout: Layout) -> str:
    """Return how the config calls the quantization method, or else the name of the format."""
    method = (checkpoint.quantization_config or {}).get("quant_method")
    return method.lower() if isinstance(method, str) else layout.format


def _describes(name: str, format: str, schemes: Collection[Scheme]) -> bool:
    """Whether ``name`` is another name for a checkpoint in ``format`` with ``schemes``."""
    if name in METHODS:
        formats, weights = METHODS[name]
        found = {scheme.weights.format for scheme in schemes}
        kind = "mixed" if len(found) > 1 else "".join(found)
        if format in formats and weights in ("", kind):
            return True
    return name in ONLINE and all(scheme == ONLINE[name] for scheme in schemes)


def _has_weights(schemes: Iterable[Scheme], weights: Weights) -> bool:
    """Whether all ``schemes`` have ``weights``, one scale for a whole matrix included."""
    return all(_per_channel(scheme.weights) == weights for scheme in schemes)


def _per_channel(weights: Weights) -> Weights:
    return replace(weights, granularity="channel") if weights.granularity == "tensor" else weights
