"""An `Evaluation` as tables for a terminal, as JUnit's XML and as Markdown for CI."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from qtool.checkpoint.part_costs import PartCost
from qtool.evaluation.gate import NAMES, PATTERNS, Measure
from qtool.evaluation.report import Evaluation, ShownToken, Side, Speed
from qtool.sizes import format_size
from qtool.terminal import printable

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

WORST_ROWS = 8
BAR_WIDTH = 30
CONTEXT_CHARACTERS = 40
PERCENT = {"top1", "confident_flips", "collapsed", "size_ratio"}


def render(evaluation: Evaluation) -> RenderableType:
    """Return the evaluation for a terminal: what decides first."""
    from rich.console import Group

    parts: list[RenderableType] = [*_headline(evaluation), _measures_table(evaluation)]
    if evaluation.speed:
        parts.append(_speed_table(evaluation.speed))
    if evaluation.by_layer:
        parts.append(_layers_table(evaluation.by_layer))
    if evaluation.worst:
        parts.append(_worst_table(evaluation.worst))
    parts += [
        f"{each.kind}: {_cut(each.prompt)} -> {_cut(each.answer)}" for each in evaluation.collapsed
    ]
    return Group(*parts)


def _headline(evaluation: Evaluation) -> Iterator[str]:
    data = evaluation.data
    for name, side in (("model", evaluation.model), ("reference", evaluation.reference)):
        yield f"{name}: {printable(side.path)}: {_describe(side)}"
    yield (
        f"data: {printable(data.source)}: {data.documents} documents, {data.tokens:,} tokens "
        f"predicted, windows of {data.seq_len}, on {evaluation.device} in "
        f"{evaluation.seconds:.1f} s"
    )
    for scheme in evaluation.model.dequantizes:
        yield f"note: no kernel for {scheme} here: its layers are dequantized at every step"
    yield from (f"note: {note}" for note in evaluation.notes)
    yield from (f"fault: {fault}" for fault in evaluation.faults)
    yield from (f"gate {check}" for check in evaluation.checks)


def _describe(side: Side) -> str:
    schemes = ", ".join(
        f"{sum(kernels.values())} layers of {scheme} by {' and '.join(kernels)}"
        for scheme, kernels in side.schemes.items()
    )
    return f"{format_size(side.size_bytes)}, {schemes or '16 bit'}, {side.runs_on}"


def _measures_table(evaluation: Evaluation) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE, pad_edge=False)
    table.add_column("measure", no_wrap=True)
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("95 % interval", justify="right", no_wrap=True)
    table.add_column("meaning")
    for name, measure in evaluation.measures.items():
        table.add_row(
            name, number_text(name, measure.value), interval_text(name, measure), meaning(name)
        )
    return table


def meaning(name: str) -> str:
    """Return what the measure ``name`` is."""
    if name == "reference_ppl":
        return "the reference's perplexity"
    patterns = (text for pattern, text in PATTERNS.items() if re.fullmatch(pattern, name))
    return NAMES.get(name) or next(patterns, "")


def number_text(name: str, value: float) -> str:
    """Return ``value`` as people read the measure ``name``."""
    return f"{value:.2%}" if name in PERCENT else f"{value:.4g}"


def interval_text(name: str, measure: Measure) -> str:
    """Return the interval of a measure; empty when none is known."""
    if measure.low is None or measure.high is None:
        return ""
    return f"{number_text(name, measure.low)} to {number_text(name, measure.high)}"


def _speed_table(speed: Mapping[str, Speed]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE, pad_edge=False, title="speed", title_justify="left")
    batches = [*speed["model"].decode_ms]
    table.add_column("")
    for batch in batches:
        table.add_column(f"ms a token, batch {batch}", justify="right")
    for heading in ("prompt tokens/s", "weights", "KV cache, tokens"):
        table.add_column(heading, justify="right")
    for name, each in speed.items():
        table.add_row(
            "quantized" if name == "model" else name,
            *(f"{each.decode_ms[batch]:.2f}" for batch in batches),
            f"{each.prefill_tokens_s:,.0f}",
            format_size(each.weight_bytes),
            f"{each.cache_tokens:,}",
        )
    return table


def _layers_table(costs: Sequence[PartCost]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(
        box=box.SIMPLE, pad_edge=False, title="parts that cost most, alone", title_justify="left"
    )
    for heading in ("part", "scheme", "mean KL", ""):
        table.add_column(heading, no_wrap=True)
    highest = (
        max((each.mean_kl for each in costs if math.isfinite(each.mean_kl)), default=0.0) or 1.0
    )
    for each in costs[:WORST_ROWS]:
        share = min(each.rank / highest, 1)
        bar = "█" * max(1, round(BAR_WIDTH * share))
        table.add_row(printable(each.part), ", ".join(each.schemes), f"{each.mean_kl:.4g}", bar)
    return table


def _worst_table(worst: Sequence[ShownToken]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(
        box=box.SIMPLE, pad_edge=False, title="where they differ most", title_justify="left"
    )
    for heading in ("KL", "where", "text before", "follows", "reference", "quantized"):
        table.add_column(heading, no_wrap=True)
    for each in worst[:WORST_ROWS]:
        table.add_row(
            f"{each.kl:.2f}",
            f"{printable(each.where.rpartition('/')[2])}+{each.position}",
            _cut(each.context),
            _quoted(each.following),
            f"{_quoted(each.reference)} {each.reference_probability:.0%}",
            f"{_quoted(each.quantized)} {each.probability:.0%}",
        )
    return table


def _cut(text: str) -> str:
    """Return the end of ``text``, on one line."""
    return printable(repr(text)[1:-1][-CONTEXT_CHARACTERS:])


def _quoted(text: str) -> str:
    return printable(repr(text)[:20])


def junit(evaluation: Evaluation) -> str:
    """Return the gate as a JUnit test suite: a test case for each limit."""
    suite = ElementTree.Element(
        "testsuite",
        name="qtool eval",
        tests=str(len(evaluation.checks)),
        failures=str(len(evaluation.failed)),
        errors="0",
        time=f"{evaluation.seconds:.3f}",
    )
    for check in evaluation.checks:
        case = ElementTree.SubElement(
            suite, "testcase", classname="qtool.gate", name=str(check.limit)
        )
        if check.verdict != "pass":
            ElementTree.SubElement(case, "failure", message=str(check), type=check.verdict)
    if evaluation.faults:
        ElementTree.SubElement(suite, "system-out").text = printable("; ".join(evaluation.faults))
    ElementTree.indent(suite)
    return (
        '<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(suite, "unicode") + "\n"
    )


def markdown(evaluation: Evaluation) -> str:
    """Return the evaluation as Markdown, for the summary of a CI job."""
    verdict = ""
    if evaluation.checks:
        verdict = "failed" if evaluation.failed else "passed"
    lines = [
        f"### qtool eval{': gate ' + verdict if verdict else ''}",
        "",
        f"`{_cell(evaluation.model.path)}` against `{_cell(evaluation.reference.path)}`, "
        f"{evaluation.data.tokens:,} tokens of `{_cell(evaluation.data.source)}`",
        "",
    ]
    if evaluation.checks:
        lines += ["| limit | measured | verdict |", "|---|---|---|"]
        lines += [
            f"| `{check.limit}` | {number_text(check.limit.name, check.measure.value)} | "
            f"{check.verdict} |"
            for check in evaluation.checks
        ]
        lines.append("")
    said = [f"- {_cell(each)}" for each in (*evaluation.faults, *evaluation.notes)]
    lines += [*said, ""] if said else []
    lines += ["| measure | value | 95 % interval |", "|---|---|---|"]
    lines += [
        f"| {name} | {number_text(name, each.value)} | {interval_text(name, each)} |"
        for name, each in evaluation.measures.items()
    ]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return printable(text).replace("|", "\\|").replace("`", "'")
