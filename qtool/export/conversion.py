"""From one format to another: what was decided is streamed through, layer by layer, checked, and published with a manifest."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qtool import __version__
from qtool.checkpoint import Checkpoint, Staging, digest_files, open_checkpoint, read_json, resolve_model, sample_files, stage_output
from qtool.checkpoint.reader import read_header
from qtool.checkpoint.shards import Shards, parse_size
from qtool.checkpoint.sidecars import MANIFEST, MANIFEST_VERSION, finish_files, write_json
from qtool.errors import CheckpointRefused, QtoolError, UsageError, nearest
from qtool.export.decision import PLAIN, TARGETS, Conversion, decide
from qtool.export.layers import Layer, Write, computed_tensors
from qtool.formats import Layout, check_tensors, detect
from qtool.formats.packing import TORCH_DTYPES, read_tensor
from qtool.quantize import OnEvent
from qtool.scheme import scheme_from

MAX_SHARD_SIZE = "5GB"
ALIASES = {
    "fp16": "f16",
    "float16": "f16",
    "bfloat16": "bf16",
    "fp8": "fp8_block",
    "fp8-block": "fp8_block",
    "compressed_tensors": "compressed-tensors",
}
WORKERS = min(8, os.cpu_count() or 1)


@dataclass(frozen=True)
class ConversionResult:
    """What a conversion wrote: ``output`` is complete, checked, and described by its manifest."""

    output: Path
    source_format: str
    format: str
    layers: int
    rounded_layers: int
    files: int
    bytes_before: int
    bytes_after: int
    seconds: float
    notes: tuple[str, ...]

    def summary(self) -> str:
        """Return the result in a few lines."""
        kept = "dequantized" if self.format in PLAIN else "codes and scales unchanged"
        how = f"{self.rounded_layers} of them rounded to nearest" if self.rounded_layers else kept
        return "\n".join(
            [
                f"{self.output}: {self.source_format} -> {self.format}, {self.layers} layers, {how}, {self.seconds:.1f} s",
                f"size: {self.bytes_before / 1e6:,.1f} MB -> {self.bytes_after / 1e6:,.1f} MB in {self.files} file{'s' if self.files > 1 else ''}",
                *(f"note: {note}" for note in self.notes),
            ]
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the result for ``--json``."""
        return {**vars(self), "output": str(self.output), "notes": list(self.notes)}


def convert(
    model_path: str | os.PathLike[str],
    *,
    to: str,
    output: Path,
    requantize: bool,
    scheme: str | None,
    max_shard_size: str,
    overwrite: bool,
    revision: str | None,
    on_event: OnEvent,
) -> ConversionResult:
    """Write the checkpoint in ``model_path`` to ``output`` in the format ``to``; `qtool.export.export` tells the rest."""
    start = time.monotonic()
    to = ALIASES.get(to.lower(), to.lower())
    if to not in TARGETS:
        raise UsageError("E_UNKNOWN_FORMAT", f"unknown format `{to}`", hint=nearest(to, TARGETS) or f"one of {', '.join(TARGETS)}")
    if scheme and not requantize:
        raise UsageError("E_SCHEME_UNUSED", f"--scheme {scheme} is what --requantize rounds to", hint="add --requantize")
    shard_bytes = parse_size(max_shard_size)
    checkpoint = open_checkpoint(resolve_model(os.fspath(model_path), revision=revision))
    decided = decide(checkpoint, to, requantize=requantize, scheme=scheme_from(scheme) if scheme else None)
    for note in decided.notes:
        on_event({"event": "note", "text": note})
    need_bytes = sum(spec.size_bytes for spec in decided.specs) + (16 << 20)
    with stage_output(output, inputs=[checkpoint.path], overwrite=overwrite, need_bytes=need_bytes) as staging:
        digests, problems = _stream(decided, staging, shard_bytes, on_event)
        if problems:
            hint = f"nothing was published; {checkpoint.path} holds it too, or it does not fit {to}"
            raise CheckpointRefused("E_VALUES", problems[0], hint=hint)
        for name, content in decided.files.items():
            write_json(staging.checkpoint / name, content)
        finish_files(checkpoint.path, staging.checkpoint)
        written = _verified(decided, staging)
        digests |= digest_files(path for path in staging.files() if path.name not in digests)
        write_json(staging.checkpoint / MANIFEST, _manifest(decided, digests))
        staging.publish()
    return ConversionResult(
        output=output.absolute(),
        source_format=decided.layout.format if decided.layout else "16 bit",
        format=to,
        layers=len(decided.layers),
        rounded_layers=sum(layer.rounded for layer in decided.layers),
        files=len(written.weight_files),
        bytes_before=checkpoint.size_bytes,
        bytes_after=written.size_bytes,
        seconds=time.monotonic() - start,
        notes=decided.notes,
    )


def _stream(decided: Conversion, staging: Staging, shard_bytes: int, on_event: OnEvent) -> tuple[dict[str, Any], list[str]]:
    """Write all tensors, a few layers in memory at a time; return the digests of the files and what is wrong with their numbers.

    A file is hashed and checked as soon as its last tensor is there, beside the writing of the next.
    """
    specs = list(decided.specs)
    total = sum(spec.size_bytes for spec in specs) >> 20
    layout = Layout(decided.to, {layer.target.name: layer.target for layer in decided.layers if layer.target}, None, ())
    done, digests, problems = 0, [], []
    with Shards(staging.checkpoint, specs, shard_bytes) as shards, ThreadPoolExecutor(2) as checkers, _layer_threads() as pool:
        for paths, size in _bounded(pool, _tasks(decided, shards)):
            for path in paths:
                digests.append(checkers.submit(digest_files, [path]))
                problems.append(checkers.submit(_problems, path, layout))
            done += size
            on_event({"event": "progress", "what": "converting (MB)", "done": done >> 20, "total": total})
        on_event({"event": "stage", "what": "checking the result"})
    return {name: found for future in digests for name, found in future.result().items()}, [text for future in problems for text in future.result()]


def _problems(path: Path, layout: Layout) -> list[str]:
    return check_tensors(read_header(path).values(), layout)


@contextmanager
def _layer_threads() -> Iterator[ThreadPoolExecutor]:
    """Give threads for layers, each with one of torch's own: layers are many, and small matrices do not share well."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(WORKERS) as pool:
            yield pool
    finally:
        torch.set_num_threads(before)


Written = tuple[list[Path], int]  # files that are complete, bytes written


def _tasks(decided: Conversion, shards: Shards) -> Iterator[Callable[[], Written]]:
    """Yield what is to be done, in the order of the source's files."""

    def run(layer: Layer | None, writes: Sequence[Write]) -> Written:
        paths = [shards.copy(write.spec.name, write.copied) for write in writes if write.copied and write.copied.dtype == write.spec.dtype]
        for write in writes:
            if write.copied and write.copied.dtype != write.spec.dtype:
                cast = read_tensor(decided.checkpoint, write.copied.name).to(TORCH_DTYPES[write.spec.dtype])
                paths.append(shards.write(write.spec.name, _bytes(cast)))
        if layer and any(write.copied is None for write in writes):
            computed = computed_tensors(decided.checkpoint, decided.layout, layer, writes, decided.to, decided.dtype)
            paths += [shards.write(name, _bytes(tensor)) for name, tensor in computed.items()]
        return [path for path in paths if path], sum(write.spec.size_bytes for write in writes)

    return (partial(run, layer, writes) for layer, writes in decided.steps)


def _bounded(pool: ThreadPoolExecutor, tasks: Iterator[Callable[[], Written]]) -> Iterator[Written]:
    """Run ``tasks`` and yield what they return, no more of them begun at a time than the pool has threads."""
    running: set[Future[Written]] = set()
    for task in tasks:
        running.add(pool.submit(task))
        if len(running) >= WORKERS:
            finished, running = wait(running, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in finished)
    yield from (future.result() for future in running)


def _bytes(tensor: torch.Tensor) -> Any:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().data if tensor.numel() else b""


def _verified(decided: Conversion, staging: Staging) -> Checkpoint:
    """Open what was written, and hold its schemes against what was decided."""
    written = open_checkpoint(staging.checkpoint)
    layout = detect(written)
    found = {name: module.scheme for name, module in layout.modules.items()} if layout else {}
    expected = {layer.target.name: layer.target.scheme for layer in decided.layers if layer.target}
    if found != expected:
        name = next(name for name in {**found, **expected} if found.get(name) != expected.get(name))
        message = f"`{name}` was to become {expected.get(name)} and reads back as {found.get(name)}"
        raise QtoolError("E_VERIFY", message, hint="nothing was published; this is a bug in qtool, please report it")
    return written


def _manifest(decided: Conversion, files: dict[str, Any]) -> dict[str, Any]:
    """Return what a reader needs to trust the checkpoint; what the source's own manifest says of how it was made is kept."""
    source = decided.checkpoint.path / MANIFEST
    return {
        "manifest_version": MANIFEST_VERSION,
        "model": decided.checkpoint.name,
        "conversion": {
            "from": decided.layout.format if decided.layout else None,
            "to": decided.to,
            "rounded": {layer.target.name: str(layer.target.scheme) for layer in decided.layers if layer.target and layer.rounded},
            "notes": list(decided.notes),
        },
        "versions": {"qtool": __version__},
        "source_files": sample_files(decided.checkpoint.weight_files),
        "source_manifest": {key: value for key, value in read_json(source).items() if key != "files"} if source.is_file() else None,
        "files": files,
    }
