"""From one format to another: what was decided is streamed through, layer by layer, checked, and
published with a manifest.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtool import __version__
from qtool.checkpoint import (
    Checkpoint,
    Staging,
    digest_files,
    open_checkpoint,
    read_json,
    resolve_model,
    sample_files,
    stage_output,
)
from qtool.checkpoint.aux_files import MANIFEST, MANIFEST_VERSION, finish_files, write_json
from qtool.checkpoint.shards import parse_size, read_ahead
from qtool.conversion.targets import PLAIN, target_named
from qtool.errors import CheckpointRefused, QtoolError, UsageError
from qtool.events import NoteEvent, OnEvent
from qtool.formats import detect
from qtool.options import ExportOptions
from qtool.scheme import scheme_from
from qtool.sizes import format_size

if TYPE_CHECKING:
    from qtool.conversion.plan import Conversion

READ_AHEAD_BYTES = 1 << 30


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
        kept = (
            "codes and scales unchanged"
            if self.format not in PLAIN
            else "dequantized"
            if self.layers
            else "copied"
        )
        how = f"{self.rounded_layers} of them rounded to nearest" if self.rounded_layers else kept
        return "\n".join(
            [
                f"{self.output}: {self.source_format} -> {self.format}, {self.layers} layers, "
                f"{how}, {self.seconds:.1f} s",
                f"size: {format_size(self.bytes_before)} -> {format_size(self.bytes_after)} in "
                f"{self.files} file{'s' if self.files > 1 else ''}",
                *(f"note: {note}" for note in self.notes),
            ]
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the result for ``--json``."""
        return {**vars(self), "output": str(self.output), "notes": list(self.notes)}


def convert(
    model_path: str | os.PathLike[str], to: str, options: ExportOptions, *, on_event: OnEvent
) -> ConversionResult:
    """Write a checkpoint in the format ``to``; see `qtool.export`."""
    start = time.monotonic()
    to = target_named(to)
    output = Path(options.output)
    requantize = options.requantize
    scheme = options.scheme
    if scheme and not requantize:
        raise UsageError(
            "E_SCHEME_UNUSED",
            f"--scheme {scheme} is what --requantize rounds to",
            hint="add --requantize",
        )
    shard_bytes = parse_size(options.max_shard_size)
    checkpoint = open_checkpoint(resolve_model(os.fspath(model_path), revision=options.revision))
    target_scheme = scheme_from(scheme) if scheme else None
    with checkpoint.weight_files[0].open("rb") as file:
        read_ahead(file.fileno(), 0, READ_AHEAD_BYTES)  # while torch is imported
    from qtool.conversion.plan import plan_conversion
    from qtool.conversion.streaming import stream

    decided = plan_conversion(checkpoint, to, requantize=requantize, scheme=target_scheme)
    for note in decided.notes:
        on_event(NoteEvent(note))
    source_manifest = (
        read_json(checkpoint.path / MANIFEST) if (checkpoint.path / MANIFEST).is_file() else None
    )
    need_bytes = sum(spec.size_bytes for spec in decided.specs) + (16 << 20)
    with stage_output(
        output, inputs=[checkpoint.path], overwrite=options.overwrite, need_bytes=need_bytes
    ) as staging:
        digests, problems = stream(decided, staging, shard_bytes, on_event)
        if problems:
            hint = f"nothing was published; {checkpoint.path} holds it too, or it does not fit {to}"
            raise CheckpointRefused("E_VALUES", problems[0], hint=hint)
        for name, content in decided.files.items():
            write_json(staging.checkpoint / name, content)
        finish_files(checkpoint.path, staging.checkpoint)
        written = _verified(decided, staging)
        digests |= digest_files(path for path in staging.files() if path.name not in digests)
        write_json(staging.checkpoint / MANIFEST, _manifest(decided, digests, source_manifest))
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


def _verified(decided: Conversion, staging: Staging) -> Checkpoint:
    """Open what was written, and hold its schemes against what was decided."""
    written = open_checkpoint(staging.checkpoint)
    layout = detect(written)
    found = {name: module.scheme for name, module in layout.modules.items()} if layout else {}
    expected = {layer.target.name: layer.target.scheme for layer in decided.layers if layer.target}
    wanted = (
        decided.files["config.json"].get("quantization_config", {}).get("kv_cache_scheme") and "fp8"
    )
    if wanted and (layout is None or layout.kv_cache != wanted):
        message = f"the KV cache was to be {wanted} and reads back as {layout and layout.kv_cache}"
        raise QtoolError(
            "E_VERIFY",
            message,
            hint="nothing was published; this is a bug in qtool, please report it",
        )
    if found != expected:
        name = next(name for name in {**found, **expected} if found.get(name) != expected.get(name))
        message = f"`{name}` was to become {expected.get(name)} and reads back as {found.get(name)}"
        raise QtoolError(
            "E_VERIFY",
            message,
            hint="nothing was published; this is a bug in qtool, please report it",
        )
    return written


def _manifest(
    decided: Conversion, files: dict[str, Any], source: dict[str, Any] | None
) -> dict[str, Any]:
    """Return what a reader needs to trust the checkpoint; what the source's own manifest says of
    how it was made is kept.
    """
    return {
        "manifest_version": MANIFEST_VERSION,
        "model": decided.checkpoint.name,
        "conversion": {
            "from": decided.layout.format if decided.layout else None,
            "to": decided.to,
            "rounded": {
                layer.target.name: str(layer.target.scheme)
                for layer in decided.layers
                if layer.target and layer.rounded
            },
            "notes": list(decided.notes),
        },
        "versions": {"qtool": __version__},
        "source_files": sample_files(decided.checkpoint.weight_files),
        "source_manifest": source
        and {key: value for key, value in source.items() if key != "files"},
        "files": files,
    }
