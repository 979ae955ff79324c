"""Writes a checkpoint without calibrating: in another format, or from a saved ModelOpt state."""

from __future__ import annotations

import os
from dataclasses import fields

from qtool.conversion.convert import ConversionResult, convert
from qtool.conversion.targets import TARGETS
from qtool.errors import UsageError
from qtool.events import OnEvent, ignore_event
from qtool.options import ExportOptions, QuantizeOptions, keywords_of, make_options
from qtool.quantization import QuantizeResult, prepare, run

__all__ = ["TARGETS", "ConversionResult", "export"]

FOR_STATES = ("method", "trust_pickle", "trust_remote_code", "device")
FOR_FORMATS = ("scheme", "type", "requantize", "merge_lora", "max_shard_size")


@keywords_of(ExportOptions)
def export(
    model_path: str | os.PathLike[str], *, on_event: OnEvent = ignore_event, **options: object
) -> ConversionResult | QuantizeResult:
    """Write a checkpoint in another format, or export a calibrated state of ModelOpt.

    Converting keeps codes and scales as they are; what the format cannot hold is refused, or
    rounded again with ``requantize``.

    Args:
        model_path: a checkpoint folder or a Hub name; for a state, the model that it is one of.
        on_event: gets what the run reports: an `Event` of `qtool.events`.
        options: the fields of `qtool.options.ExportOptions`.
    Raises: QtoolError; nothing is left behind then.
    """
    return run_export(model_path, make_options(ExportOptions, options), on_event=on_event)


def run_export(
    model_path: str | os.PathLike[str], options: ExportOptions, *, on_event: OnEvent
) -> ConversionResult | QuantizeResult:
    """Do what `export` does."""
    _check_options(options)
    if options.to is not None:
        return convert(model_path, options.to, options, on_event=on_event)
    request = prepare(
        model_path,
        QuantizeOptions(
            method=options.method,
            checkpoint_restore_path=options.checkpoint_restore_path,
            output=options.output,
            device=options.device,
            overwrite=options.overwrite,
            trust_pickle=options.trust_pickle,
            trust_remote_code=options.trust_remote_code,
            revision=options.revision,
        ),
    )
    return run(request, on_event=on_event)


def _check_options(options: ExportOptions) -> None:
    """Refuse options that do not go together."""
    if (options.to is None) == (options.checkpoint_restore_path is None):
        hint = (
            f"--to {'|'.join(TARGETS)} converts a checkpoint; --checkpoint-restore-path STATE "
            "exports a ModelOpt state"
        )
        raise UsageError(
            "E_EXPORT_WHAT", "give a format to convert to, or a state to export", hint=hint
        )
    other = FOR_STATES if options.to else FOR_FORMATS
    for field in fields(options):
        if field.name not in other or getattr(options, field.name) in (field.default, None, ""):
            continue
        flag = "--checkpoint-restore-path" if options.to else "--to"
        raise UsageError(
            "E_EXPORT_UNUSED",
            f"`{field.name}` has a meaning only with {flag}",
            hint=f"leave it out, or give {flag}",
        )
