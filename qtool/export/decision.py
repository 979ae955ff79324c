"""Decide what each tensor of a checkpoint becomes in another format, from headers, configs and ``g_idx``, and refuse what the format cannot hold."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from qtool.checkpoint import Checkpoint, TensorInfo
from qtool.checkpoint.shards import TensorSpec
from qtool.errors import CheckpointRefused, UsageError
from qtool.export.layers import Layer, Write, format_of, new_weight, read_value, writes_of
from qtool.export.targets import PLAIN
from qtool.formats import Format, Layout, QuantizedModule, detect
from qtool.formats.packing import TORCH_DTYPES
from qtool.plan import is_linear, why_plain
from qtool.scheme import SCHEMES, Scheme
from qtool.weight import QuantizedWeight

CONFIG_DTYPES = {"BF16": "bfloat16", "F16": "float16"}
CACHE_SCALE = re.compile(r"(.*?)(?:\.attn)?\.(?:(?:[kvq]_proj\.)?([kvq])_scale|([kv])_proj\.output_scale|kv_scale)")
DROPPED_IN_CONFIG = ("quantization_config", "compression_config")


@dataclass(frozen=True)
class Conversion:
    """All that is decided before anything is written.

    ``copies``: the tensors that are no part of a layer. ``dtype``: of plain weights. ``files``: JSON files by name.
    """

    checkpoint: Checkpoint
    layout: Layout | None
    to: str
    layers: tuple[Layer, ...]
    copies: tuple[Write, ...]
    files: Mapping[str, Mapping[str, Any]]
    dtype: str
    notes: tuple[str, ...]

    @cached_property
    def steps(self) -> tuple[tuple[Layer | None, tuple[Write, ...]], ...]:
        """What is done, in the order of the source: a layer and all it writes, or no layer and what is copied or cast."""
        layers = {name: layer for layer in self.layers for name in _tensor_names(layer.source)}
        copies: dict[str, list[Write]] = {}
        for write in self.copies:
            if write.copied:
                copies.setdefault(write.copied.name, []).append(write)
        steps: list[tuple[Layer | None, tuple[Write, ...]]] = []
        begun: set[str] = set()
        for name in self.checkpoint.tensors:
            layer = layers.get(name)
            if layer and layer.source.name not in begun:
                begun.add(layer.source.name)
                steps.append((layer, writes_of(self.checkpoint, self.layout, layer, self.to, self.dtype)))
            if name in copies:
                steps.append((None, tuple(copies[name])))
        return tuple(steps)

    @property
    def specs(self) -> Iterator[TensorSpec]:
        """Every tensor of the result."""
        return (write.spec for _, writes in self.steps for write in writes)


def decide(checkpoint: Checkpoint, to: str, *, requantize: bool, scheme: Scheme | None) -> Conversion:
    """Decide what ``checkpoint`` becomes in the format ``to``; with ``requantize`` what that cannot hold is rounded, to ``scheme`` if given.

    Raises: CheckpointRefused, naming the layer and the constraint, when the format cannot hold it; UsageError, when nothing is quantized.
    """
    layout = detect(checkpoint)
    if layout and layout.rotates_inputs:
        raise cannot_hold(to, "rotations: inputs are rotated at run time (QuIP, SpinQuant R3/R4)", "quantize the original again")
    if layout is None and to not in PLAIN and not scheme:
        hint = "`--requantize --scheme FP8_BLOCK` rounds it to nearest; `qtool quantize` has better methods"
        raise UsageError("E_NOT_QUANTIZED", f"{checkpoint.path} is not quantized, so there is nothing to convert", hint=hint)
    dtype = PLAIN.get(to) or _model_dtype(checkpoint)
    linears = _plain_linears(checkpoint, layout)
    layers = [_decided(checkpoint, layout, to, source, scheme, requantize, dtype) for source in (layout.modules.values() if layout else ())]
    if layout is None and to not in PLAIN:
        sources = [tensor for name, tensor in linears.items() if not why_plain(checkpoint, name)]
        layers = [_decided(checkpoint, layout, to, source, scheme, requantize, dtype) for source in sources]
    copies, dropped = _copies(checkpoint, layout, to, layers, requantize)
    notes = [f"{dropped} scales of the KV cache are left out: there is no place for them in {to}"] if dropped else []
    targets = [layer.target for layer in layers if layer.target]
    if rounded := Counter(layer.target.scheme.name for layer in layers if layer.target and layer.rounded):
        notes.append(f"rounded to nearest: {', '.join(f'{count} layers to {name}' for name, count in rounded.items())}")
    if to == "compressed-tensors" and any(module.act_order for module in targets):
        notes.append("act-order: compressed-tensors 0.19 and vLLM 0.33 refuse a g_idx, SGLang 0.5 takes it; --to gptq keeps it for all")
    config = {key: value for key, value in checkpoint.config.items() if key not in DROPPED_IN_CONFIG}
    for key in ("text_config", "llm_config"):
        if isinstance(config.get(key), Mapping):
            config[key] = {inner: value for inner, value in config[key].items() if inner not in DROPPED_IN_CONFIG}
    if to in PLAIN:
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = CONFIG_DTYPES[dtype]
        return Conversion(checkpoint, layout, to, tuple(layers), tuple(copies), {"config.json": config}, dtype, tuple(notes))
    names = {module.name for module in targets}
    left = [name for name in linears if name not in names]
    if all(name.rpartition(".")[2] != "lm_head" for name in (*left, *names)):
        left.append("lm_head")  # tied to the embeddings, and a linear layer to every engine
    kv_cache = layout.kv_cache if layout and not dropped else None
    files = format_of(to).settings(targets, left, kv_cache)
    files["config.json"] = {**config, **files["config.json"]}
    return Conversion(checkpoint, layout, to, tuple(layers), tuple(copies), files, dtype, tuple(notes))


def cannot_hold(to: str, constraint: str, hint: str) -> CheckpointRefused:
    """Return the refusal of what a format has no way to say."""
    return CheckpointRefused("E_CANNOT_HOLD", f"{to} cannot hold this checkpoint: {constraint}", hint=hint)


def _decided(
    checkpoint: Checkpoint,
    layout: Layout | None,
    to: str,
    source: QuantizedModule | TensorInfo,
    scheme: Scheme | None,
    requantize: bool,
    dtype: str,
) -> Layer:
    """Return what ``source`` becomes: itself where the format holds it, else the first that the format holds of what it may be rounded to."""
    if to in PLAIN:
        return Layer(source, None, rounded=False)
    format, value = format_of(to), read_value(checkpoint, layout, source, meta=True)
    objections = []
    for candidate, rounded in _candidates(format, source, scheme, requantize):
        target = _target(source, candidate, to, value, rounded=rounded)
        weight = new_weight(target, value, rounded=rounded, dtype=TORCH_DTYPES[dtype])
        objection = (_no_rounding(target) if rounded else None) or format.objection(target, weight)
        if objection is None:
            return Layer(source, target, rounded)
        objections.append(objection)
    hint = (
        "choose another --scheme" if scheme else "" if requantize else "--requantize rounds such layers to the nearest scheme that the format holds"
    )
    raise cannot_hold(to, f"`{source.name}`: {objections[0]}", hint)


def _candidates(format: Format, source: QuantizedModule | TensorInfo, scheme: Scheme | None, requantize: bool) -> Iterator[tuple[Scheme, bool]]:
    """Yield (scheme, whether weights are rounded for it), the most faithful first."""
    own = source.scheme if isinstance(source, QuantizedModule) else None
    weights_only = Scheme(own.weights) if own else None
    if own and (scheme is None or scheme == own):
        yield own, False
    if not requantize:
        return
    if own and weights_only and not scheme:
        yield weights_only, False
        yield (own if not (own.activations and own.activations.needs_data) else weights_only), True
    bits, group_size = (own.weights.bits, own.weights.group_size) if own else (16, None)
    fallbacks = [scheme] if scheme else [SCHEMES[name] for name in format.fallbacks()]
    for fallback in sorted(fallbacks, key=lambda each: (each.weights.bits < bits, abs(each.weights.bits - bits))):
        if own and own.weights == fallback.weights:
            yield fallback, False
        if group_size and not scheme and fallback.weights.group_size and fallback.weights.scale == "float":
            yield fallback.with_group_size(group_size), True
        yield fallback, True


def _target(source: QuantizedModule | TensorInfo, scheme: Scheme, to: str, value: Any, *, rounded: bool) -> QuantizedModule:
    variant = to if to.startswith("gptq") else ""
    if isinstance(source, TensorInfo):
        rows, columns = source.shape
        return QuantizedModule(source.name.removesuffix(".weight"), scheme, (rows, columns), {}, variant)
    tensors = {suffix: tensor for suffix, tensor in source.tensors.items() if not (rounded and suffix == "pre_quant_scale")}
    act_order = not rounded and isinstance(value, QuantizedWeight) and value.perm is not None
    return replace(source, scheme=scheme, tensors=tensors, variant=variant, act_order=act_order)


def _no_rounding(module: QuantizedModule) -> str | None:
    """Return why the weights of ``module`` are not rounded to its scheme here; None when they are."""
    weights, columns = module.scheme.weights, module.shape[1]
    if weights.group_size and columns % weights.group_size:
        return f"group_size: {weights.group_size} does not divide {columns} inputs"
    if weights.scale == "e4m3":
        return "scale: layers that engines fuse must share NVFP4's second scale; `qtool quantize` with `nvfp4a16` sees to that"
    return None


def _copies(checkpoint: Checkpoint, layout: Layout | None, to: str, layers: list[Layer], may_drop: bool) -> tuple[list[Write], int]:
    """Return the tensors that are copied and what they become, and how many KV-cache scales have no place in ``to``."""
    changed = {name for layer in layers for name in _tensor_names(layer.source) if not name.endswith(".bias")}
    copies: list[Write] = []
    dropped = 0
    for name, tensor in checkpoint.tensors.items():
        if cache := CACHE_SCALE.fullmatch(name):
            attention, which = cache[1], cache[2] or cache[3] or "kv"
            places = [None if to in PLAIN else format_of(to).cache_scale(attention, letter, tensor.count) for letter in which]
            if None in places and to not in PLAIN and not may_drop:
                hint = "--requantize leaves them out"
                raise cannot_hold(to, f"`{name}`: kv-cache: there is no place for the {tensor.count} scale(s) of the KV cache", hint)
            dropped += None in places
            copies += [Write(TensorSpec(place[0], tensor.dtype, place[1]), tensor) for place in places if place]
        elif name not in changed:
            is_cast = to in PLAIN and tensor.dtype in PLAIN.values()
            copies.append(Write(TensorSpec(name, PLAIN[to] if is_cast else tensor.dtype, tensor.shape), tensor))
    if layout and layout.kv_cache not in (None, "fp8") and not dropped:
        raise cannot_hold(to, f"kv-cache: its scales are for {layout.kv_cache}, and only those for fp8 are converted", "quantize the original again")
    return copies, dropped


def _tensor_names(source: QuantizedModule | TensorInfo) -> list[str]:
    return [source.name] if isinstance(source, TensorInfo) else [tensor.name for tensor in source.tensors.values()]


def _plain_linears(checkpoint: Checkpoint, layout: Layout | None) -> dict[str, TensorInfo]:
    owned = layout.owned if layout else frozenset()
    return {tensor.name.removesuffix(".weight"): tensor for tensor in checkpoint.tensors.values() if is_linear(tensor) and tensor.name not in owned}


def _model_dtype(checkpoint: Checkpoint) -> str:
    """Return the dtype of most plain tensors, F16 or BF16 when there are any of these."""
    counts = Counter(tensor.dtype for tensor in checkpoint.tensors.values() if tensor.dtype in ("BF16", "F16", "F32") and len(tensor.shape) == 2)
    counts += Counter(tensor.dtype for tensor in checkpoint.tensors.values() if tensor.dtype in ("BF16", "F16"))
    return counts.most_common(1)[0][0] if counts else "BF16"
