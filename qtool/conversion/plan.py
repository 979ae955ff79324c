"""Decide what each tensor of a checkpoint becomes in another format, from headers, configs and
``g_idx``, and refuse what the format cannot hold.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from qtool.checkpoint import Checkpoint, TensorInfo
from qtool.checkpoint.shards import TensorSpec
from qtool.conversion.layers import (
    Layer,
    Write,
    dedup_key,
    format_of,
    new_weight,
    read_value,
    writes_like,
    writes_of,
)
from qtool.conversion.targets import PLAIN
from qtool.errors import CheckpointRefused, UsageError
from qtool.formats import PACKED_DTYPES, Format, Layout, QuantizedModule, detect
from qtool.formats.layout import PER_HEAD
from qtool.formats.packing import TORCH_DTYPES, permutation, read_tensor
from qtool.modules import is_linear, parse_cache_scale, skip_reason
from qtool.scheme import SCHEMES, Scheme

CONFIG_DTYPES = {"BF16": "bfloat16", "F16": "float16"}
HOLD_A_CACHE_ALONE = ("compressed-tensors", "modelopt")  # with no layer quantized
SCALE_ENDINGS = ("_scale_inv", "_scales", "_blocks", ".weight_scale", ".scales")
DROPPED_IN_CONFIG = ("quantization_config", "compression_config")


@dataclass(frozen=True)
class Conversion:
    """All that is decided before anything is written.

    ``copies``: the tensors that are no part of a layer. ``dtype``: of plain weights. ``files``:
        JSON files by name.
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
        """What is done, in the order of the source: a layer and all it writes, or no layer and what
        is copied or cast.
        """
        layers = {name: layer for layer in self.layers for name in _tensor_names(layer.source)}
        copies: dict[str, list[Write]] = {}
        for write in self.copies:
            if write.copied:
                copies.setdefault(write.copied.name, []).append(write)
        steps: list[tuple[Layer | None, tuple[Write, ...]]] = []
        begun: set[str] = set()
        known: dict[Hashable, tuple[Layer, tuple[Write, ...]]] = {}
        for name in self.checkpoint.tensors:
            layer = layers.get(name)
            if layer and layer.source.name not in begun:
                begun.add(layer.source.name)
                kind = dedup_key(
                    layer.source,
                    layer.target.act_order
                    if layer.target
                    else _is_scattered(self.checkpoint, layer.source),
                )
                if kind not in known:
                    known[kind] = (
                        layer,
                        writes_of(self.checkpoint, self.layout, layer, self.to, self.dtype),
                    )
                steps.append((layer, writes_like(*known[kind], layer)))
            if name in copies:
                steps.append((None, tuple(copies[name])))
        return tuple(steps)

    @property
    def specs(self) -> Iterator[TensorSpec]:
        """Every tensor of the result."""
        return (write.spec for _, writes in self.steps for write in writes)


@dataclass(frozen=True)
class ConversionRequest:
    """What was asked for: the format, and whether layers may be rounded, to ``scheme`` if given.
    ``dtype``: of plain weights.
    """

    checkpoint: Checkpoint
    layout: Layout | None
    to: str
    scheme: Scheme | None
    requantize: bool
    dtype: str


def plan_conversion(
    checkpoint: Checkpoint, to: str, *, requantize: bool, scheme: Scheme | None
) -> Conversion:
    """Decide what ``checkpoint`` becomes in the format ``to``; with ``requantize`` what that cannot
    hold is rounded, to ``scheme`` if given.

    Raises: CheckpointRefused, naming the layer and the constraint, when the format cannot hold it;
        UsageError, when nothing is quantized.
    """
    layout = detect(checkpoint)
    if layout and layout.rotates_inputs:
        raise cannot_hold(
            to,
            "rotations: inputs are rotated at run time (QuIP, SpinQuant R3/R4)",
            "quantize the original again",
        )
    if layout is None and to not in PLAIN and not scheme:
        hint = (
            "`--requantize --scheme FP8_BLOCK` rounds it to nearest; `qtool quantize` has better "
            "methods"
        )
        raise UsageError(
            "E_NOT_QUANTIZED",
            f"{checkpoint.path} is not quantized, so there is nothing to convert",
            hint=hint,
        )
    request = ConversionRequest(
        checkpoint, layout, to, scheme, requantize, PLAIN.get(to) or _model_dtype(checkpoint)
    )
    linears = _plain_linears(checkpoint, layout)
    layers = _layers(request, linears)
    copies, dropped = _copies(request, layers)
    targets = [layer.target for layer in layers if layer.target]
    if not targets and to not in (*PLAIN, *HOLD_A_CACHE_ALONE):
        raise cannot_hold(
            to,
            "layers: no layer is quantized, only the KV cache",
            f"{' and '.join(HOLD_A_CACHE_ALONE)} hold that",
        )
    config = _plain_config(checkpoint.config, CONFIG_DTYPES[request.dtype] if to in PLAIN else None)
    if to in PLAIN:
        files = {
            "config.json": {"dtype": CONFIG_DTYPES[request.dtype], **config}
            if "torch_dtype" not in config
            else config
        }
    else:
        kv_cache = layout.kv_cache if layout and not dropped else None
        if kv_cache and any(
            parse_cache_scale(write.spec.name) and len(write.spec.shape) == 3 for write in copies
        ):
            kv_cache += PER_HEAD
        files = format_of(to).quantization_config(targets, _left_plain(linears, targets), kv_cache)
        files["config.json"] = {**config, **files["config.json"]}
    return Conversion(
        checkpoint,
        layout,
        to,
        layers,
        copies,
        files,
        request.dtype,
        tuple(_notes(request, layers, dropped)),
    )


def _plain_config(config: Mapping[str, Any], dtype: str | None) -> dict[str, Any]:
    """Return ``config`` without a word of quantization, also where it is nested, and with ``dtype``
    wherever one is named.
    """
    plain: dict[str, Any] = {}
    for key, value in config.items():
        if key in ("text_config", "llm_config") and isinstance(value, Mapping):
            plain[key] = _plain_config(value, dtype)
        elif key not in DROPPED_IN_CONFIG:
            plain[key] = dtype if dtype and key in ("dtype", "torch_dtype") else value
    return plain


def _layers(request: ConversionRequest, linears: Mapping[str, TensorInfo]) -> tuple[Layer, ...]:
    """Decide about every quantized layer, or of a plain model every linear one; layers that are
    alike share one decision.
    """
    sources: Iterable[QuantizedModule | TensorInfo] = ()
    if request.layout:
        sources = request.layout.modules.values()
    elif request.to not in PLAIN:
        sources = [
            tensor for name, tensor in linears.items() if not skip_reason(request.checkpoint, name)
        ]
    known: dict[Hashable, Layer] = {}
    layers = []
    for source in sources:
        act_order = _is_scattered(request.checkpoint, source)
        kind = dedup_key(source, act_order)
        if kind not in known:
            known[kind] = _decided(request, source, act_order)
        like = known[kind]
        layers.append(
            Layer(
                source,
                like.target
                and _target(
                    source, like.target.scheme, request.to, act_order, rounded=like.rounded
                ),
                like.rounded,
            )
        )
    return tuple(layers)


def _left_plain(linears: Iterable[str], targets: Iterable[QuantizedModule]) -> list[str]:
    """Return the linear layers that are not quantized, and the output head also where it is the
    embedding matrix: engines see a layer there.
    """
    names = {module.name for module in targets}
    left = [name for name in linears if name not in names]
    return (
        left
        if any(name.rpartition(".")[2] == "lm_head" for name in (*left, *names))
        else [*left, "lm_head"]
    )


def _notes(request: ConversionRequest, layers: Iterable[Layer], dropped: int) -> Iterator[str]:
    if (
        request.layout
        and request.layout.kv_cache
        and request.to not in (*HOLD_A_CACHE_ALONE, "fp8_block")
        and not dropped
    ):
        yield (
            f"the KV cache was to be {request.layout.kv_cache}, without scales, and {request.to} "
            "does not say so"
        )
    if dropped:
        yield (
            f"{dropped} scales of the KV cache are left out: there is no place for them in "
            f"{request.to}"
        )
    if rounded := Counter(
        layer.target.scheme.name for layer in layers if layer.target and layer.rounded
    ):
        yield (
            "rounded to nearest: "
            f"{', '.join(f'{count} layers to {name}' for name, count in rounded.items())}"
        )
    inputs = Counter(
        (layer.source.scheme.activations, layer.target and layer.target.scheme.activations)
        for layer in layers
        if isinstance(layer.source, QuantizedModule)
    )
    for (before, after), count in inputs.items():
        if before != after:
            yield f"inputs of {count} layers: {before or '16 bits'} -> {after or '16 bits'}"
    if request.to == "compressed-tensors" and any(
        layer.target.act_order for layer in layers if layer.target
    ):
        yield (
            "act-order: compressed-tensors 0.19 and vLLM 0.33 refuse a g_idx, SGLang 0.5 takes "
            "it; --to gptq keeps it for all"
        )


def cannot_hold(to: str, constraint: str, hint: str) -> CheckpointRefused:
    """Return the refusal of what a format has no way to say."""
    return CheckpointRefused(
        "E_CANNOT_HOLD", f"{to} cannot hold this checkpoint: {constraint}", hint=hint
    )


def _decided(
    request: ConversionRequest, source: QuantizedModule | TensorInfo, act_order: bool
) -> Layer:
    """Return what ``source`` becomes: itself where the format holds it, else the first that the
    format holds of what it may be rounded to.
    """
    if request.to in PLAIN:
        return Layer(source, None, rounded=False)
    format, value = (
        format_of(request.to),
        read_value(request.checkpoint, request.layout, source, meta=True),
    )
    objections = []
    for candidate, rounded in _candidates(format, source, request):
        target = _target(source, candidate, request.to, act_order, rounded=rounded)
        weight = new_weight(target, value, rounded=rounded, dtype=TORCH_DTYPES[request.dtype])
        objection = (_no_rounding(target) if rounded else None) or format.unsupported_reason(
            target, weight
        )
        if objection is None:
            return Layer(source, target, rounded)
        objections.append(objection)
    hint = "--requantize rounds such layers to the nearest scheme that the format holds"
    if request.requantize:
        hint = "choose another --scheme" if request.scheme else "convert to another format"
    raise cannot_hold(request.to, f"`{source.name.removesuffix('.weight')}`: {objections[0]}", hint)


def _candidates(
    format: Format, source: QuantizedModule | TensorInfo, request: ConversionRequest
) -> Iterator[tuple[Scheme, bool]]:
    """Yield (scheme, whether weights are rounded for it), the most faithful first."""
    scheme = request.scheme
    own = source.scheme if isinstance(source, QuantizedModule) else None
    weights_only = Scheme(own.weights) if own else None
    if own and (scheme is None or scheme == own):
        yield own, False
    if not request.requantize:
        return
    if own and weights_only and not scheme:
        yield weights_only, False
        yield (own if not (own.activations and own.activations.needs_data) else weights_only), True
    bits, group_size = (own.weights.bits, own.weights.group_size) if own else (16, None)
    fallbacks = [scheme] if scheme else [SCHEMES[name] for name in format.fallbacks()]
    for fallback in sorted(
        fallbacks, key=lambda each: (each.weights.bits < bits, abs(each.weights.bits - bits))
    ):
        if own and own.weights == fallback.weights:
            yield fallback, False
        if (
            group_size
            and not scheme
            and fallback.weights.group_size
            and fallback.weights.scale == "float"
        ):
            yield fallback.with_group_size(group_size), True
        yield fallback, True


def _target(
    source: QuantizedModule | TensorInfo, scheme: Scheme, to: str, act_order: bool, *, rounded: bool
) -> QuantizedModule:
    variant = to if to.startswith("gptq") else ""
    if isinstance(source, TensorInfo):
        rows, columns = source.shape
        return QuantizedModule(
            source.name.removesuffix(".weight"), scheme, (rows, columns), {}, variant
        )
    tensors = {
        suffix: tensor
        for suffix, tensor in source.tensors.items()
        if not (rounded and suffix == "pre_quant_scale")
    }
    return replace(
        source, scheme=scheme, tensors=tensors, variant=variant, act_order=act_order and not rounded
    )


def _is_scattered(checkpoint: Checkpoint, source: QuantizedModule | TensorInfo) -> bool:
    """Whether act-order has scattered the groups of ``source`` over its inputs: flags lie, so
    ``g_idx`` is read.
    """
    if isinstance(source, TensorInfo):
        return False
    g_idx = next(
        (
            tensor
            for suffix, tensor in source.tensors.items()
            if suffix in ("g_idx", "weight_g_idx")
        ),
        None,
    )
    weights, columns = source.scheme.weights, source.shape[1]
    return (
        g_idx is not None
        and permutation(
            read_tensor(checkpoint, g_idx.name),
            weights.scale_count(1, columns),
            weights.group_size or columns,
        )
        is not None
    )


def _no_rounding(module: QuantizedModule) -> str | None:
    """Return why the weights of ``module`` are not rounded to its scheme here; None when
    they are.
    """
    weights, columns = module.scheme.weights, module.shape[1]
    if weights.group_size and columns % weights.group_size:
        return f"group_size: {weights.group_size} does not divide {columns} inputs"
    if weights.scale == "e4m3":
        return (
            "scale: layers that engines fuse must share NVFP4's second scale; `qtool quantize` "
            "with `nvfp4a16` sees to that"
        )
    return None


def _copies(request: ConversionRequest, layers: Iterable[Layer]) -> tuple[tuple[Write, ...], int]:
    """Return the tensors that are copied and what they become, and how many KV-cache scales have no
    place in the format.
    """
    to, layout = request.to, request.layout
    changed = {
        name
        for layer in layers
        for name in _tensor_names(layer.source)
        if not name.endswith(".bias")
    }
    copies: list[Write] = []
    dropped = 0
    cast_dtypes = {*PLAIN.values(), _model_dtype(request.checkpoint)} if to in PLAIN else set()
    for name, tensor in request.checkpoint.tensors.items():
        if cache := parse_cache_scale(name):
            places = [
                None if to in PLAIN else format_of(to).cache_scale(cache.module, kind, tensor.count)
                for kind in cache.kind
            ]
            if None in places and to not in PLAIN and not request.requantize:
                hint = "--requantize leaves them out"
                raise cannot_hold(
                    to,
                    f"`{name}`: kv-cache: there is no place for the {tensor.count} scale(s) of "
                    "the KV cache",
                    hint,
                )
            dropped += None in places
            copies += [
                Write(TensorSpec(place[0], tensor.dtype, place[1]), tensor)
                for place in places
                if place
            ]
        elif name not in changed:
            if tensor.dtype in PACKED_DTYPES or name.endswith(SCALE_ENDINGS):
                message = (
                    f"layout: `{name}` holds {tensor.dtype} codes or scales of no layer that "
                    "qtool reads"
                )
                raise cannot_hold(
                    to, message, "`qtool inspect` lists what was read; quantize the original again"
                )
            copies.append(
                Write(
                    TensorSpec(
                        name,
                        PLAIN[to] if tensor.dtype in cast_dtypes else tensor.dtype,
                        tensor.shape,
                    ),
                    tensor,
                )
            )
    if layout and layout.kv_cache not in (None, "fp8") and not dropped:
        raise cannot_hold(
            to,
            f"kv-cache: its scales are for {layout.kv_cache}, and only those for fp8 are converted",
            "quantize the original again",
        )
    return tuple(copies), dropped


def _tensor_names(source: QuantizedModule | TensorInfo) -> list[str]:
    return (
        [source.name]
        if isinstance(source, TensorInfo)
        else [tensor.name for tensor in source.tensors.values()]
    )


def _plain_linears(checkpoint: Checkpoint, layout: Layout | None) -> dict[str, TensorInfo]:
    owned = layout.owned if layout else frozenset()
    return {
        tensor.name.removesuffix(".weight"): tensor
        for tensor in checkpoint.tensors.values()
        if is_linear(tensor) and tensor.name not in owned
    }


def _model_dtype(checkpoint: Checkpoint) -> str:
    """Return the dtype of most plain tensors; small ones count for BF16 and F16 alone, as routers
    and norms may be F32 in any model.
    """
    counts = Counter(
        tensor.dtype
        for tensor in checkpoint.tensors.values()
        if tensor.dtype in ("BF16", "F16", "F32") and len(tensor.shape) == 2
    )
    counts += Counter(
        tensor.dtype for tensor in checkpoint.tensors.values() if tensor.dtype in ("BF16", "F16")
    )
    return counts.most_common(1)[0][0] if counts else "BF16"
