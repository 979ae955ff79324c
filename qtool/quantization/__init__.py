"""From a model and a method to a checked checkpoint: `prepare` decides, `run` does it."""

from __future__ import annotations

import os

from qtool.events import OnEvent, ignore_event
from qtool.options import QuantizeOptions, keywords_of, make_options
from qtool.quantization.execution import QuantizeResult, run
from qtool.quantization.request import Request, prepare
from qtool.quantization.verification import verify

__all__ = ["QuantizeResult", "Request", "prepare", "quantize", "run", "verify"]


@keywords_of(QuantizeOptions)
def quantize(
    model_path: str | os.PathLike[str], *, on_event: OnEvent = ignore_event, **options: object
) -> QuantizeResult:
    """Quantize a model and write a complete checkpoint folder.

    Args:
        model_path: a checkpoint folder or a Hub name.
        on_event: gets what the run reports: an `Event` of `qtool.events`.
        options: the fields of `qtool.options.QuantizeOptions`.
    Raises: QtoolError. Nothing is left behind then but, when a library failed, its log.
    """
    return run(prepare(model_path, make_options(QuantizeOptions, options)), on_event=on_event)
