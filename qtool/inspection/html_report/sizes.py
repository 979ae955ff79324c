"""The size bars of the HTML report: bytes by scheme, in 16 bits and as stored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qtool.inspection.report import Inspection, Row

MAX_PARTS = 7  # of a bar; the rest is one part


@dataclass(frozen=True)
class SizePart:
    """One part of both bars: the tensors that are stored in one way."""

    index: int
    name: str
    count: int
    before: int
    """Bytes in 16 bits."""
    after: int
    """Bytes as stored."""
    before_width: float
    """In percent of the longer bar."""
    after_width: float
    quantized: bool

    @property
    def bits(self) -> float | None:
        """Stored bits of one weight; None where there are no weights."""
        return 16 * self.after / self.before if self.before else None


@dataclass(frozen=True)
class SizeBars:
    """Both bars, and the ratio of their lengths."""

    parts: list[SizePart]
    ratio: str
    ratio_unit: str


@dataclass(frozen=True)
class _Sum:
    name: str
    count: int
    before: int
    after: int


def size_bars(inspection: Inspection) -> SizeBars:
    """Return how the bytes of a checkpoint divide among schemes and unquantized tensors."""
    schemes = {row.scheme for row in inspection.quantized}
    sums = [_sum_of_rows(name, rows) for name, rows in _rows_by_name(inspection).items()]
    sums = [*sums[:MAX_PARTS], *_merge(sums[MAX_PARTS:])]
    rest = inspection.size_bytes - sum(part.after for part in sums)
    if rest > 0:
        sums.append(_Sum("file headers and padding", 0, 0, rest))
    longest = max(inspection.unquantized_bytes, inspection.size_bytes, 1)
    parts = [
        SizePart(
            index=index,
            name=part.name,
            count=part.count,
            before=part.before,
            after=part.after,
            before_width=100 * part.before / longest,
            after_width=100 * part.after / longest,
            quantized=index < len(schemes),
        )
        for index, part in enumerate(sums)
    ]
    ratio, unit = _ratio(inspection.unquantized_bytes, inspection.size_bytes)
    return SizeBars(parts, ratio, unit)


def _rows_by_name(inspection: Inspection) -> dict[str, list[Row]]:
    rows: dict[str, list[Row]] = {}
    for row in inspection.quantized:
        rows.setdefault(row.scheme, []).append(row)
    for row in inspection.unquantized:
        name = f"{row.scheme}, not quantized" if row.parameters else "scales and other tensors"
        rows.setdefault(name, []).append(row)
    return rows


def _sum_of_rows(name: str, rows: Sequence[Row]) -> _Sum:
    return _Sum(
        name,
        count=sum(row.count for row in rows),
        before=2 * sum(row.parameters for row in rows),
        after=sum(row.size_bytes for row in rows),
    )


def _merge(sums: Sequence[_Sum]) -> list[_Sum]:
    if not sums:
        return []
    return [
        _Sum(
            "all others",
            count=sum(part.count for part in sums),
            before=sum(part.before for part in sums),
            after=sum(part.after for part in sums),
        )
    ]


def _ratio(before: int, after: int) -> tuple[str, str]:
    """Return how much smaller or larger a checkpoint has become, and the unit of that."""
    if not before or not after:
        return "–", ""
    if abs(before - after) < 0.005 * before:
        return "same size", ""
    if before > after:
        return f"{before / after:.2f}", "× smaller"
    return f"{after / before:.2f}", "× larger"
