"""From a model and a method to a checked checkpoint: `prepare` decides, `run` does it."""

from __future__ import annotations

from qtool.quantization.execution import Measured, QuantizeResult, run
from qtool.quantization.request import Request, prepare
from qtool.quantization.verification import verify

__all__ = ["Measured", "QuantizeResult", "Request", "prepare", "run", "verify"]
