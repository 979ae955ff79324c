"""An inspection as rich prints it: a summary, tables, the tree of layers, and warnings last."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from qtool.inspection.comparison import Comparison
from qtool.inspection.deep import DeepReport
from qtool.inspection.engines import EngineReport
from qtool.inspection.report import Inspection, Module, Row
from qtool.sizes import format_size
from qtool.terminal import printable

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text
    from rich.tree import Tree

WORST = 10  # layers named in a terminal; --json and --html have all
Branch: TypeAlias = "dict[str, Branch | Module]"  # modules by the parts of their names
NO_REASON = "no reason in its name; the quantizer skipped it"
STYLES = {"refused": "bold red", "warning": "yellow", "note": "dim"}


def render(inspection: Inspection, *, modules: bool = False) -> RenderableType:
    """Return ``inspection`` as tables and lines; with ``modules`` also the tree of all layers."""
    from rich.console import Group

    return Group(*_parts(inspection, modules=modules))


def _parts(inspection: Inspection, *, modules: bool) -> Iterator[RenderableType]:
    yield from map(_line, _summary(inspection))
    if inspection.quantized:
        yield _rows("quantized", inspection.quantized)
    if inspection.unquantized:
        yield _rows("not quantized", inspection.unquantized)
    if inspection.quantized:
        yield from (_line(f"in 16 bits: {line}") for line in _reasons(inspection.modules))
    if inspection.expert_tokens:
        yield _line(inspection.expert_tokens.summary())
    if modules:
        yield _tree(inspection.modules)
    if inspection.deep:
        yield from _deep(inspection.deep)
    if inspection.manifest and not inspection.deep:  # which says the same
        yield _line(f"manifest: {inspection.manifest.summary()}")
    if inspection.against:
        yield from _against(inspection.against)
    if inspection.engine:
        yield from _engine(inspection.engine)
    yield from (_line(f"warning: {text}", style=STYLES["warning"]) for text in inspection.warnings)
    yield from (_line(f"damage: {text}", style=STYLES["refused"]) for text in inspection.damage)


def _line(text: str, style: str = "") -> Text:
    """Return a line that may quote names from files."""
    from rich.text import Text

    return Text(printable(text), style=style)


def _summary(inspection: Inspection) -> tuple[str, ...]:
    millions = inspection.parameters / 1e6
    tied = "tied" if inspection.tied_embeddings else "not tied"
    return (
        f"{inspection.name}: {inspection.architecture}, {millions:,.2f} M parameters",
        f"format {inspection.format or 'none (not quantized)'}, KV cache "
        f"{inspection.kv_cache or 'not quantized'}, embeddings {tied}",
        f"{format_size(inspection.size_bytes)}, {inspection.bits_per_weight:.2f} bits per "
        f"weight; in 16 bits {format_size(inspection.unquantized_bytes)}",
    )


def _table(
    title: str, left: Sequence[str], right: Sequence[str], rows: Iterable[Sequence[str]]
) -> RenderableType:
    from rich.table import Table

    table = Table(
        title=_line(title, "table.title"),
        title_justify="left",
        header_style="bold",
        box=None,
        pad_edge=False,
    )
    for heading in left:
        table.add_column(heading)
    for heading in right:
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(*map(_line, row))
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
    kinds: Counter[tuple[str, str]] = Counter()
    for module in modules:
        if module.scheme is None:
            kinds[module.kind, module.reason or NO_REASON] += 1
    yield from (f"{count} x {kind} ({reason})" for (kind, reason), count in kinds.items())


def _tree(modules: Sequence[Module]) -> Tree:
    """Return the layers by their names.

    Neighbours that are alike, layer after layer and expert after expert, share a branch.
    """
    from rich.tree import Tree

    root: Branch = {}
    for module in modules:
        *parents, last = module.name.split(".")
        branch = root
        for part in parents:
            inner = branch.setdefault(part, {})
            assert isinstance(inner, dict)  # a linear layer has no layers inside
            branch = inner
        branch[last] = module
    tree = Tree("linear layers")
    _grow(tree, root)
    return tree


@dataclass
class _Run:
    """Neighbours from ``first`` to ``last`` that hold the same."""

    first: str
    last: str
    inner: Branch | Module

    def goes_on(self, name: str, inner: Branch | Module) -> bool:
        numbered = name.isdigit() and self.last.isdigit()
        return numbered and _outline(inner) == _outline(self.inner)


def _grow(tree: Tree, branch: Branch) -> None:
    for run in _runs(branch):
        label = _line(run.first if run.first == run.last else f"{run.first} to {run.last}")
        if isinstance(run.inner, Module):
            tree.add(label.append_text(_stored(run.inner)))
        else:
            _grow(tree.add(label), run.inner)


def _runs(branch: Branch) -> list[_Run]:
    runs: list[_Run] = []
    for name, inner in branch.items():
        if runs and runs[-1].goes_on(name, inner):
            runs[-1] = _Run(runs[-1].first, name, inner)
        else:
            runs.append(_Run(name, name, inner))
    return runs


def _stored(module: Module) -> Text:
    rows, columns = module.shape
    stored = module.scheme or (f"16 bit ({module.reason})" if module.reason else "16 bit")
    bits = module.bits_per_weight
    shape = _line(f"  {rows} x {columns}, {bits:.2f} bits")
    return _line("  ").append_text(_line(stored, "bold")).append_text(shape)


def _outline(branch: Branch | Module) -> tuple[object, ...]:
    """Return what is equal for branches that look alike."""
    if isinstance(branch, Module):
        return branch.scheme, branch.reason, branch.shape
    return tuple((name, _outline(inner)) for name, inner in branch.items())


def _deep(deep: DeepReport) -> Iterator[RenderableType]:
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
    yield _line(f"digests: {deep.digests}")


def _against(against: Comparison) -> Iterator[RenderableType]:
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
        yield _line(f"all {len(against.modules)} layers equal those of {against.base}")
    for only, names in (("here", against.only_here), ("in the base", against.only_there)):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            yield _line(f"only {only}: {', '.join(names[:3])}{more}")


def _engine(report: EngineReport) -> Iterator[RenderableType]:
    gpu = f" on {report.gpu}" if report.gpu else ""
    where = f"{report.engine} {report.version}{gpu}, tensor parallel {report.tensor_parallel}"
    verdict = "loads" if report.native else "loads, emulated"
    if not report.loads:
        verdict = "does not load"
    yield _line(f"{where}: {verdict}", style="bold" if report.loads else STYLES["refused"])
    for finding in report.findings:
        layers = f" ({finding.count} layers, e.g. {finding.modules[0]})" if finding.modules else ""
        yield _line(
            f"  {finding.severity}[{finding.code}]: {finding.message}{layers}",
            style=STYLES[finding.severity],
        )
        yield _line(
            f"    hint: {finding.hint}" if finding.hint else f"    source: {finding.source}",
            style="dim",
        )
