"""What an engine concludes from names and config alone: which layers are quantized, and how."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from qtool.formats.auto_round import LayerOptions, is_auto_round, is_float
from qtool.formats.patterns import config_patterns
from qtool.inspection.engines.config_values import as_int, as_list, as_mapping, as_strings
from qtool.inspection.engines.layers import Linear
from qtool.inspection.engines.names import compiled, matcher
from qtool.inspection.engines.rule_inputs import Role, Stored
from qtool.inspection.engines.rules import Matching
from qtool.modules import layer_number
from qtool.patterns import PatternCompiler


@dataclass(frozen=True)
class NameMatch:
    """What an engine takes a layer for."""

    stored: Stored
    weights: str | None = None
    """Weight format; None where the config gives none."""
    group_size: int | None = None
    """0 for no groups; None where the config gives none."""

    def differs(self, linear: Linear) -> bool:
        """Whether ``linear`` is stored with another weight format or group size."""
        if self.weights is None or linear.module is None:
            return False
        weights = linear.module.scheme.weights
        if weights.format != self.weights:
            return True
        group_sizes = (self.group_size, linear.shape[1])
        return weights.format.startswith("int") and (weights.group_size or 0) not in group_sizes


LINEAR_CLASSES = (
    "columnparallellinear qkvparallellinear mergedcolumnparallellinear rowparallellinear "
    "replicatedlinear"
)
ENGINE_CLASSES: Mapping[Role, str] = {  # none for heads, which no class reaches
    **dict.fromkeys(("linear", "router", "tower"), LINEAR_CLASSES),
    "expert": f"{LINEAR_CLASSES} routedexperts fusedmoe",
    "embedding": "vocabparallelembedding",
}
MatchName = Callable[[Linear], NameMatch]
PLAIN = NameMatch("plain")


def name_matching(matching: Matching | None, config: Mapping[str, object]) -> MatchName:
    """Return the function that says what an engine with ``matching`` takes a layer for.

    Without ``matching``, the engine believes the tensors.
    """
    if matching is None:
        return _believe_tensors
    if is_auto_round(config):
        return _by_auto_round(config)
    if matching.blocks:
        return _by_blocks(config)
    if matching.experts:
        return _by_experts_group(config)
    entries = _list_entries(matching, config)
    if isinstance(entries, Mapping):
        match_name = _by_overrides(entries, config)
    else:
        match_name = partial(
            _by_list,
            is_skipped=_skip_test(matching, entries),
            targets=_targets(config) if matching.targets else None,
        )
    return partial(_match, matching=matching, config=config, match_name=match_name)


def _believe_tensors(linear: Linear) -> NameMatch:
    """Return the match of an engine that looks at the tensors, not at names."""
    return NameMatch(linear.stored)


def _by_auto_round(config: Mapping[str, object]) -> MatchName:
    """Return the function for AutoRound's words: the output head only where it has options of its
    own, all other layers as these or the config say.
    """
    single = LayerOptions(config)
    extra = as_mapping(config.get("extra_config"))

    def match_name(linear: Linear) -> NameMatch:
        is_left_out = linear.role in ("router", "tower") and linear.stored == "plain"
        if is_left_out or (linear.role == "head" and linear.name not in extra):
            return PLAIN
        options = single.options(linear.name)
        if options is None:
            return PLAIN
        return NameMatch("quantized") if is_float(config) else _match_of_numbers(options)

    return match_name


def _by_blocks(config: Mapping[str, object]) -> MatchName:
    """Return the function for GPTQ in optimum. It replaces all linear layers of the decoder layers,
    or those in ``modules_in_block_to_quantize``, and ignores ``dynamic``.
    """
    kinds = tuple(
        kind
        for group in as_list(config.get("modules_in_block_to_quantize"))
        for kind in as_strings(group)
    )
    found = _match_of_numbers(config)

    def match_name(linear: Linear) -> NameMatch:
        # in transformers routers are classes of their own, except this gate
        if linear.role in ("expert", "tower") or (
            linear.role == "router" and linear.kind != "shared_expert_gate"
        ):
            return NameMatch(linear.stored)
        is_replaced = not kinds or linear.name.endswith(kinds)
        return found if is_replaced and layer_number(linear.name) is not None else PLAIN

    return match_name


def _by_experts_group(config: Mapping[str, object]) -> MatchName:
    """Return the function for compressed-tensors in transformers: one group of the config holds for
    all experts.

    FP8 and 16-bit experts are both called `weight` there, packed ones have another name.
    """
    weights = as_mapping(_experts_group(config).get("weights"))
    found = _match_of_weights(weights) if weights else PLAIN
    reads_plain = found.weights in (None, "fp8")

    def match_name(linear: Linear) -> NameMatch:
        if linear.role != "expert" or (linear.stored == "plain" and reads_plain):
            return NameMatch(linear.stored)
        return found

    return match_name


def _experts_group(config: Mapping[str, object]) -> Mapping[str, object]:
    """Return the first group whose patterns name experts, else the first with a target that is no
    pattern, else the first.
    """
    groups = [as_mapping(group) for group in as_mapping(config.get("config_groups")).values()]
    targets = [(group, as_strings(group.get("targets"))) for group in groups]
    named = [group for group, names in targets if any(map(_names_experts, names))]
    unnamed = [group for group, names in targets if not all(map(_is_pattern, names))]
    return next(iter([*named, *unnamed, *groups]), {})


def _is_pattern(target: str) -> bool:
    return target.startswith("re:")


def _names_experts(target: str) -> bool:
    return _is_pattern(target) and "experts" in target


def _match(
    linear: Linear, matching: Matching, config: Mapping[str, object], match_name: MatchName
) -> NameMatch:
    if linear.stored == "plain" and (
        linear.role in ("router", "tower") or matching.unlisted == "tensors"
    ):
        return NameMatch("plain")
    if linear.role == "head" and matching.head == "flag" and config.get("lm_head") is not True:
        return NameMatch("plain")
    return match_name(linear)


@dataclass(frozen=True)
class _Target:
    """A target of a config group, and what its layers are."""

    matches: Callable[[str], bool]
    """Whether it is or describes a name."""
    target: str
    found: NameMatch

    def has_class_of(self, linear: Linear) -> bool:
        """Whether it stands in the name of the class that engines have for ``linear``."""
        return self.target.lower() in ENGINE_CLASSES.get(linear.role, "")


def _by_list(
    linear: Linear, is_skipped: Callable[[Linear], bool], targets: Sequence[_Target] | None
) -> NameMatch:
    if is_skipped(linear):
        return NameMatch("plain")
    if targets is None:
        return NameMatch("quantized")
    target = _first_target(linear, targets)
    return target.found if target else NameMatch("plain")


def _first_target(linear: Linear, targets: Sequence[_Target]) -> _Target | None:
    """Return the target that holds for ``linear``: names come before classes."""
    for name in (linear.runs_in, linear.name):
        for target in targets:
            if target.matches(name):
                return target
    return next((target for target in targets if target.has_class_of(linear)), None)


@dataclass(frozen=True)
class _Override:
    """An entry of GPTQ's ``dynamic``: what holds for the layers that a pattern matches."""

    is_skip: bool
    matches: Callable[[str], bool]
    settings: Mapping[str, object]

    @classmethod
    def of(cls, key: str, value: object, compiler: PatternCompiler) -> _Override:
        pattern = re.sub(r"^[+-]:", "", key)
        return cls(key.startswith("-:"), compiled(pattern, compiler), as_mapping(value))


def _by_overrides(dynamic: Mapping[str, object], config: Mapping[str, object]) -> MatchName:
    """Return the function for GPTQ's ``dynamic``: the first pattern that matches decides."""
    compiler = config_patterns()
    overrides = [_Override.of(key, value, compiler) for key, value in dynamic.items()]

    def match_name(linear: Linear) -> NameMatch:
        override = next((each for each in overrides if each.matches(linear.runs_in)), None)
        if override and override.is_skip:
            return NameMatch("plain")
        return _match_of_numbers({**config, **(override.settings if override else {})})

    return match_name


def _match_of_numbers(settings: Mapping[str, object]) -> NameMatch:
    """Return the match of a layer with GPTQ's ``bits`` and ``group_size``."""
    bits = as_int(settings.get("bits"))
    group_size = as_int(settings.get("group_size")) or 0
    return NameMatch("quantized", f"int{bits}" if bits else None, max(group_size, 0))


def _targets(config: Mapping[str, object]) -> list[_Target]:
    found = []
    for value in as_mapping(config.get("config_groups")).values():
        group = as_mapping(value)
        weights = as_mapping(group.get("weights"))
        if weights:
            match = _match_of_weights(weights)
            found += [
                _Target(matcher(("exact", "regex"), [target]), target, match)
                for target in as_strings(group.get("targets"))
            ]
    return found


def _match_of_weights(weights: Mapping[str, object]) -> NameMatch:
    bits = as_int(weights.get("num_bits", 8))
    letters = "fp" if weights.get("type", "int") == "float" else "int"
    group_size = as_int(weights.get("group_size")) or 0
    return NameMatch("quantized", f"{letters}{bits}", max(group_size, 0))


def _list_entries(
    matching: Matching, config: Mapping[str, object]
) -> Mapping[str, object] | list[str]:
    """Return what the first key of ``matching`` that the config has names."""
    nested = as_mapping(config.get("quantization"))
    named = (where[key] for where in (config, nested) for key in matching.list if where.get(key))
    found = next(named, None)
    if found is None and "dynamic" in matching.list:
        return {}
    return found if isinstance(found, Mapping) else as_strings(found)


def _skip_test(matching: Matching, entries: list[str]) -> Callable[[Linear], bool]:
    is_runtime_name = matcher(matching.runtime, entries)
    is_shard_name = matcher(matching.shards, entries)
    return lambda linear: (
        is_runtime_name(linear.runs_in)
        or (linear.runs_in != linear.name and is_shard_name(linear.name))
    )
