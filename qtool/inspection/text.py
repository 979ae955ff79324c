"""An inspection as rich prints it: facts, tables, the tree of layers, what was measured, and
warnings last, where they are seen.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from qtool.inspection.comparison import Comparison
from qtool.inspection.deep import DeepReport
from qtool.inspection.engines import EngineReport
from qtool.inspection.report import Inspection, Module, Row

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.tree import Tree

WORST = 10  # layers named in a terminal; --json and --html have all
STYLES = {"refused": "bold red", "warning": "yellow", "note": "dim"}


def render(inspection: Inspection, *, modules: bool = False) -> RenderableType:
    """Return ``inspection`` as tables and lines; with ``modules`` also the tree of all linear
    layers.
    """
    from rich.console import Group
    from rich.text import Text

    facts = [
        f"{inspection.name}: {inspection.architecture}, {inspection.parameters / 1e6:,.2f} M "
        "parameters",
        f"format {inspection.format or 'none (not quantized)'}, KV cache "
        f"{inspection.kv_cache or 'not quantized'}, "
        f"embeddings {'tied' if inspection.tied_embeddings else 'not tied'}",
        f"{inspection.size_bytes / 1e6:,.2f} MB, {inspection.bits_per_weight:.2f} bits per "
        f"weight; in 16 bits {inspection.plain_bytes / 1e6:,.2f} MB",
    ]
    parts: list[RenderableType] = [Text("\n".join(facts))]
    parts += [
        _rows(title, rows)
        for title, rows in (
            ("quantized", inspection.quantized),
            ("not quantized", inspection.plain),
        )
        if rows
    ]
    parts += (
        [Text(f"in 16 bits: {line}") for line in _reasons(inspection.modules)]
        if inspection.quantized
        else []
    )
    parts += [_tree(inspection.modules)] if modules else []
    parts += _deep(inspection.deep) if inspection.deep else []
    parts += _against(inspection.against) if inspection.against else []
    parts += _engine(inspection.engine) if inspection.engine else []
    parts += [Text(f"warning: {warning}", style="yellow") for warning in inspection.warnings]
    return Group(*parts)


def _table(
    title: str, left: Sequence[str], right: Sequence[str], rows: Iterable[Sequence[str]]
) -> RenderableType:
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=title, title_justify="left", header_style="bold", box=None, pad_edge=False)
    for heading in left:
        table.add_column(heading)
    for heading in right:
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(*map(escape, row))
    return table


def _rows(title: str, rows: Sequence[Row]) -> RenderableType:
    cells = (
        (
            row.kind,
            row.scheme,
            f"{row.count:,}",
            f"{row.bits_per_weight:.2f}",
            f"{row.size_bytes / 1e6:,.2f}",
        )
        for row in rows
    )
    return _table(title, ("modules", "stored as"), ("count", "bits per weight", "MB"), cells)


def _reasons(modules: Sequence[Module]) -> Iterator[str]:
    kinds: dict[tuple[str, str], int] = {}
    for module in modules:
        if module.scheme is None:
            key = (
                module.kind,
                module.reason or "no reason in its name: ignored when it was quantized",
            )
            kinds[key] = kinds.get(key, 0) + 1
    yield from (f"{count} x {kind} ({reason})" for (kind, reason), count in kinds.items())


def _tree(modules: Sequence[Module]) -> Tree:
    """Return the layers by their names; neighbours that are alike, layer after layer and expert
    after expert, share a branch.
    """
    from rich.tree import Tree

    nested: dict[str, Any] = {}
    for module in modules:
        *parents, last = module.name.split(".")
        branch = nested
        for part in parents:
            branch = branch.setdefault(part, {})
        branch[last] = module
    tree = Tree("linear layers")
    _grow(tree, nested)
    return tree


def _grow(tree: Tree, branch: dict[str, Any]) -> None:
    from rich.markup import escape

    runs: list[tuple[str, str, Any]] = []  # first, last, what all of them hold
    for name, inner in branch.items():
        if (
            runs
            and name.isdigit()
            and runs[-1][1].isdigit()
            and _outline(inner) == _outline(runs[-1][2])
        ):
            runs[-1] = runs[-1][0], name, inner
        else:
            runs.append((name, name, inner))
    for first, last, inner in runs:
        label = escape(first if first == last else f"{first} to {last}")
        if isinstance(inner, Module):
            rows, columns = inner.shape
            stored = inner.scheme or (f"16 bit ({inner.reason})" if inner.reason else "16 bit")
            tree.add(
                f"{label}  [bold]{escape(stored)}[/bold]  {rows} x {columns}, "
                f"{inner.bits_per_weight:.2f} bits"
            )
        else:
            _grow(tree.add(label), inner)


def _outline(branch: Any) -> Any:
    if isinstance(branch, Module):
        return branch.scheme, branch.reason, branch.shape
    return tuple((name, _outline(inner)) for name, inner in branch.items())


def _deep(deep: DeepReport) -> Iterator[RenderableType]:
    from rich.text import Text

    worst = sorted(deep.modules, key=lambda numbers: -numbers.saturated)[:WORST]
    cells = (
        (
            numbers.name,
            f"{numbers.saturated:.2%}",
            str(numbers.dead_rows),
            str(numbers.dead_columns),
            f"{numbers.scale_min:.3g}",
            f"{numbers.scale_max:.3g}",
        )
        for numbers in worst
    )
    if worst:
        columns = ("saturated", "dead outputs", "dead inputs", "smallest scale", "largest scale")
        yield _table(f"most saturated of {len(deep.modules)}", ("layer",), columns, cells)
    yield Text(f"digests: {deep.digests}")


def _against(against: Comparison) -> Iterator[RenderableType]:
    from rich.text import Text

    differing = [found for found in against.modules if found.sqnr_db is not None]
    cells = (
        (
            found.name,
            f"{found.sqnr_db:.1f}{' (rows or columns rescaled)' if found.rescaled else ''}",
            f"{found.max_error:.3g}",
        )
        for found in differing[:WORST]
    )
    title = (
        f"furthest from {against.base}; {len(against.modules) - len(differing)} of "
        f"{len(against.modules)} are equal"
    )
    if differing:
        yield _table(title, ("layer",), ("SQNR, dB", "largest error"), cells)
    else:
        yield Text(f"all {len(against.modules)} layers equal those of {against.base}")
    for only, names in (("here", against.only_here), ("in the base", against.only_there)):
        if names:
            yield Text(
                f"only {only}: "
                f"{', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
            )


def _engine(report: EngineReport) -> Iterator[RenderableType]:
    from rich.text import Text

    where = (
        f"{report.engine} {report.version}{f' on {report.gpu}' if report.gpu else ''}, tensor "
        f"parallel {report.tensor_parallel}"
    )
    verdict = (
        "does not load"
        if not report.loads
        else "loads"
        if report.native
        else "loads, and not in its own formats"
    )
    yield Text(f"{where}: {verdict}", style="bold" if report.loads else STYLES["refused"])
    for finding in report.findings:
        layers = f" ({finding.count} layers, e.g. {finding.modules[0]})" if finding.modules else ""
        yield Text(
            f"  {finding.severity}[{finding.code}]: {finding.message}{layers}",
            style=STYLES[finding.severity],
        )
        yield Text(
            f"    hint: {finding.hint}" if finding.hint else f"    source: {finding.source}",
            style="dim",
        )
