"""Computes the facts: of the checkpoint once, of the linear layers by kind, of the fused layers by
kind.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

from qtool.checkpoint import Checkpoint
from qtool.formats import Layout, QuantizedModule
from qtool.inspection.engines.layers import Fused, Linear, partition
from qtool.inspection.engines.name_matching import Conclude
from qtool.inspection.engines.rule_inputs import CheckpointFacts, GroupFacts, ModuleFacts
from qtool.modules import HEADS, is_head, parse_cache_scale
from qtool.scheme import Scheme

# other names of the same
METHODS = {
    "compressed_tensors": "compressed-tensors",
    "gptq_marlin": "gptq",
    "awq_marlin": "awq",
}
CONTAINERS = {"I8": "int8", "F8_E4M3": "float8", "U8": "packed"}
# the first that a module has
WHOLE_MATRIX_SCALES = (
    "weight_global_scale",
    "weight_scale_2",
    "weight_scale",
    "weight_scale_inv",
)


def survey_checkpoint(
    checkpoint: Checkpoint, layout: Layout | None, gpu: int | None, ranks: int
) -> CheckpointFacts:
    """Return the facts of ``checkpoint`` on ``ranks`` GPUs of architecture ``gpu``."""
    config = checkpoint.quantization_config or {}
    nested = {**_mapping(config.get("quantization")), **config}
    groups = [_mapping(group) for group in _mapping(config.get("config_groups")).values()]
    weights = [_mapping(group["weights"]) for group in groups if group.get("weights")]
    kv_scheme = nested.get("kv_cache_scheme")
    kv = _mapping(kv_scheme)
    heads, cache_heads = _count(checkpoint, "num_attention_heads"), cache_head_count(checkpoint)
    text = checkpoint.text_config
    said = any(
        isinstance(each.get(key), Mapping)
        for each in (checkpoint.config, text)
        for key in ("quantization_config", "compression_config")
    )
    return CheckpointFacts(
        quant_method=_method(config, layout),
        readable=layout is not None or not config,
        format=layout.format if layout else None,  # type: ignore[arg-type]
        algorithm=_word(nested.get("quant_algo")).upper() or None,
        sidecar=bool(config) and not said,
        config_keys=frozenset(nested),
        weight_keys=frozenset(key for args in _arguments(groups) for key in args),
        order=frozenset(str(args["actorder"]).lower() for args in weights if args.get("actorder")),
        order_without_groups=any(
            args.get("actorder") and args.get("strategy") not in ("group", "tensor_group", None)
            for args in weights
        ),
        desc_act=_orders(config),
        sparse=_mapping(config.get("sparsity_config")).get("format", "dense") != "dense",
        inverse_scales=config.get("weight_scale_semantics") == "inverse",
        groups=len(weights),
        class_targets=any("Linear" in _list(group.get("targets")) for group in groups),
        transforms=frozenset(_transforms(config)),
        kv_cache=layout.kv_cache if layout else None,
        kv_granularity=kv.get("strategy"),
        kv_symmetric=kv.get("symmetric") is not False,
        kv_dynamic=bool(kv.get("dynamic")),
        kv_scales=any(
            scale.kind in ("k", "kv")
            for scale in map(parse_cache_scale, checkpoint.tensors)
            if scale
        ),
        tied=checkpoint.tied_embeddings,
        head=_head(checkpoint, layout),  # type: ignore[arg-type]
        spare_heads=heads % ranks,
        split_cache_heads=bool(cache_heads)
        and cache_heads % ranks != 0
        and ranks % cache_heads != 0,
        gpu=gpu,
        ranks=ranks,
    )


def survey_modules(
    linears: Iterable[Linear], fused: Iterable[Fused], conclude: Conclude, ranks: int, heads: int
) -> dict[ModuleFacts, list[str]]:
    """Return the names of the linear layers by their facts; most layers of a model share theirs."""
    parts = {linear.name: partition(linear, ranks, heads) for linear in linears}
    pairs = [group for group in fused if group.kind != "experts"]
    fused_rows = {
        shard.name: sum(parts[each.name].rows for each in group.shards)
        for group in pairs
        for shard in group.shards
    }
    followed = {shard.name for group in pairs for shard in group.shards[:-1]}
    found: dict[ModuleFacts, list[str]] = defaultdict(list)
    for linear in linears:
        conclusion, part = conclude(linear), parts[linear.name]
        facts = ModuleFacts(
            role=linear.role,
            kind=linear.kind,
            stored=linear.stored,
            says=conclusion.stored,
            says_weights=conclusion.weights,  # type: ignore[arg-type]
            differs=conclusion.differs(linear),
            **_of_module(linear.module),
            split=part.split,
            uneven=part.uneven,
            rows=part.rows,
            columns=part.columns,
            fused_rows=fused_rows.get(linear.name, part.rows),
            last=linear.name not in followed,
        )
        found[facts].append(linear.name)
    return found


def survey_groups(
    checkpoint: Checkpoint, fused: Iterable[Fused], *, ordered: bool
) -> dict[GroupFacts, list[str]]:
    """Return the names of the fused layers by their facts.

    Scalars are read where each shard has one, orders only when ``ordered``.
    """
    found: dict[GroupFacts, list[str]] = defaultdict(list)
    for group in fused:
        modules = [shard.module for shard in group.shards if shard.module]
        if modules:
            pair = group.kind != "experts"
            weights = modules[0].scheme.weights
            facts = GroupFacts(
                fused=group.kind,
                schemes=len({module.scheme for module in modules}),
                plain=len(group.shards) - len(modules),
                weights=weights.format,
                scale=weights.scale,
                scales="differ"
                if pair and _differ(checkpoint, modules, _whole_matrix_scale(modules[0]))
                else "equal",
                orders="differ"
                if pair and ordered and _differ(checkpoint, modules, "g_idx")
                else "equal",
            )
            found[facts].append(group.name)
    return found


def cache_head_count(checkpoint: Checkpoint) -> int:
    """Return the key-value heads, as the config counts them; 0 when it does not."""
    return _count(checkpoint, "num_key_value_heads") or _count(checkpoint, "num_attention_heads")


def _of_module(module: QuantizedModule | None) -> Mapping[str, Any]:
    facts = _of_scheme(module.scheme if module else None)
    if module is None:
        return facts
    return {
        **facts,
        "container": _container(module),
        "padded": _padded(module),
        "pre_scale": "pre_quant_scale" in module.tensors,
    }


@cache
def _of_scheme(scheme: Scheme | None) -> Mapping[str, Any]:
    weights, inputs = (scheme.weights, scheme.activations) if scheme else (None, None)
    block = weights.block if weights else None
    return {
        "scheme": scheme.name if scheme else None,
        "weights": weights.format if weights else None,
        "bits": weights.bits if weights else None,
        "granularity": weights.granularity if weights else None,
        "group_size": weights.group_size if weights else None,
        "block_rows": block[0] if block else None,
        "block_columns": block[1] if block else None,
        "symmetric": weights.symmetric if weights else True,
        "scale": weights.scale if weights else None,
        "container": None,
        "padded": False,
        "pre_scale": False,
        "activations": inputs.format if inputs else None,
        "act_granularity": inputs.granularity if inputs else None,
        "act_dynamic": inputs.dynamic if inputs else True,
        "act_symmetric": inputs.symmetric if inputs else True,
        "native_gpu": int(scheme.native_gpu.removeprefix("sm_")) if scheme else None,
    }


def _container(module: QuantizedModule) -> str:
    if module.tensors.keys() & {"weight_packed", "qweight", "_blocks"}:
        return "packed"
    return (
        CONTAINERS.get(module.tensors["weight"].dtype, "other")
        if "weight" in module.tensors
        else "other"
    )


def _padded(module: QuantizedModule) -> bool:
    packed = module.tensors.get("weight_packed")
    bits, columns = module.scheme.weights.bits, module.shape[1]
    return (
        packed is not None
        and packed.dtype == "I32"
        and packed.shape[-1] != math.ceil(columns * bits / 32)
    )


def _whole_matrix_scale(module: QuantizedModule) -> str:
    weights = module.scheme.weights
    if weights.granularity != "tensor" and weights.scale != "e4m3":
        return ""
    return next((suffix for suffix in WHOLE_MATRIX_SCALES if suffix in module.tensors), "")


def _differ(checkpoint: Checkpoint, modules: list[QuantizedModule], suffix: str) -> bool:
    names = [module.tensors[suffix].name for module in modules if suffix in module.tensors]
    return len({checkpoint.read(name) for name in names}) > 1


def _head(checkpoint: Checkpoint, layout: Layout | None) -> str | None:
    if layout and any(is_head(name) for name in layout.modules):
        return "quantized"
    return "plain" if any(f"{name}.weight" in checkpoint.tensors for name in HEADS) else None


def _method(config: Mapping[str, Any], layout: Layout | None) -> str | None:
    if named := _word(config.get("quant_method")).lower():
        method = METHODS.get(named, named)
        return "modelopt" if method.startswith("modelopt") else method
    if config.get("load_in_4bit") is True or config.get("load_in_8bit") is True:
        return "bitsandbytes"
    return layout.format if layout else "unnamed" if config else None


def _orders(config: Mapping[str, Any]) -> bool:
    """Whether GPTQ's act-order is on for some group: the config's own, or that of an override."""
    overrides = (
        value
        for key, value in _mapping(config.get("dynamic")).items()
        if not key.startswith("-:") and isinstance(value, Mapping)
    )
    return any(
        {**config, **override}.get("desc_act") is True
        and {**config, **override}.get("group_size") != -1
        for override in ({}, *overrides)
    )


def _arguments(groups: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [
        _mapping(group.get(key))
        for group in groups
        for key in ("weights", "input_activations", "output_activations")
    ]


def _transforms(config: Mapping[str, Any]) -> list[str]:
    groups = _mapping(_mapping(config.get("transform_config")).get("config_groups")).values()
    applied = (apply for group in groups for apply in _list(_mapping(group).get("apply")))
    return [
        str(location)
        for apply in applied
        if not (location := str(_mapping(apply).get("location", ""))).startswith("weight_")
    ]


def _count(checkpoint: Checkpoint, key: str) -> int:
    value = checkpoint.text_config.get(key)
    return value if type(value) is int and value > 0 else 0


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _word(value: Any) -> str:
    """Return ``value`` as it can stand in a message; empty when it is no text, or none to print."""
    return value[:60] if isinstance(value, str) and value.isprintable() else ""
