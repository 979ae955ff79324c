"""Converts a checkpoint: plans, writes, checks what was written, and publishes it."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

from qtool import __version__
from qtool.architecture import check_model
from qtool.checkpoint import (
    Checkpoint,
    SourceFiles,
    Staging,
    check_output,
    digest_files,
    open_checkpoint,
    resolve_model,
    sample_files,
    source_files,
    stage_output,
)
from qtool.checkpoint.aux_files import finish_files, licences, write_json
from qtool.checkpoint.digests import Digests
from qtool.checkpoint.gguf import open_gguf
from qtool.checkpoint.gguf_header import SPLIT_NAME
from qtool.checkpoint.manifest import (
    MANIFEST,
    MANIFEST_VERSION,
    check_manifest,
    has_manifest,
    read_manifest,
)
from qtool.checkpoint.shards import parse_size, read_ahead
from qtool.conversion.adapter import Adapter, read_adapter
from qtool.conversion.gguf.types import file_type_named
from qtool.conversion.request import ConversionRequest, make_request
from qtool.conversion.targets import GGUF, UNQUANTIZED, target_named
from qtool.errors import ANY_FILE, CheckpointRefused, QtoolError, UsageError, file_errors
from qtool.events import NoteEvent, OnEvent, PublishedEvent
from qtool.formats import Layout, detect
from qtool.inspection.model_card import source_metadata, write_card
from qtool.options import ExportOptions
from qtool.scheme import scheme_from
from qtool.sizes import format_size
from qtool.terminal import printable

if TYPE_CHECKING:
    from qtool.conversion.gguf.plan import GgufPlan
    from qtool.conversion.plan import ConversionPlan

READ_AHEAD_BYTES = 1 << 30
SHARD_BYTES = 5 * 10**9
FREE_BYTES = 16 << 20  # beside tensors and auxiliary files: headers and JSON files


@dataclass(frozen=True)
class ConversionResult:
    """What a conversion wrote."""

    output: Path
    """The folder; it is complete, checked, and described by its manifest."""
    source_format: str
    format: str
    layers: int
    """How many layers were converted."""
    rounded_layers: int
    """How many of them have new codes."""
    merged_tensors: int
    """How many tensors an adapter changed."""
    files: int
    """How many safetensors files there are."""
    bytes_before: int
    bytes_after: int
    seconds: float
    notes: tuple[str, ...]
    """What the user should know."""

    def summary(self) -> str:
        """Return the result in a few lines."""
        plural = "s" if self.files > 1 else ""
        return "\n".join(
            [
                f"{printable(str(self.output))}: {self.source_format} -> {self.format}, "
                f"{self.layers} layers, {self._change()}, {self.seconds:.1f} s",
                f"size: {format_size(self.bytes_before)} -> {format_size(self.bytes_after)} in "
                f"{self.files} file{plural}",
            ]
        )

    def _change(self) -> str:
        if self.rounded_layers:
            return f"{self.rounded_layers} of them rounded to nearest"
        if self.format == GGUF and not self.layers:
            return "not quantized"
        if self.format not in UNQUANTIZED:
            return "codes and scales unchanged"
        if self.merged_tensors:
            return f"an adapter merged into {self.merged_tensors} tensors"
        return "dequantized" if self.layers else "copied"

    def to_dict(self) -> dict[str, object]:
        """Return the result for ``--json``."""
        return {**vars(self), "output": str(self.output), "notes": list(self.notes)}


@file_errors(reading=[ANY_FILE])
def convert(
    model_path: str | os.PathLike[str], to: str, options: ExportOptions, *, on_event: OnEvent
) -> ConversionResult:
    """Write a checkpoint in the format ``to``; see `qtool.export`."""
    start = time.monotonic()
    to = target_named(to)
    output = Path(options.output)
    shard_bytes = parse_size(options.max_shard_size) if options.max_shard_size is not None else None
    checkpoint = open_checkpoint(resolve_model(os.fspath(model_path), revision=options.revision))
    source = source_files(checkpoint)
    source_manifest = _source_manifest(checkpoint)
    inputs = [checkpoint.path, *checkpoint.weight_files]
    check_output(
        output,
        inputs=inputs,
        overwrite=options.overwrite,
        names=source.aux_names,
    )
    request = _make_request(checkpoint, to, options)
    with checkpoint.weight_files[0].open("rb") as file:
        read_ahead(file.fileno(), 0, READ_AHEAD_BYTES)  # while torch is imported
    plan = _plan(request, options, shard_bytes)
    notes = (*source.notes, *plan.notes)
    for note in notes:
        on_event(NoteEvent(note))
    need_bytes = plan.size_bytes + source.aux_bytes + FREE_BYTES
    with ExitStack() as stack:
        staging = stack.enter_context(
            stage_output(
                output,
                inputs=inputs,
                overwrite=options.overwrite,
                need_bytes=need_bytes,
            )
        )
        thread = stack.enter_context(ThreadPoolExecutor(max_workers=1))
        stop = threading.Event()
        stack.callback(stop.set)  # a run that ends early does not wait for its digests
        source_digests = thread.submit(_source_digests, checkpoint, stop)
        if to == GGUF:
            written, digests = _write_gguf(cast("GgufPlan", plan), source, staging, on_event)
        else:
            folder = cast("ConversionPlan", plan)
            limit = SHARD_BYTES if shard_bytes is None else shard_bytes
            written, digests = _write(folder, source, staging, limit, on_event)
        made = {**_manifest(plan), "source_manifest": source_manifest}
        card = write_card(written, output.name, made, on_event)
        manifest = {
            **made,
            "source_files": source_digests.result(),
            "files": {**digests, **digest_files(card)},
        }
        write_json(staging.checkpoint / MANIFEST, manifest)
        source.check_unchanged(source_digests.result())
        if request.adapter:
            request.adapter.check_unchanged()
        staging.publish()
        on_event(PublishedEvent(str(staging.output)))
    return ConversionResult(
        output=output.absolute(),
        source_format=plan.source_format or "16 bit",
        format=to,
        layers=plan.layer_count,
        rounded_layers=len(plan.rounded),
        merged_tensors=len(request.adapter.changed) if request.adapter else 0,
        files=len(written.weight_files),
        bytes_before=checkpoint.size_bytes,
        bytes_after=written.size_bytes,
        seconds=time.monotonic() - start,
        notes=notes,
    )


def _make_request(checkpoint: Checkpoint, to: str, options: ExportOptions) -> ConversionRequest:
    """Return what ``options`` ask for, once config and tensors were found to be one model.

    Raises: UsageError, for options that do not go together; CheckpointRefused.
    """
    _check_gguf_options(to, options)
    if options.scheme and not options.requantize:
        raise UsageError(
            "E_SCHEME_UNUSED",
            f"--scheme {options.scheme} is what --requantize rounds to",
            hint="add --requantize",
        )
    scheme = scheme_from(options.scheme) if options.scheme else None
    request = make_request(checkpoint, to, requantize=options.requantize, scheme=scheme)
    check_model(checkpoint, request.layout)
    if not options.merge_lora:
        return request
    if request.layout is not None or not request.dequantizes:
        raise UsageError(
            "E_MERGE_LORA",
            f"--merge-lora merges into a 16-bit checkpoint: {checkpoint.source} "
            + ("is quantized" if request.layout is not None else f"was to become {to}"),
            hint="merge into the 16-bit model with `--to bf16`, and quantize what comes out",
        )
    return replace(request, adapter=read_adapter(options.merge_lora, checkpoint))


def _write(
    plan: ConversionPlan,
    source: SourceFiles,
    staging: Staging,
    shard_bytes: int,
    on_event: OnEvent,
) -> tuple[Checkpoint, Digests]:
    """Write the whole checkpoint but its manifest, check it, and return it as it reads back, with
    the digests of its files.
    """
    from qtool.conversion.streaming import stream

    digests, problems = stream(plan, staging, shard_bytes, on_event)
    if problems:
        raise CheckpointRefused(
            "E_VALUES",
            problems[0],
            hint=(
                f"nothing was published; either {source.folder} holds the same value, or the value "
                f"does not fit {plan.request.to}"
            ),
        )
    for name, content in plan.files.items():
        write_json(staging.checkpoint / name, content)
    finish_files(source.aux, source.folder, staging.checkpoint)
    written = _verify(plan, staging)
    weights = {staging.checkpoint / name for name in digests}
    others = [path for path in staging.files() if path not in weights]
    digests |= digest_files(others, root=staging.checkpoint)
    return written, digests


def _check_gguf_options(to: str, options: ExportOptions) -> None:
    """Raise UsageError for an option of GGUF with another format, an option without a meaning in
    GGUF, and an output whose file would be named as a part of a split model.
    """
    if options.type and to != GGUF:
        raise UsageError(
            "E_TYPE_UNUSED",
            f"--type {options.type} has a meaning only with --to {GGUF}",
            hint="--requantize --scheme is what other formats are rounded to",
        )
    if options.scheme and to == GGUF:
        raise UsageError(
            "E_SCHEME_UNUSED", "GGUF has types and no schemes", hint="--type Q4_K_M rounds to one"
        )
    name = f"{Path(options.output).name}.gguf"
    if to == GGUF and SPLIT_NAME.fullmatch(name):
        raise UsageError(
            "E_OUTPUT_PLACE",
            f"a file named {name} is a part of a split model",
            hint="choose another --output; --max-shard-size splits the file",
        )


def _plan(
    request: ConversionRequest, options: ExportOptions, shard_bytes: int | None
) -> ConversionPlan | GgufPlan:
    """Return the plan; torch is imported for it."""
    if request.to != GGUF:
        from qtool.conversion.plan import plan_conversion

        return plan_conversion(request)
    from qtool.conversion.gguf.plan import plan_gguf

    file_type = file_type_named(options.type) if options.type else None
    return plan_gguf(request, file_type, shard_bytes)


def _write_gguf(
    plan: GgufPlan, source: SourceFiles, staging: Staging, on_event: OnEvent
) -> tuple[Checkpoint, Digests]:
    """Write the files, check their headers, and return them as they read back, with digests."""
    from qtool.conversion.gguf.writing import write_gguf

    path = staging.checkpoint / f"{staging.output.name}.gguf"
    digests = write_gguf(plan, path, on_event)
    finish_files(licences(source.aux), source.folder, staging.checkpoint)
    written = open_gguf(plan.paths(path)[0], derives_folder=False)
    planned = sum(tensor.size_bytes for tensor in plan.tensors)
    if written.size_bytes != planned:
        raise _bug(f"{planned} bytes of tensors were to be written, and {written.size_bytes} are")
    digests |= digest_files(path for path in staging.files() if path.name not in digests)
    return written, digests


def _verify(plan: ConversionPlan, staging: Staging) -> Checkpoint:
    """Open what was written, and compare its schemes and its KV cache with the plan."""
    written = open_checkpoint(staging.checkpoint, is_written=True)
    layout = detect(written)
    _verify_cache(plan, layout)
    modules = layout.modules if layout else {}
    found = {name: module.scheme for name, module in modules.items()}
    expected = {name: module.scheme for name, module in plan.targets.items()}
    for name in {**found, **expected}:
        if found.get(name) != expected.get(name):
            raise _bug(
                f"`{name}` was to become {expected.get(name)} and reads back as {found.get(name)}"
            )
    return written


def _verify_cache(plan: ConversionPlan, layout: Layout | None) -> None:
    config = plan.files["config.json"].get("quantization_config")
    if isinstance(config, Mapping) and config.get("kv_cache_scheme"):
        found = layout.kv_cache if layout else None
        if found != "fp8":
            raise _bug(f"the KV cache was to be fp8 and reads back as {found}")


def _bug(message: str) -> QtoolError:
    return QtoolError(
        "E_VERIFY", message, hint="nothing was published; this is a bug in qtool, please report it"
    )


def _source_manifest(checkpoint: Checkpoint) -> dict[str, object] | None:
    """Return what the source's own manifest says of how it was made; None when it has none.

    Raises: CheckpointRefused, when the names or sizes of the files are not those of the manifest.
        Their data is compared during the run, where it is read anyway.
    """
    folder = checkpoint.published_folder
    if not has_manifest(folder):
        return None
    check = check_manifest(folder, read_data=False)
    if not check.matches:
        raise check.refusal(folder)
    return {key: value for key, value in read_manifest(folder).items() if key != "files"}


def _source_digests(checkpoint: Checkpoint, stop: threading.Event) -> Digests:
    """Return the digests of the source's weights: of all bytes when its manifest has them to
    compare with, else of samples.

    Raises: CheckpointRefused, when a file differs from the manifest.
    """
    if not has_manifest(checkpoint.published_folder):
        return sample_files(checkpoint.weight_files)
    check = check_manifest(checkpoint.published_folder, stop=stop)
    if not check.matches:
        raise check.refusal(checkpoint.published_folder)
    return {file.name: check.digests[file.name] for file in checkpoint.weight_files}


def _manifest(plan: ConversionPlan | GgufPlan) -> dict[str, object]:
    """Return what a reader needs to trust the checkpoint."""
    checkpoint = plan.request.checkpoint
    return {
        "manifest_version": MANIFEST_VERSION,
        "model": checkpoint.name,
        "source": source_metadata(checkpoint),
        "conversion": {
            "from": plan.source_format,
            "to": plan.request.to,
            "rounded": dict(plan.rounded),
            **_adapter_source(plan.request.adapter),
            "notes": list(plan.notes),
        },
        "versions": {"qtool": __version__},
    }


def _adapter_source(adapter: Adapter | None) -> dict[str, object]:
    """Return what the manifest says of the adapter that was merged."""
    if adapter is None:
        return {}
    base = adapter.config.get("base_model_name_or_path")
    files = dict(adapter.digests)
    return {"adapter": {"name": adapter.folder.name, "base_model": base, "files": files}}
