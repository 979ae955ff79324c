"""Decides what each linear layer becomes in another format."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import replace

from qtool.checkpoint import TensorInfo
from qtool.conversion.layers import Layer, new_weight
from qtool.conversion.request import ConversionRequest
from qtool.formats import QuantizedModule
from qtool.formats.packing import TORCH_DTYPES
from qtool.formats.stored_layer import Source, outline_value
from qtool.modules import is_embedding, is_head, is_linear, skip_reason
from qtool.scheme import SCHEMES, Scheme


def plan_layers(
    request: ConversionRequest, unquantized: Mapping[str, TensorInfo]
) -> tuple[Layer, ...]:
    """Return what every quantized layer becomes, or every linear one of an unquantized model.

    Layers that are alike share one decision.
    Raises: CheckpointRefused, when the target cannot hold a layer.
    """
    known: dict[Hashable, Layer] = {}
    layers = []
    for found in _layers_to_convert(request, unquantized):
        source = Source.of(request.checkpoint, found)
        key = source.dedup_key, _is_table(request, source)
        if key not in known:
            known[key] = _plan_layer(request, source)
        layers.append(_plan_like(known[key], source, request.to))
    return tuple(layers)


def unquantized_linears(request: ConversionRequest) -> dict[str, TensorInfo]:
    """Return the weights of the linear layers that the source does not quantize, by layer."""
    owned = request.layout.owned if request.layout else frozenset()
    return {
        tensor.name.removesuffix(".weight"): tensor
        for tensor in request.checkpoint.tensors.values()
        if is_linear(tensor) and tensor.name not in owned
    }


def _layers_to_convert(
    request: ConversionRequest, unquantized: Mapping[str, TensorInfo]
) -> Iterable[QuantizedModule | TensorInfo]:
    if request.layout:
        return request.layout.modules.values()
    if request.dequantizes:
        return ()
    return [
        tensor for name, tensor in unquantized.items() if not skip_reason(request.checkpoint, name)
    ]


def _plan_layer(request: ConversionRequest, source: Source) -> Layer:
    """Return the first candidate that the format holds."""
    if request.dequantizes or _is_table(request, source):
        return Layer(source, target=None, rounded=False)
    value = outline_value(request.layout, source)
    dtype = TORCH_DTYPES[request.dtype]
    reasons = []
    for scheme, rounded in _candidates(request, source):
        target = _target(source, scheme, request.to, rounded=rounded)
        weight = new_weight(target, value, rounded=rounded, dtype=dtype)
        reason = _no_rounding_reason(target) if rounded else None
        reason = reason or request.format.unsupported_reason(target, weight)
        if reason is None:
            return Layer(source, target, rounded)
        reasons.append(reason)
    hint = "--requantize rounds such layers to the nearest scheme that the format holds"
    if request.requantize:
        hint = "choose another --scheme" if request.scheme else "convert to another format"
    raise request.cannot_hold(f"`{source.name}`: {reasons[0]}", hint)


def _is_table(request: ConversionRequest, source: Source) -> bool:
    """Whether ``source`` is the embeddings or the head of a GGUF file: these are always quantized
    there, and engines have them in 16 bits.
    """
    if not request.checkpoint.gguf_file or request.to == "gguf":
        return False
    return is_embedding(source.name) or is_head(source.name)


def _plan_like(known: Layer, source: Source, to: str) -> Layer:
    """Return what ``source`` becomes, which has the dedup key of ``known``."""
    if known.target is None:
        return Layer(source, target=None, rounded=False)
    target = _target(source, known.target.scheme, to, rounded=known.rounded)
    return Layer(source, target, known.rounded)


def _candidates(request: ConversionRequest, source: Source) -> Iterator[tuple[Scheme, bool]]:
    """Yield (scheme, whether weights are rounded to it), the most faithful first."""
    own = source.module.scheme if source.module else None
    if own and request.scheme in (None, own):
        yield own, False
    if not request.requantize:
        return
    if own and request.scheme is None:
        # zero points instead of GGUF's minima
        own = replace(own, weights=replace(own.weights, offset=False))
        weights_only = Scheme(own.weights)
        keeps_activations = not (own.activations and own.activations.needs_data)
        yield weights_only, False
        yield (own if keeps_activations else weights_only), True
    for fallback in _fallbacks(request, own):
        yield from _rounded_to(fallback, own, keep_groups=request.scheme is None)


def _fallbacks(request: ConversionRequest, own: Scheme | None) -> list[Scheme]:
    """Return the schemes to round to: the nearest first, and those with fewer bits last."""
    if request.scheme:
        return [request.scheme]
    bits = own.weights.bits if own else 16

    def distance(scheme: Scheme) -> tuple[bool, int]:
        return scheme.weights.bits < bits, abs(scheme.weights.bits - bits)

    return sorted((SCHEMES[name] for name in request.format.fallbacks()), key=distance)


def _rounded_to(
    fallback: Scheme, own: Scheme | None, *, keep_groups: bool
) -> Iterator[tuple[Scheme, bool]]:
    """Yield ``fallback``, before it with the group size of the source where that fits."""
    if own and own.weights == fallback.weights:
        yield fallback, False
    group_size = own.weights.group_size if own and keep_groups else None
    has_groups = fallback.weights.group_size and fallback.weights.scale == "float"
    if group_size and has_groups:
        yield fallback.with_group_size(group_size), True
    yield fallback, True


def _target(source: Source, scheme: Scheme, to: str, *, rounded: bool) -> QuantizedModule:
    variant = to if to.startswith("gptq") else ""
    if source.module is None:
        rows, columns = source.shape
        return QuantizedModule(source.name, scheme, (rows, columns), {}, variant)
    tensors = dict(source.tensors)
    if rounded:
        tensors.pop("pre_quant_scale", None)  # multiplied into the weight that is rounded
    return replace(
        source.module,
        scheme=scheme,
        tensors=tensors,
        variant=variant,
        act_order=source.g_idx is not None and not rounded,
    )


def _no_rounding_reason(module: QuantizedModule) -> str | None:
    """Return why weights cannot be rounded to the scheme of ``module``; None when they can."""
    weights = module.scheme.weights
    columns = module.shape[1]
    if weights.group_size and columns % weights.group_size:
        return f"group_size: {weights.group_size} does not divide {columns} inputs"
    if weights.scale == "e4m3":
        return (
            "scale: layers that engines fuse must share NVFP4's second scale; `qtool quantize` "
            "with `nvfp4a16` sees to that"
        )
    return None
