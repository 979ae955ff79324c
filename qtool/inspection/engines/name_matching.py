"""What an engine concludes from names and config alone: which layers are quantized, and how."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from qtool.inspection.engines.layers import Linear
from qtool.inspection.engines.names import compiled, matcher
from qtool.inspection.engines.rule_inputs import Stored
from qtool.inspection.engines.rules import Matching


@dataclass(frozen=True)
class Conclusion:
    """Whether a layer is quantized, and to which weight format and group size (0 for none); None
    where the config does not say.
    """

    stored: Stored
    weights: str | None = None
    group_size: int | None = None

    def differs(self, linear: Linear) -> bool:
        """Whether ``linear`` is stored with other weights than these."""
        if self.weights is None or linear.module is None:
            return False
        weights = linear.module.scheme.weights
        size = weights.group_size or 0
        return weights.format != self.weights or (
            weights.format.startswith("int") and size not in (self.group_size, linear.shape[1])
        )


Conclude = Callable[[Linear], Conclusion]


def conclusions(matching: Matching | None, config: Mapping[str, Any]) -> Conclude:
    """Return a function that says of a linear layer what an engine with ``matching`` concludes;
    with None it believes the tensors.
    """
    if matching is None:
        return lambda linear: Conclusion(linear.stored)
    entries = _listed(matching, config)
    if isinstance(entries, Mapping):
        conclude = _by_overrides(entries, config)
    else:
        conclude = partial(
            _by_list,
            skipped=_skips(matching, entries),
            targets=_targets(config) if matching.targets else None,
        )
    return partial(_conclude, matching=matching, config=config, conclude=conclude)


def _conclude(
    linear: Linear, matching: Matching, config: Mapping[str, Any], conclude: Conclude
) -> Conclusion:
    if linear.stored == "plain" and (
        linear.role in ("router", "tower") or matching.unlisted == "tensors"
    ):
        return Conclusion("plain")
    if linear.role == "head" and matching.head == "flag":
        return conclude(linear) if config.get("lm_head") is True else Conclusion("plain")
    return conclude(linear)


def _by_list(
    linear: Linear, skipped: Callable[[Linear], bool], targets: Iterable[_Target] | None
) -> Conclusion:
    if skipped(linear):
        return Conclusion("plain")
    if targets is None:
        return Conclusion("quantized")
    for name in (linear.runs_in, linear.name):
        for target in targets:
            if target.matches(name):
                return target.conclusion
    if linear.role != "head":
        for target in targets:
            if target.is_class:
                return target.conclusion
    return Conclusion("plain")


def _by_overrides(dynamic: Mapping[str, Any], config: Mapping[str, Any]) -> Conclude:
    """GPTQ's ``dynamic``: the first pattern that matches the layer the engine runs."""
    patterns = [
        (key.startswith("-:"), compiled(re.sub(r"^[+-]:", "", key)), value)
        for key, value in dynamic.items()
    ]
    base = _number(config.get("bits")), _number(config.get("group_size"))

    def conclude(linear: Linear) -> Conclusion:
        bits, size = base
        for negative, matches, value in patterns:
            if matches(linear.runs_in):
                if negative:
                    return Conclusion("plain")
                if isinstance(value, Mapping):
                    bits, size = (
                        _number(value.get("bits", bits)),
                        _number(value.get("group_size", size)),
                    )
                break
        return Conclusion("quantized", f"int{bits}" if bits else None, max(size or 0, 0))

    return conclude


@dataclass(frozen=True)
class _Target:
    matches: Callable[[str], bool]
    is_class: bool
    conclusion: Conclusion


def _targets(config: Mapping[str, Any]) -> list[_Target]:
    found = []
    for group in _mapping(config.get("config_groups")).values():
        weights = _mapping(_mapping(group).get("weights"))
        if weights:
            bits, is_float = (
                _number(weights.get("num_bits", 8)),
                weights.get("type", "int") == "float",
            )
            conclusion = Conclusion(
                "quantized",
                f"{'fp' if is_float else 'int'}{bits}",
                max(_number(weights.get("group_size")) or 0, 0),
            )
            for target in _strings(_mapping(group).get("targets")):
                found.append(
                    _Target(matcher(("exact", "regex"), [target]), target == "Linear", conclusion)
                )
    return found


def _listed(matching: Matching, config: Mapping[str, Any]) -> Mapping[str, Any] | list[str]:
    nested = _mapping(config.get("quantization"))
    found = next(
        (where[key] for where in (config, nested) for key in matching.list if where.get(key)), None
    )
    if found is None and "dynamic" in matching.list:
        return {}
    return found if isinstance(found, Mapping) else _strings(found)


def _skips(matching: Matching, entries: list[str]) -> Callable[[Linear], bool]:
    runtime, shards = matcher(matching.runtime, entries), matcher(matching.shards, entries)
    return lambda linear: (
        runtime(linear.runs_in) or (linear.runs_in != linear.name and shards(linear.name))
    )


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _strings(value: Any) -> list[str]:
    return [entry for entry in value if isinstance(entry, str)] if isinstance(value, list) else []


def _number(value: Any) -> int | None:
    return value if type(value) is int else None
