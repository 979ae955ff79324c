"""Writes what a plan says, a few layers at a time, and checks each file once it is full."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import TypeVar

import torch

from qtool.checkpoint import Staging, digest_files
from qtool.checkpoint.digests import Digests
from qtool.checkpoint.header import read_header
from qtool.checkpoint.shards import Shards
from qtool.checkpoint.writer import make_durable
from qtool.conversion.layers import Layer, Step, Write, convert_layer
from qtool.conversion.merging import merged
from qtool.conversion.plan import ConversionPlan
from qtool.events import OnEvent, ProgressEvent, StageEvent
from qtool.formats import Layout, check_tensors
from qtool.formats.packing import TORCH_DTYPES, read_tensor

WORKERS = min(8, os.cpu_count() or 1)
MEMORY_BYTES = 8 << 30  # of layers that are converted at once; one layer always is
BYTES_A_WEIGHT = 12  # codes, numbers in f32 and the result
CompleteFiles = list[Path]
Result = TypeVar("Result")


def stream(
    plan: ConversionPlan, staging: Staging, shard_bytes: int, on_event: OnEvent
) -> tuple[Digests, list[str]]:
    """Write all tensors; return the digests of the files and what is wrong with their numbers.

    A few layers are in memory at a time. A file is made durable, hashed and checked as soon as its
    last tensor is written, while the next one is written.
    """
    largest = max((math.prod(layer.source.shape) for layer in plan.layers), default=1)
    workers = worker_count(largest)
    with (
        Shards(staging.checkpoint, plan.specs, shard_bytes) as shards,
        ThreadPoolExecutor(3) as pool,
        layer_threads(workers) as layer_pool,
    ):
        checks = _Checks(pool, plan.target_layout)
        results = run_bounded(layer_pool, _tasks(plan, shards), workers)
        for done, paths in enumerate(results, start=1):
            for path in paths:
                checks.begin(path)
            on_event(ProgressEvent("converting", done, len(plan.steps)))
        on_event(StageEvent("checking the result"))
    return checks.results()


@dataclass
class _Checks:
    """What is done with complete files, in threads of its own."""

    pool: ThreadPoolExecutor
    layout: Layout
    durable: list[Future[None]] = field(default_factory=list)
    digests: list[Future[Digests]] = field(default_factory=list)
    problems: list[Future[list[str]]] = field(default_factory=list)

    def begin(self, path: Path) -> None:
        self.durable.append(self.pool.submit(make_durable, path))
        self.digests.append(self.pool.submit(digest_files, [path]))
        self.problems.append(self.pool.submit(_problems, path, self.layout))

    def results(self) -> tuple[Digests, list[str]]:
        for written in self.durable:
            written.result()  # the system reports a write that failed only once
        digests: Digests = {}
        for digest in self.digests:
            digests |= digest.result()
        return digests, [text for problem in self.problems for text in problem.result()]


def _problems(path: Path, layout: Layout) -> list[str]:
    return check_tensors(read_header(path).values(), layout)


@contextmanager
def layer_threads(count: int) -> Iterator[ThreadPoolExecutor]:
    """Give threads for layers, with a single torch thread each.

    Layers are many, and small matrices gain little from several threads.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(count) as pool:
            yield pool
    finally:
        torch.set_num_threads(before)


def _tasks(plan: ConversionPlan, shards: Shards) -> Iterator[Callable[[], CompleteFiles]]:
    """Yield what is to be done, in the order of the source's files."""
    for step in plan.steps:
        if step.layer:
            yield partial(_write_layer, plan, shards, step.layer, step)
        else:
            yield partial(_write_copies, plan, shards, step.writes)


def _write_layer(plan: ConversionPlan, shards: Shards, layer: Layer, step: Step) -> CompleteFiles:
    paths = [shards.copy(write.spec.name, write.copied) for write in step.copies if write.copied]
    tensors = convert_layer(plan.request, layer, step)
    paths += [shards.write(name, _bytes(tensor)) for name, tensor in tensors.items()]
    return [path for path in paths if path]


def _write_copies(plan: ConversionPlan, shards: Shards, writes: tuple[Write, ...]) -> CompleteFiles:
    """Write what one tensor of the source becomes: a copy, a cast, or several copies."""
    source = next((write.copied for write in writes if write.copied), None)
    if source is None:
        return []
    adapter = plan.request.adapter
    is_changed = adapter is not None and source.name in adapter.changed
    if len(writes) == 1 and writes[0].spec.dtype == source.dtype and not is_changed:
        paths = [shards.copy(writes[0].spec.name, source)]
    else:
        tensor = read_tensor(plan.request.checkpoint, source.name)
        if adapter is not None and is_changed:
            tensor = merged(adapter, source.name, tensor)
        paths = [
            shards.write(write.spec.name, _bytes(tensor.to(TORCH_DTYPES[write.spec.dtype])))
            for write in writes
        ]
    return [path for path in paths if path]


def worker_count(largest: int) -> int:
    """Return how many layers are converted at a time: fewer where the ``largest`` has many
    weights.
    """
    return max(1, min(WORKERS, MEMORY_BYTES // (largest * BYTES_A_WEIGHT)))


def run_bounded(
    pool: ThreadPoolExecutor, tasks: Iterator[Callable[[], Result]], count: int
) -> Iterator[Result]:
    """Run ``tasks``, at most ``count`` at a time, and yield what they return."""
    # a signal leaves a queue whole; `concurrent.futures.wait` may keep a lock, and then it hangs
    finished: SimpleQueue[Future[Result]] = SimpleQueue()
    running = 0
    for task in tasks:
        pool.submit(task).add_done_callback(finished.put)
        running += 1
        if running >= count:
            yield finished.get().result()
            running -= 1
    for _ in range(running):
        yield finished.get().result()


def _bytes(tensor: torch.Tensor) -> memoryview | bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().data if tensor.numel() else b""
