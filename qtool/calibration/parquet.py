"""Records of a Parquet file: row groups are read in their order, as few times as possible."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from qtool.calibration.spec import FIELDS, CalibrationSpec, Rows, shuffled
from qtool.errors import DataRefused, one_line

if TYPE_CHECKING:
    from pyarrow import RecordBatch
    from pyarrow.parquet import ParquetFile

BATCH_ROWS = 1024
BATCH_BYTES = 8 << 20
SMALL_BYTES = 64 << 20  # if the rows of one pass have less, the next pass takes more rows


def parquet_rows(path: Path, spec: CalibrationSpec) -> Rows:
    """Yield the records of the file ``path`` in random order.

    One pass through the file reads as many rows as samples are wanted. If too many of them are
    unusable, each further pass reads four times as many.
    """
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            columns = _columns(path, file.schema_arrow.names, spec)
            order = shuffled(file.metadata.num_rows, spec.seed)
            count = spec.num_samples
            while drawn := list(islice(order, count)):
                found, size_bytes = _read(file, sorted(drawn), columns)
                for row in drawn:
                    yield f"{path}, row {row + 1}", _record(path, row, found)
                if size_bytes < SMALL_BYTES:
                    count *= 4
    except MemoryError:
        raise
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno:
            raise
        raise _broken(str(path), one_line(error)) from error


def _columns(path: Path, names: list[str], spec: CalibrationSpec) -> list[str]:
    """Return the columns that are read."""
    columns = [name for name in names if name in (*FIELDS, "attention_mask", spec.text_column)]
    if not columns or spec.text_column not in (None, *names):
        columns = names  # it will be refused, with all of them named
    if len(set(columns)) < len(columns):
        twice = next(name for name in columns if columns.count(name) > 1)
        raise _broken(str(path), f"the column `{twice[:100]}` appears twice")
    return columns


@dataclass(frozen=True)
class _Unreadable:
    """A row that is refused when it is used."""

    why: str


def _read(
    file: ParquetFile, numbers: list[int], columns: list[str]
) -> tuple[dict[int, object], int]:
    """Return the records at ``numbers``, which are sorted, and their size; row groups without any
    of them are not read.
    """
    found: dict[int, object] = {}
    size_bytes = group_end = 0
    for number in range(file.num_row_groups):
        group = file.metadata.row_group(number)
        first, group_end = group_end, group_end + group.num_rows
        if bisect_left(numbers, first) == bisect_left(numbers, group_end):
            continue
        row_bytes = group.total_byte_size // max(group.num_rows, 1)
        rows = min(max(BATCH_BYTES // max(row_bytes, 1), 1), BATCH_ROWS)
        for batch in file.iter_batches(
            batch_size=rows, row_groups=[number], columns=columns, use_threads=False
        ):
            stop = bisect_left(numbers, first + batch.num_rows)
            here = numbers[bisect_left(numbers, first) : stop]
            if here:
                taken = batch.take([number - first for number in here])
                found.update(zip(here, _values(taken), strict=True))
                size_bytes += taken.nbytes
            first += batch.num_rows
    return found, size_bytes


def _values(batch: RecordBatch) -> list[object]:
    """Return the rows of ``batch``, with `_Unreadable` for those that cannot be read."""
    try:
        return list(batch.to_pylist())
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        why = f"byte {error.start + 1} of a text is 0x{byte:02x}, not UTF-8"
    except (ValueError, OverflowError) as error:
        why = one_line(error)
    if batch.num_rows == 1:
        return [_Unreadable(why)]
    return [value for row in range(batch.num_rows) for value in _values(batch.slice(row, 1))]


def _record(path: Path, row: int, found: Mapping[int, object]) -> object:
    if row not in found:
        raise _broken(str(path), "it has fewer rows than it says")
    value = found[row]
    if isinstance(value, _Unreadable):
        raise _broken(f"{path}, row {row + 1}", value.why)
    return value


def _broken(where: str, why: str) -> DataRefused:
    return DataRefused(
        "E_DATA_BINARY",
        f"{where} cannot be read as Parquet: {why}",
        hint="write it again, or as .jsonl",
    )
