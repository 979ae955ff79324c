"""From a model and a method to a checked checkpoint: `prepare` decides, `run` does it."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qtool import __version__
from qtool.backends import Job, check_backend, load_backend, version_of
from qtool.backends.modelopt_state import check_state, state_recipe
from qtool.backends.worker import run_job
from qtool.calibration import CalibrationSpec, check_source
from qtool.checkpoint import (
    Checkpoint,
    Staging,
    digest_files,
    open_checkpoint,
    resolve_model,
    stage_output,
)
from qtool.checkpoint.aux_files import MANIFEST, MANIFEST_VERSION, finish_files, write_json
from qtool.devices import check_device_name
from qtool.errors import (
    BackendFailed,
    InputRefused,
    OutputTaken,
    ResourceError,
    UsageError,
)
from qtool.events import (
    CalibrationEvent,
    Event,
    NoteEvent,
    OnEvent,
    StageEvent,
    StateSavedEvent,
    ignore_event,
)
from qtool.formats import check_values, detect
from qtool.options import QuantizeOptions, make_options
from qtool.plan import Plan, make_plan
from qtool.quantization.execution import QuantizeResult, run
from qtool.quantization.request import Request, prepare
from qtool.quantization.verification import verify
from qtool.recipe import Auto, Recipe, load_recipe
from qtool.sizes import format_size

__all__ = ["QuantizeResult", "Request", "prepare", "quantize", "run", "verify"]


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
