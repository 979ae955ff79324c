"""Writes the file that a plan describes: the header first, then each tensor at its place."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from qtool.checkpoint import digest_files
from qtool.checkpoint.digests import Digests
from qtool.checkpoint.gguf_types import UNQUANTIZED
from qtool.checkpoint.writer import make_durable
from qtool.conversion.gguf.holding import blocks_of
from qtool.conversion.gguf.plan import GgufPlan, PlannedTensor, align
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
    offset: int
    """Bytes from the start of the data."""


def write_gguf(plan: GgufPlan, path: Path, on_event: OnEvent) -> Digests:
    """Write the file ``path``; return its digest.

    Raises: CheckpointRefused, when a number is not finite or fits no type.
    """
    data_offset = _write_header(plan, path)
    writes: dict[Unit, list[_Write]] = {}
    for tensor in plan.tensors:
        offset = tensor.offset
        for piece in tensor.assembly.pieces:
            writes.setdefault(piece.unit, []).append(_Write(tensor, piece, offset))
            offset += piece.count * tensor.row_bytes
    workers = worker_count(max(unit.rows * unit.columns for unit in writes))
    with naming(path), path.open("r+b") as file, layer_threads(workers) as pool:
        _write_extra(plan, file.fileno(), data_offset)
        tasks = _tasks(plan, file.fileno(), data_offset, writes)
        for done, _ in enumerate(run_bounded(pool, tasks, workers), start=1):
            on_event(ProgressEvent("converting", done, len(writes)))
    on_event(StageEvent("checking the result"))
    with ThreadPoolExecutor(1) as pool:
        durable = pool.submit(make_durable, path)
        digests = digest_files([path])
        durable.result()
    return digests


def _write_header(plan: GgufPlan, path: Path) -> int:
    """Write metadata and the places of all tensors, make room for their data, and return where
    that begins.
    """
    writer = plan.writer()
    with naming(path):
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        start = align(path.stat().st_size)
        os.truncate(path, start + plan.size_bytes)
    return start


def _write_extra(plan: GgufPlan, target: int, data_offset: int) -> None:
    offset = data_offset + plan.extra_offset
    for tensor in plan.extra.values():
        _write_at(target, tensor.view(torch.uint8), offset)
        offset = align(offset + tensor.numel() * 4)


def _tasks(
    plan: GgufPlan, target: int, data_offset: int, writes: dict[Unit, list[_Write]]
) -> Iterator[Callable[[], None]]:
    for unit, places in writes.items():
        yield partial(_write_unit, plan, target, data_offset, unit, places)


def _write_unit(
    plan: GgufPlan, target: int, data_offset: int, unit: Unit, places: list[_Write]
) -> None:
    is_held = places[0].tensor.choice.is_held
    value = _source_value(plan, unit, is_held=is_held)
    for place in places:
        offset = data_offset + place.offset
        shift = plan.config.norm_shift(place.tensor.name)
        for rows in place.piece.chunks(CHUNK):
            taken = value[rows] if isinstance(value, Tensor) and is_held else unit.take(value, rows)
            data = _encode(place.tensor, unit, taken, shift)
            _write_at(target, data, offset)
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


def _write_at(target: int, data: Tensor, offset: int) -> None:
    view = memoryview(data.contiguous().numpy().data).cast("B")
    done = 0
    while done < len(view):
        done += os.pwrite(target, view[done:], offset + done)
