"""The plan of a conversion: what every tensor becomes, decided before anything is written."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from qtool.architecture import map_names
from qtool.checkpoint.shards import TensorSpec
from qtool.conversion.copies import Copies, plan_copies
from qtool.conversion.layer_plan import plan_layers, unquantized_linears
from qtool.conversion.layers import Layer, Step, Write, writes_like, writes_of
from qtool.conversion.request import ConversionRequest
from qtool.conversion.targets import UNQUANTIZED
from qtool.errors import CheckpointRefused
from qtool.formats import Layout, QuantizedModule
from qtool.formats.layout import PER_HEAD
from qtool.modules import has_key_scales, last_part
from qtool.name_map import NameMap, names_from_headers

CONFIG_DTYPES = {"BF16": "bfloat16", "F16": "float16"}
HOLD_A_CACHE_ALONE = ("compressed-tensors", "modelopt")  # with no layer quantized
DROPPED_IN_CONFIG = ("quantization_config", "compression_config")


@dataclass(frozen=True)
class ConversionPlan:
    """All that is decided before anything is written; the conversion follows it."""

    request: ConversionRequest
    layers: tuple[Layer, ...]
    """The layers that are converted."""
    steps: tuple[Step, ...]
    """What is done, in the order of the source."""
    files: Mapping[str, Mapping[str, object]]
    """JSON files by name."""
    notes: tuple[str, ...]
    """What the user should know."""

    @property
    def specs(self) -> Iterator[TensorSpec]:
        """Every tensor of the result."""
        return (write.spec for step in self.steps for write in step.writes)

    @cached_property
    def targets(self) -> Mapping[str, QuantizedModule]:
        """The quantized layers of the result, by name."""
        return {layer.target.name: layer.target for layer in self.layers if layer.target}

    @property
    def target_layout(self) -> Layout:
        """The result as its headers will show it."""
        return Layout(self.request.to, self.targets, None, ())

    @property
    def size_bytes(self) -> int:
        """Bytes of all tensors of the result."""
        return sum(spec.size_bytes for spec in self.specs)

    @property
    def layer_count(self) -> int:
        """How many layers are converted."""
        return len(self.layers)

    @cached_property
    def rounded(self) -> Mapping[str, str]:
        """The layers of the result that have new codes -> their scheme."""
        return {
            layer.target.name: str(layer.target.scheme)
            for layer in self.layers
            if layer.target and layer.rounded
        }

    @property
    def source_format(self) -> str | None:
        """The format of the source; None when it is not quantized."""
        return self.request.layout.format if self.request.layout else None


def plan_conversion(request: ConversionRequest) -> ConversionPlan:
    """Decide what every tensor becomes, from headers, configs and ``g_idx``.

    Raises: CheckpointRefused, naming the layer and the constraint, when the target cannot hold it.
    """
    unquantized = unquantized_linears(request)
    layers = plan_layers(request, unquantized)
    copies = plan_copies(request, layers)
    targets = [layer.target for layer in layers if layer.target]
    if not targets and request.layout is None and not request.dequantizes:
        raise CheckpointRefused(
            "E_NOTHING_TO_DO",
            f"{request.checkpoint.source} has no layer that `export` can round",
            hint="output heads, routers, other towers and Conv1D layers stay in 16 bits",
        )
    if not targets and request.to not in (*UNQUANTIZED, *HOLD_A_CACHE_ALONE):
        raise request.cannot_hold(
            "layers: no layer is quantized, only the KV cache",
            f"{' and '.join(HOLD_A_CACHE_ALONE)} hold that",
        )
    files: Mapping[str, Mapping[str, object]]
    if request.dequantizes:
        names = None
        files = {"config.json": _dequantized_config(request)}
    else:
        names = _model_names(request)
        left = _left_unquantized(names, unquantized, targets)
        files = _quantized_files(request, targets, left, copies)
    return ConversionPlan(
        request=request,
        layers=layers,
        steps=tuple(_steps(request, layers, copies)),
        files=files,
        notes=tuple(_notes(request, layers, copies.dropped, names)),
    )


def _steps(request: ConversionRequest, layers: Iterable[Layer], copies: Copies) -> Iterator[Step]:
    """Yield a step for each layer, where its first tensor lies, and for each tensor copied."""
    by_tensor = {tensor.name: layer for layer in layers for tensor in layer.source.tensors.values()}
    begun: set[str] = set()
    known: dict[Hashable, tuple[Layer, tuple[Write, ...]]] = {}
    for name in request.checkpoint.tensors:
        layer = by_tensor.get(name)
        if layer and layer.source.name not in begun:
            begun.add(layer.source.name)
            key = layer.source.dedup_key, layer.target is None
            if key not in known:
                known[key] = layer, writes_of(request, layer)
            yield Step(layer, writes_like(*known[key], layer))
        if copies.writes.get(name):
            yield Step(None, copies.writes[name])


def _dequantized_config(request: ConversionRequest) -> dict[str, object]:
    dtype = CONFIG_DTYPES[request.dtype]
    config = _unquantized_config(request.checkpoint.config, dtype)
    return config if "torch_dtype" in config else {"dtype": dtype, **config}


def _quantized_files(
    request: ConversionRequest,
    targets: Sequence[QuantizedModule],
    left: Sequence[str],
    copies: Copies,
) -> dict[str, Mapping[str, object]]:
    """Return the JSON files of a quantized result, by name; ``left`` stay in 16 bits."""
    config = _unquantized_config(request.checkpoint.config, None)
    kv_cache = None
    if request.layout and not copies.dropped:
        kv_cache = request.layout.kv_cache
    if kv_cache and copies.has_scale_per_head:
        kv_cache += PER_HEAD
    files = request.format.quantization_config(targets, left, kv_cache)
    return {**files, "config.json": {**config, **files["config.json"]}}


def _unquantized_config(config: Mapping[str, object], dtype: str | None) -> dict[str, object]:
    """Return ``config`` without its quantization, and with ``dtype`` wherever one is named."""
    result: dict[str, object] = {}
    for key, value in config.items():
        if key in ("text_config", "llm_config") and isinstance(value, Mapping):
            result[key] = _unquantized_config(value, dtype)
        elif key not in DROPPED_IN_CONFIG:
            result[key] = dtype if dtype and key in ("dtype", "torch_dtype") else value
    return result


def _left_unquantized(
    names: NameMap, unquantized: Iterable[str], targets: Iterable[QuantizedModule]
) -> list[str]:
    """Return the linear layers that are not quantized, by all names under which engines and
    transformers look for them.

    The output head is one of them also where it is the embedding matrix: engines see a layer there.
    """
    quantized = {module.name for module in targets}
    linears = names.linears
    left = [name for name in dict.fromkeys((*unquantized, *linears)) if name not in quantized]
    in_model = [linears[name].layer for name in left if name in linears]
    has_head = any(last_part(name) == "lm_head" for name in (*left, *quantized))
    return [*dict.fromkeys([*left, *in_model, *(() if has_head else ("lm_head",))])]


def _model_names(request: ConversionRequest) -> NameMap:
    try:
        return map_names(request.checkpoint, request.layout)
    except CheckpointRefused:  # a class that transformers lacks: all else was checked before
        return names_from_headers(request.checkpoint)


def _notes(
    request: ConversionRequest, layers: Sequence[Layer], dropped: int, names: NameMap | None
) -> Iterator[str]:
    if request.adapter:
        yield from request.adapter.notes(request.checkpoint)
    yield from _cache_notes(request, dropped)
    yield from _gguf_notes(request, layers)
    if names and request.layout is None:
        yield from _stack_notes(names)
    if stacks := request.checkpoint.expert_stacks:
        yield f"the experts in {len(stacks)} stacks, e.g. `{stacks[0]}`, are written one by one"
    yield from _rounding_notes(layers)
    yield from _activation_notes(layers)
    if request.to == "compressed-tensors" and _has_act_order(layers):
        yield (
            "act-order: compressed-tensors 0.19 and vLLM 0.33 refuse a g_idx, SGLang 0.5 takes "
            "it; --to gptq keeps it for all"
        )


def _gguf_notes(request: ConversionRequest, layers: Sequence[Layer]) -> Iterator[str]:
    """Yield what becomes of parts of a GGUF file that are stored otherwise elsewhere."""
    tables = [layer.source.name for layer in layers if layer.target is None]
    if request.checkpoint.gguf_file and tables and not request.dequantizes:
        for name in tables:
            yield f"`{name}` becomes 16 bits: engines have embeddings and heads in 16 bits"


def _stack_notes(names: NameMap) -> Iterator[str]:
    """Yield what is said of experts that lie in stacks, which no layer here is."""
    if not names.stacks:
        return
    stacked = sum(math.prod(each.shape) for stack in names.stacks.values() for each in stack)
    all_weights = sum(math.prod(each.shape) for each in names.linears.values())
    yield (
        f"{len(names.stacks)} stacks of experts stay in 16 bits, {stacked / all_weights:.0%} of "
        f"the weights of linear layers, e.g. `{next(iter(names.stacks))}`: `quantize` rounds them"
    )


def _cache_notes(request: ConversionRequest, dropped: int) -> Iterator[str]:
    kv_cache = request.layout.kv_cache if request.layout else None
    has_scales = has_key_scales(request.checkpoint.tensors)
    says_cache = request.to in HOLD_A_CACHE_ALONE or (request.to == "fp8_block" and has_scales)
    if kv_cache and not says_cache and not dropped:
        yield (
            f"the source asks for a KV cache of {kv_cache}, without scales, and {request.to} has "
            "no config key for it"
        )
    if dropped:
        yield (
            f"{dropped} scales of the KV cache are left out: there is no place for them in "
            f"{request.to}"
        )


def _rounding_notes(layers: Iterable[Layer]) -> Iterator[str]:
    rounded = Counter(
        layer.target.scheme.name for layer in layers if layer.target and layer.rounded
    )
    if rounded:
        counts = ", ".join(f"{count} layers to {name}" for name, count in rounded.items())
        yield f"rounded to nearest: {counts}"


def _activation_notes(layers: Iterable[Layer]) -> Iterator[str]:
    changes = Counter(
        (
            layer.source.module.scheme.activations,
            layer.target.scheme.activations if layer.target else None,
        )
        for layer in layers
        if layer.source.module
    )
    for (before, after), count in changes.items():
        if before != after:
            yield f"inputs of {count} layers: {before or '16 bits'} -> {after or '16 bits'}"


def _has_act_order(layers: Iterable[Layer]) -> bool:
    return any(layer.target.act_order for layer in layers if layer.target)
