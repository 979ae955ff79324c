"""Collects the inputs of rules: of the checkpoint, of its linear layers and of its fused layers."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from typing import cast

from qtool.checkpoint import Checkpoint
from qtool.formats import Layout, QuantizedModule
from qtool.formats.auto_round import is_auto_round
from qtool.formats.unread import method_of
from qtool.inspection.engines.config_values import as_int, as_list, as_mapping, as_word
from qtool.inspection.engines.layers import Fused, Linear, Partition, partition
from qtool.inspection.engines.name_matching import MatchName, NameMatch
from qtool.inspection.engines.rule_inputs import (
    Agreement,
    CheckpointInputs,
    Container,
    DataType,
    Format,
    GroupInputs,
    ModuleInputs,
    SchemeInputs,
    Stored,
    Weight,
)
from qtool.modules import (
    HEADS,
    expert_stack,
    has_key_scales,
    is_expert,
    is_head,
    other_names,
)
from qtool.scheme import Scheme

METHOD_ALIASES = {
    "compressed_tensors": "compressed-tensors",
    "gptq_marlin": "gptq",
    "awq_marlin": "awq",
}
CONTAINERS: Mapping[str, Container] = {"I8": "int8", "F8_E4M3": "float8", "U8": "packed"}
PACKED_CODES = frozenset({"weight_packed", "qweight", "_blocks"})
# A module's scale for the whole matrix is the first of these that it has.
WHOLE_MATRIX_SCALES = (
    "weight_global_scale",
    "weight_scale_2",
    "weight_scale",
    "weight_scale_inv",
)
SCALE_NAMES = ("weight_scale_inv", "weight_scale", "scale")
AlgorithmOf = Callable[[str], str | None]  # the name of a layer -> its `quant_algo`
ARGUMENTS = ("weights", "input_activations", "output_activations")


def collect_checkpoint(
    checkpoint: Checkpoint, layout: Layout | None, gpu: int | None, ranks: int
) -> CheckpointInputs:
    """Return the inputs of ``checkpoint`` on ``ranks`` GPUs of architecture ``gpu``."""
    config = _Config(checkpoint.quantization_config or {})
    method = config.method or _unnamed_method(checkpoint, config, layout)
    cache_scheme = as_mapping(config.nested.get("kv_cache_scheme"))
    cache_heads = cache_head_count(checkpoint)
    algorithm = as_word(config.nested.get("quant_algo")).upper() or None
    return CheckpointInputs(
        quant_method=method,
        named=bool(config.method),
        by_modelopt=as_mapping(config.config.get("producer")).get("name") == "modelopt",
        readable=layout is not None or method is None,
        format=cast(Format, layout.format) if layout else None,
        algorithm=algorithm if method == "modelopt" else None,
        packing=as_word(config.config.get("packing_format")) or None,
        data_type=config.data_type,
        sidecar=bool(config.config) and not _is_in_config_json(checkpoint),
        config_keys=frozenset(config.nested),
        weight_keys=config.weight_keys,
        order=config.order,
        order_without_groups=config.order_without_groups,
        desc_act=config.desc_act,
        sparse=as_mapping(config.config.get("sparsity_config")).get("format", "dense") != "dense",
        inverse_scales=config.config.get("weight_scale_semantics") == "inverse",
        model_type=as_word(checkpoint.config.get("model_type")) or None,
        single_experts=not checkpoint.expert_stacks and any(map(is_expert, checkpoint.tensors)),
        expert_stacks=bool(checkpoint.expert_stacks),
        groups=len(config.weights),
        class_targets=config.class_targets,
        transforms=config.transforms,
        kv_cache=layout.kv_cache if layout else None,
        kv_granularity=cache_scheme.get("strategy"),  # type: ignore[arg-type]  # unchecked
        kv_symmetric=cache_scheme.get("symmetric") is not False,
        kv_dynamic=bool(cache_scheme.get("dynamic")),
        kv_scales=has_key_scales(checkpoint.tensors),
        tied=checkpoint.tied_embeddings,
        head=_head(checkpoint, layout),
        spare_heads=_count(checkpoint, "num_attention_heads") % ranks,
        split_cache_heads=_are_split(cache_heads, ranks),
        gpu=gpu,
        ranks=ranks,
    )


def collect_modules(
    linears: Iterable[Linear],
    fused: Iterable[Fused],
    match_name: MatchName,
    algorithm_of: AlgorithmOf,
    *,
    ranks: int,
    cache_heads: int,
) -> dict[ModuleInputs, list[str]]:
    """Return the names of the linear layers by their inputs; most layers share theirs."""
    parts = {linear.name: partition(linear, ranks, cache_heads) for linear in linears}
    merged = _merge_shards(fused, parts)
    found: dict[ModuleInputs, list[str]] = defaultdict(list)
    for linear in linears:
        part = parts[linear.name]
        alone = _Merged(fused_rows=part.rows, last=True)
        inputs = _module_inputs(
            linear,
            match_name(linear),
            algorithm_of(linear.name),
            part,
            merged.get(linear.name, alone),
        )
        found[inputs].append(linear.name)
    return found


@dataclass(frozen=True)
class _Merged:
    """The layer that a linear layer is merged into."""

    fused_rows: int
    last: bool


def _merge_shards(fused: Iterable[Fused], parts: Mapping[str, Partition]) -> dict[str, _Merged]:
    """Return what each shard is merged into, by its name; experts are not merged."""
    merged: dict[str, _Merged] = {}
    for group in fused:
        if group.kind != "experts":
            names = [shard.name for shard in group.shards]
            rows = sum(parts[name].rows for name in names)
            for name in names:
                merged[name] = _Merged(fused_rows=rows, last=name == names[-1])
    return merged


def _module_inputs(
    linear: Linear, match: NameMatch, algorithm: str | None, part: Partition, merged: _Merged
) -> ModuleInputs:
    module = linear.module
    return ModuleInputs(
        **vars(_scheme_inputs(module.scheme if module else None)),
        role=linear.role,
        kind=linear.kind,
        stored=linear.stored,
        says=match.stored,
        says_weights=cast(Weight, match.weights),
        differs=match.differs(linear),
        algorithm_here=algorithm,
        container=_container(module) if module else None,
        scale_name=_scale_name(module) if module else None,
        padded=module is not None and _is_padded(module),
        pre_scale=module is not None and "pre_quant_scale" in module.tensors,
        split=part.split,
        uneven=part.uneven,
        rows=part.rows,
        columns=part.columns,
        fused_rows=merged.fused_rows,
        last=merged.last,
    )


def collect_groups(
    checkpoint: Checkpoint, fused: Iterable[Fused], *, ordered: bool
) -> dict[GroupInputs, list[str]]:
    """Return the names of the fused layers by their inputs.

    Reads the scale of a whole matrix where each shard has one; act-order only when ``ordered``.
    """
    found: dict[GroupInputs, list[str]] = defaultdict(list)
    for group in fused:
        modules = [shard.module for shard in group.shards if shard.module]
        if not modules:
            continue
        is_merged = group.kind != "experts"
        weights = modules[0].scheme.weights
        inputs = GroupInputs(
            fused=group.kind,
            schemes=len({module.scheme for module in modules}),
            plain=len(group.shards) - len(modules),
            weights=weights.format,
            scale=weights.scale,
            scales=_compare(checkpoint, modules, _whole_matrix_scale(modules[0]), is_merged),
            orders=_compare(checkpoint, modules, "g_idx", is_merged and ordered),
        )
        found[inputs].append(group.name)
    return found


def layer_algorithms(config: Mapping[str, object]) -> AlgorithmOf:
    """Return the function that gives the ``quant_algo`` of a layer in ModelOpt's MIXED_PRECISION,
    as engines find it: by name, by that of the layer that it is merged into, or of all experts.
    """
    layers = as_mapping(_Config(config).nested.get("quantized_layers"))

    def algorithm_of(name: str) -> str | None:
        names = (name, *other_names(name), expert_stack(name) or "")
        found = next((layers[each] for each in names if each in layers), None)
        return as_word(as_mapping(found).get("quant_algo")).upper() or None

    return algorithm_of


def cache_head_count(checkpoint: Checkpoint) -> int:
    """Return the number of key-value heads in the config; 0 when it gives none."""
    return _count(checkpoint, "num_key_value_heads") or _count(checkpoint, "num_attention_heads")


@dataclass(frozen=True)
class _Config:
    """A quantization config whose values may have any type."""

    config: Mapping[str, object]

    @cached_property
    def nested(self) -> Mapping[str, object]:
        """The config, and below it what ModelOpt nests under ``quantization``."""
        return {**as_mapping(self.config.get("quantization")), **self.config}

    @cached_property
    def groups(self) -> list[Mapping[str, object]]:
        groups = as_mapping(self.config.get("config_groups")).values()
        return [as_mapping(group) for group in groups]

    @cached_property
    def weights(self) -> list[Mapping[str, object]]:
        return [as_mapping(group["weights"]) for group in self.groups if group.get("weights")]

    @property
    def method(self) -> str | None:
        if named := as_word(self.config.get("quant_method")).lower():
            method = METHOD_ALIASES.get(named, named)
            return "modelopt" if method.startswith("modelopt") else method
        if any(self.config.get(key) is True for key in ("load_in_4bit", "load_in_8bit")):
            return "bitsandbytes"
        return None

    @property
    def data_type(self) -> DataType | None:
        """The family of AutoRound's ``data_type``; None for other methods."""
        if not is_auto_round(self.config):
            return None
        named = as_word(self.config.get("data_type")) or "int"
        families: tuple[DataType, ...] = ("mx_fp", "nv_fp", "fp", "int")
        return next((family for family in families if named.startswith(family)), "other")

    @property
    def weight_keys(self) -> frozenset[str]:
        arguments = (as_mapping(group.get(key)) for group in self.groups for key in ARGUMENTS)
        return frozenset(key for mapping in arguments for key in mapping)

    @property
    def class_targets(self) -> bool:
        return any("Linear" in as_list(group.get("targets")) for group in self.groups)

    @property
    def order(self) -> frozenset[str]:
        orders = (weights.get("actorder") for weights in self.weights)
        return frozenset(str(order).lower() for order in orders if order)

    @property
    def order_without_groups(self) -> bool:
        return any(
            weights.get("actorder")
            and weights.get("strategy") not in ("group", "tensor_group", None)
            for weights in self.weights
        )

    @property
    def desc_act(self) -> bool:
        """Whether GPTQ's act-order is on for some group: the config's own, or an override's."""
        overrides = [
            value
            for key, value in as_mapping(self.config.get("dynamic")).items()
            if not key.startswith("-:")
        ]
        settings = [{**self.config, **as_mapping(override)} for override in ({}, *overrides)]
        return any(
            each.get("desc_act") is True and each.get("group_size") != -1 for each in settings
        )

    @property
    def transforms(self) -> frozenset[str]:
        groups = as_mapping(as_mapping(self.config.get("transform_config")).get("config_groups"))
        applied = (
            as_mapping(apply)
            for group in groups.values()
            for apply in as_list(as_mapping(group).get("apply"))
        )
        locations = (str(apply.get("location", "")) for apply in applied)
        return frozenset(place for place in locations if not place.startswith("weight_"))


def _unnamed_method(checkpoint: Checkpoint, config: _Config, layout: Layout | None) -> str | None:
    if layout:
        return layout.format
    method = method_of(checkpoint, checkpoint.quantization_config)
    if method:
        return method.name
    return "unnamed" if config.config else None


def _is_in_config_json(checkpoint: Checkpoint) -> bool:
    return any(
        isinstance(config.get(key), Mapping)
        for config in (checkpoint.config, checkpoint.text_config)
        for key in ("quantization_config", "compression_config")
    )


def _are_split(cache_heads: int, ranks: int) -> bool:
    return bool(cache_heads) and cache_heads % ranks != 0 and ranks % cache_heads != 0


@cache
def _scheme_inputs(scheme: Scheme | None) -> SchemeInputs:
    if scheme is None:
        return SchemeInputs()
    weights = scheme.weights
    inputs = scheme.activations
    block_rows, block_columns = weights.block or (None, None)
    return SchemeInputs(
        scheme=scheme.name,
        weights=weights.format,
        bits=weights.bits,
        granularity=weights.granularity,
        group_size=weights.group_size,
        block_rows=block_rows,
        block_columns=block_columns,
        symmetric=weights.symmetric,
        scale=weights.scale,
        activations=inputs.format if inputs else None,
        act_granularity=inputs.granularity if inputs else None,
        act_dynamic=inputs.dynamic if inputs else True,
        act_symmetric=inputs.symmetric if inputs else True,
        native_gpu=int(scheme.native_gpu.removeprefix("sm_")),
    )


def _container(module: QuantizedModule) -> Container:
    if module.tensors.keys() & PACKED_CODES:
        return "packed"
    weight = module.tensors.get("weight")
    return CONTAINERS.get(weight.dtype, "other") if weight else "other"


def _scale_name(module: QuantizedModule) -> str | None:
    return next((suffix for suffix in SCALE_NAMES if suffix in module.tensors), None)


def _is_padded(module: QuantizedModule) -> bool:
    packed = module.tensors.get("weight_packed")
    if packed is None or packed.dtype != "I32":
        return False
    bits = module.scheme.weights.bits
    return packed.shape[-1] != math.ceil(module.shape[1] * bits / 32)


def _whole_matrix_scale(module: QuantizedModule) -> str:
    weights = module.scheme.weights
    if weights.granularity != "tensor" and weights.scale != "e4m3":
        return ""
    return next((suffix for suffix in WHOLE_MATRIX_SCALES if suffix in module.tensors), "")


def _compare(
    checkpoint: Checkpoint, modules: list[QuantizedModule], suffix: str, is_compared: bool
) -> Agreement:
    """Return whether the tensors ``suffix`` hold the same bytes, when ``is_compared``."""
    if not is_compared:
        return "equal"
    names = [module.tensors[suffix].name for module in modules if suffix in module.tensors]
    return "differ" if len({checkpoint.read(name) for name in names}) > 1 else "equal"


def _head(checkpoint: Checkpoint, layout: Layout | None) -> Stored | None:
    if layout and any(is_head(name) for name in layout.modules):
        return "quantized"
    return "plain" if any(f"{name}.weight" in checkpoint.tensors for name in HEADS) else None


def _count(checkpoint: Checkpoint, key: str) -> int:
    return max(as_int(checkpoint.text_config.get(key)) or 0, 0)
