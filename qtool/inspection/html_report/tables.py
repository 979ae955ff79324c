"""The tables of the HTML report: the worst layers, those left in 16 bits, and all of them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from qtool.inspection.comparison import Difference
from qtool.inspection.deep import ModuleNumbers
from qtool.inspection.html_report.details import ModuleDetails, row_label, stored_as
from qtool.inspection.html_report.formatting import decibel_text, visible
from qtool.inspection.report import Module

WORST = 15


@dataclass(frozen=True)
class WorstLayer:
    """A layer that is far from the base checkpoint's."""

    difference: Difference
    module: Module | None
    width: float
    """Length of its bar, in percent of the longest."""
    noise: str
    """Its noise as a share of the signal."""


@dataclass(frozen=True)
class UnquantizedGroup:
    """Linear layers of one kind that are left in 16 bits for one reason."""

    kind: str
    reason: str
    count: int
    size: int
    """Bytes."""
    example: str
    """Name of the first one."""


def worst_layers(details: ModuleDetails) -> list[WorstLayer]:
    """Return the layers furthest from the base, the worst first."""
    modules = {module.name: module for module in details.modules}
    differing = [one for one in details.differences.values() if _differs(one)][:WORST]
    noise = [_noise(one.sqnr_db) for one in differing]
    most = max(noise, default=0) or 1.0
    return [
        WorstLayer(
            difference=one,
            module=modules.get(one.name),
            width=100 * share / most,
            noise=decibel_text(one.sqnr_db) if _is_nan(one.sqnr_db) else f"{share:.2%}",
        )
        for one, share in zip(differing, noise, strict=True)
    ]


def _differs(difference: Difference) -> bool:
    return difference.sqnr_db is not None and difference.sqnr_db != math.inf


def _noise(sqnr_db: float | None) -> float:
    """Return noise as a share of the signal, at most 1."""
    return 1.0 if _is_nan(sqnr_db) else min(10 ** (-(sqnr_db or 0) / 20), 1.0)


def _is_nan(value: float | None) -> bool:
    return value is not None and math.isnan(value)


def unquantized_groups(modules: Iterable[Module]) -> list[UnquantizedGroup]:
    """Return the linear layers without a scheme by kind and reason, the largest group first."""
    members: dict[tuple[str, str], list[Module]] = {}
    for module in modules:
        if module.scheme is None:
            members.setdefault((row_label(module), module.reason), []).append(module)
    groups = [
        UnquantizedGroup(
            kind=kind,
            reason=reason,
            count=len(found),
            size=sum(module.size_bytes for module in found),
            example=found[0].name,
        )
        for (kind, reason), found in members.items()
    ]
    return sorted(groups, key=lambda group: -group.size)


def module_table(details: ModuleDetails) -> dict[str, object]:
    """Return the list of all modules as JSON: columns as [title, format], rows as values.

    A value is None where nothing is known.
    """
    columns = [
        ["module", "text"],
        ["stored as", "text"],
        ["outputs", "count"],
        ["inputs", "count"],
        ["bytes", "bytes"],
        ["bits per weight", "fixed"],
    ]
    if details.differences:
        columns += [["SQNR, dB", "fixed"], ["largest error", "number"]]
    if details.numbers:
        columns += [
            ["saturated", "percent"],
            ["dead outputs", "count"],
            ["dead inputs", "count"],
            ["least scale", "number"],
            ["largest scale", "number"],
        ]
    rows = [[*_table_row(details, module)] for module in details.modules]
    return {"columns": columns, "rows": rows}


def _table_row(details: ModuleDetails, module: Module) -> Iterator[object]:
    yield visible(module.name)
    yield visible(stored_as(module))
    yield from module.shape
    yield module.size_bytes
    yield round(module.bits_per_weight, 2)
    if details.differences:
        yield from _difference_values(details.differences.get(module.name))
    if details.numbers:
        yield from _number_values(details.numbers.get(module.name))


def _difference_values(difference: Difference | None) -> tuple[object, object]:
    if difference is None:
        return None, None
    sqnr = _json_number(difference.sqnr_db) if _differs(difference) else "equal"
    return sqnr, _json_number(difference.max_error)


def _number_values(numbers: ModuleNumbers | None) -> Iterator[object]:
    if numbers is None:
        yield from (None,) * 5
        return
    yield _json_number(numbers.saturated)
    yield numbers.dead_rows
    yield numbers.dead_columns
    yield _json_number(numbers.scale_min)
    yield _json_number(numbers.scale_max)


def _json_number(value: float | None) -> float | str | None:
    """Return ``value`` in a form that JSON can hold."""
    if value is None:
        return None
    return float(f"{value:.5g}") if math.isfinite(value) else str(value)


def embedded_json(data: Mapping[str, object]) -> str:
    """Return ``data`` as JSON for a script element: ASCII, without characters that HTML knows."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
