"""Write a checkpoint without calibrating: in another format, or from a ModelOpt state that
`quantize` kept.
"""

from __future__ import annotations

import os
from pathlib import Path

from qtool.conversion.convert import MAX_SHARD_SIZE, ConversionResult, convert
from qtool.conversion.targets import TARGETS
from qtool.errors import UsageError
from qtool.events import OnEvent, ignore_event
from qtool.quantization import Options, QuantizeResult, quantize

__all__ = ["TARGETS", "ConversionResult", "export"]


def export(
    model_path: str | os.PathLike[str],
    *,
    output: str | os.PathLike[str],
    to: str | None = None,
    requantize: bool = False,
    scheme: str | None = None,
    max_shard_size: str = MAX_SHARD_SIZE,
    checkpoint_restore_path: str | os.PathLike[str] | None = None,
    method: str | None = None,
    device: str = "auto",
    overwrite: bool = False,
    trust_pickle: bool = False,
    trust_remote_code: bool = False,
    revision: str | None = None,
    on_event: OnEvent = ignore_event,
) -> ConversionResult | QuantizeResult:
    """Write the checkpoint in ``model_path`` to the folder ``output`` in the format ``to``, or
    export the state in ``checkpoint_restore_path``.

    Converting keeps codes and scales as they are; what ``to`` cannot hold is refused, or with
    ``requantize`` rounded again, to ``scheme`` or to the nearest scheme that it holds. Files end
    before ``max_shard_size``. The state is one of the model in ``model_path``; ``method`` is needed
    only for a file of ``mto.save``, which does not say how it was made; ``device``,
    ``trust_pickle`` and ``trust_remote_code`` are `qtool.quantization.Options`, and for states
    alone.

    Raises: QtoolError; nothing is left behind then.
    """
    if (to is None) == (checkpoint_restore_path is None):
        hint = (
            f"--to {'|'.join(TARGETS)} converts a checkpoint; --checkpoint-restore-path STATE "
            "exports a ModelOpt state"
        )
        raise UsageError(
            "E_EXPORT_WHAT", "give a format to convert to, or a state to export", hint=hint
        )
    for_states = {
        "method": method,
        "trust_pickle": trust_pickle,
        "trust_remote_code": trust_remote_code,
        "device": device != "auto",
    }
    for_formats = {
        "scheme": scheme,
        "requantize": requantize,
        "max_shard_size": max_shard_size != MAX_SHARD_SIZE,
    }
    for name, given in (for_states if to else for_formats).items():
        if given:
            what = (
                "a ModelOpt state, and a checkpoint is converted"
                if to
                else "a conversion, and a state is exported"
            )
            raise UsageError(
                "E_EXPORT_UNUSED",
                f"`{name}` is for {what}",
                hint=f"leave it out, or give {'--checkpoint-restore-path' if to else '--to'}",
            )
    if to is not None:
        return convert(
            model_path,
            to=to,
            output=Path(output),
            requantize=requantize,
            scheme=scheme,
            max_shard_size=max_shard_size,
            overwrite=overwrite,
            revision=revision,
            on_event=on_event,
        )
    options: Options = {
        "method": method,
        "checkpoint_restore_path": checkpoint_restore_path,
        "output": output,
        "device": device,
        "overwrite": overwrite,
        "trust_pickle": trust_pickle,
        "trust_remote_code": trust_remote_code,
        "revision": revision,
    }
    return quantize(model_path, on_event=on_event, **options)
