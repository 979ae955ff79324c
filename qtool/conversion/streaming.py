"""A conversion as it is carried out: layers in parallel, a few in memory at a time, each file
hashed and checked while the next is written.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qtool.checkpoint import Staging, digest_files
from qtool.checkpoint.reader import read_header
from qtool.checkpoint.shards import Shards
from qtool.checkpoint.writer import make_durable
from qtool.conversion.layers import Layer, Write, computed_tensors
from qtool.conversion.plan import Conversion
from qtool.events import OnEvent, ProgressEvent, StageEvent
from qtool.formats import Layout, check_tensors
from qtool.formats.packing import TORCH_DTYPES, read_tensor

WORKERS = min(8, os.cpu_count() or 1)
MEMORY_BYTES = 8 << 30  # of layers at work together; one layer is always worked on
BYTES_A_WEIGHT = 12  # codes, numbers in f32 and the result


def stream(
    decided: Conversion, staging: Staging, shard_bytes: int, on_event: OnEvent
) -> tuple[dict[str, Any], list[str]]:
    """Write all tensors, a few layers in memory at a time; return the digests of the files and what
    is wrong with their numbers.

    A file is written out, hashed and checked as soon as its last tensor is there, beside the
    writing of the next.
    """
    layout = Layout(
        decided.to,
        {layer.target.name: layer.target for layer in decided.layers if layer.target},
        None,
        (),
    )
    durable, digests, problems = [], [], []
    with (
        Shards(staging.checkpoint, decided.specs, shard_bytes) as shards,
        ThreadPoolExecutor(3) as checkers,
        _layer_threads(_workers(decided)) as pool,
    ):
        for done, paths in enumerate(
            _bounded(pool, _tasks(decided, shards), _workers(decided)), start=1
        ):
            for path in paths:
                durable.append(checkers.submit(make_durable, path))
                digests.append(checkers.submit(digest_files, [path]))
                problems.append(checkers.submit(_problems, path, layout))
            on_event(ProgressEvent("converting", done, len(decided.steps)))
        on_event(StageEvent("checking the result"))
    for future in durable:
        future.result()  # the system tells of a write that failed once
    return {name: found for future in digests for name, found in future.result().items()}, [
        text for future in problems for text in future.result()
    ]


def _problems(path: Path, layout: Layout) -> list[str]:
    return check_tensors(read_header(path).values(), layout)


@contextmanager
def _layer_threads(count: int) -> Iterator[ThreadPoolExecutor]:
    """Give threads for layers, each with one of torch's own: layers are many, and small matrices do
    not share well.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(count) as pool:
            yield pool
    finally:
        torch.set_num_threads(before)


Written = list[Path]  # files that are complete


def _tasks(decided: Conversion, shards: Shards) -> Iterator[Callable[[], Written]]:
    """Yield what is to be done, in the order of the source's files."""

    def run(layer: Layer | None, writes: Sequence[Write]) -> Written:
        paths = [
            shards.copy(write.spec.name, write.copied)
            for write in writes
            if write.copied and write.copied.dtype == write.spec.dtype
        ]
        for write in writes:
            if write.copied and write.copied.dtype != write.spec.dtype:
                cast = read_tensor(decided.checkpoint, write.copied.name).to(
                    TORCH_DTYPES[write.spec.dtype]
                )
                paths.append(shards.write(write.spec.name, _bytes(cast)))
        if layer and any(write.copied is None for write in writes):
            computed = computed_tensors(
                decided.checkpoint, decided.layout, layer, writes, decided.to, decided.dtype
            )
            paths += [shards.write(name, _bytes(tensor)) for name, tensor in computed.items()]
        return [path for path in paths if path]

    return (partial(run, layer, writes) for layer, writes in decided.steps)


def _workers(decided: Conversion) -> int:
    """Return how many layers are converted at a time, fewer where they are large, as stacked
    experts are.
    """
    largest = max((math.prod(layer.source.shape) for layer in decided.layers), default=1)
    return max(1, min(WORKERS, MEMORY_BYTES // (largest * BYTES_A_WEIGHT)))


def _bounded(
    pool: ThreadPoolExecutor, tasks: Iterator[Callable[[], Written]], count: int
) -> Iterator[Written]:
    """Run ``tasks`` and yield what they return, no more of them begun at a time than the pool has
    threads.
    """
    running: set[Future[Written]] = set()
    for task in tasks:
        running.add(pool.submit(task))
        if len(running) >= count:
            finished, running = wait(running, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in finished)
    yield from (future.result() for future in running)


def _bytes(tensor: torch.Tensor) -> Any:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().data if tensor.numel() else b""
