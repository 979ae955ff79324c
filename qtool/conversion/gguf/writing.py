"""Writes the files that a plan describes: the headers first, then each tensor at its position."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from qtool.checkpoint import digest_files
from qtool.checkpoint.digests import Digests
from qtool.checkpoint.gguf_types import UNQUANTIZED
from qtool.checkpoint.writer import make_durable
from qtool.conversion.gguf.holding import blocks_of
from qtool.conversion.gguf.plan import FilePosition, GgufPlan, PlannedTensor, align
from qtool.conversion.gguf.tensors import Piece, Unit
from qtool.conversion.streaming import layer_threads, run_bounded, worker_count
from qtool.errors import CheckpointRefused, naming
from qtool.events import OnEvent, ProgressEvent, StageEvent
from qtool.formats.gguf_blocks import TYPES, pack
from qtool.formats.gguf_rounding import quantize
from qtool.formats.packing import TORCH_DTYPES, read_stored
from qtool.formats.stored_layer import Value, dense, read_value
from qtool.weight import QuantizedWeight, with_one_scale

CHUNK = 1 << 22  # weights that are encoded at a time


@dataclass(frozen=True, eq=False)
class _Write:
    """Where the rows of a piece go."""

    tensor: PlannedTensor
    piece: Piece
    position: FilePosition


@dataclass(frozen=True)
class _File:
    """A file that is being written."""

    fd: int
    start: int
    """Where its data begins."""


def write_gguf(plan: GgufPlan, path: Path, on_event: OnEvent) -> Digests:
    """Write the file ``path``, or several by `GgufPlan.paths`; return their digests.

    Raises: CheckpointRefused, when a number is not finite or fits no type.
    """
    paths = plan.paths(path)
    starts = _write_headers(plan, path, paths)
    writes: dict[Unit, list[_Write]] = {}
    for tensor in plan.tensors:
        position = tensor.position
        for piece in tensor.assembly.pieces:
            writes.setdefault(piece.unit, []).append(_Write(tensor, piece, position))
            size = piece.count * tensor.row_bytes
            position = replace(position, offset=position.offset + size)
    workers = worker_count(max(unit.rows * unit.columns for unit in writes))
    with naming(paths[0].parent), ExitStack() as opened, layer_threads(workers) as pool:
        opened_files = [opened.enter_context(part.open("r+b")) for part in paths]
        files = [
            _File(file.fileno(), start) for file, start in zip(opened_files, starts, strict=True)
        ]
        for factors, position in plan.extra.values():
            _write_at(files, position, 0, factors.view(torch.uint8))
        tasks = _tasks(plan, files, writes)
        for done, _ in enumerate(run_bounded(pool, tasks, workers), start=1):
            on_event(ProgressEvent("converting", done, len(writes)))
    on_event(StageEvent("checking the result"))
    with ThreadPoolExecutor(1) as pool:
        durable = [pool.submit(make_durable, path) for path in paths]
        digests = digest_files(paths)
        for each in durable:
            each.result()
    return digests


def _write_headers(plan: GgufPlan, path: Path, paths: Sequence[Path]) -> list[int]:
    """Write metadata and the positions of all tensors, make room for their data, and return where
    that begins in each file.
    """
    writer = plan.writer()
    starts = []
    with naming(paths[0].parent):
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
    for part, size in zip(paths, plan.part_bytes, strict=True):
        with naming(part):
            starts.append(align(part.stat().st_size))
            os.truncate(part, starts[-1] + size)
    return starts


def _tasks(
    plan: GgufPlan, files: Sequence[_File], writes: dict[Unit, list[_Write]]
) -> Iterator[Callable[[], None]]:
    for unit, of_unit in writes.items():
        yield partial(_write_unit, plan, files, unit, of_unit)


def _write_unit(plan: GgufPlan, files: Sequence[_File], unit: Unit, writes: list[_Write]) -> None:
    is_held = writes[0].tensor.choice.is_held
    value = _source_value(plan, unit, is_held=is_held)
    for write in writes:
        offset = 0
        shift = plan.config.norm_shift(write.tensor.name)
        for rows in write.piece.chunks(CHUNK):
            taken = value[rows] if isinstance(value, Tensor) and is_held else unit.take(value, rows)
            data = _encode(write.tensor, unit, taken, shift)
            _write_at(files, write.position, offset, data)
            offset += data.numel()


def _source_value(plan: GgufPlan, unit: Unit, *, is_held: bool) -> Value:
    """Return what the source holds for ``unit``, so that single rows can be taken out of it: blocks
    that are held as bytes [R, bytes], what is not held and scattered dequantized.
    """
    if is_held and unit.is_blocks:
        return read_stored(unit.source.tensors["weight"]).reshape(unit.rows, -1)
    value = read_value(plan.request.checkpoint, plan.request.layout, unit.source)
    if isinstance(value, QuantizedWeight) and not is_held and _is_scattered(value):
        return dense(value, torch.float32)
    return value


def _is_scattered(weight: QuantizedWeight) -> bool:
    """Whether single rows cannot be taken out of ``weight``."""
    return weight.scale.shape[0] not in (1, weight.shape[0])


def _encode(tensor: PlannedTensor, unit: Unit, value: Value, shift: float) -> Tensor:
    """Return the bytes of some rows, uint8 [R, bytes]."""
    choice = tensor.choice
    if choice.is_held and isinstance(value, Tensor):
        return value
    if choice.is_held and isinstance(value, QuantizedWeight) and unit.source.module:
        bits = unit.source.module.scheme.weights.bits
        return pack(blocks_of(TYPES[choice.type], with_one_scale(value), bits))
    numbers = dense(value, torch.float32)
    if shift:
        numbers = numbers + shift
    if choice.type not in UNQUANTIZED:
        return quantize(TYPES[choice.type], numbers)
    return _unquantized(unit, numbers, choice.type)


def _unquantized(unit: Unit, numbers: Tensor, type: str) -> Tensor:
    written = numbers.to(TORCH_DTYPES[type])
    if not bool(written.isfinite().all()):
        raise CheckpointRefused(
            "E_VALUES",
            f"`{unit.name}` holds NaN, infinity, or a number that {type} does not hold",
            hint="`qtool inspect --deep` lists all of them; --type F32 keeps large numbers",
        )
    return written.view(torch.uint8)


def _write_at(files: Sequence[_File], position: FilePosition, offset: int, data: Tensor) -> None:
    """Write ``data`` to its file, ``offset`` bytes after ``position``."""
    file = files[position.part]
    offset += file.start + position.offset
    view = memoryview(data.contiguous().numpy().data).cast("B")
    done = 0
    while done < len(view):
        done += os.pwrite(file.fd, view[done:], offset + done)
