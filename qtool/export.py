"""Write a checkpoint without calibrating: from a ModelOpt state that `quantize` kept."""

from __future__ import annotations

import os

from qtool.quantize import OnEvent, Options, QuantizeResult, ignore_event, quantize


def export(
    model_path: str | os.PathLike[str],
    *,
    checkpoint_restore_path: str | os.PathLike[str],
    output: str | os.PathLike[str],
    method: str | None = None,
    device: str = "auto",
    overwrite: bool = False,
    trust_pickle: bool = False,
    trust_remote_code: bool = False,
    revision: str | None = None,
    on_event: OnEvent = ignore_event,
) -> QuantizeResult:
    """Export the state in ``checkpoint_restore_path``, made of the model in ``model_path``, to the folder ``output``.

    ``method`` is needed only for a file of ``mto.save``, which does not say how it was made; the other arguments are `qtool.quantize.Options`.

    Raises: QtoolError; nothing is left behind then.
    """
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
