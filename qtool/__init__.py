"""qtool: one command over three libraries, from a language model to a quantized checkpoint that
loads.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qtool.conversion import export
    from qtool.engine.engine import Engine
    from qtool.errors import QtoolError
    from qtool.evaluation.execution import evaluate
    from qtool.evaluation.gated import quantize
    from qtool.quantization import QuantizeResult
    from qtool.runtime.load import load

__version__ = "0.1.0"
__all__ = ["Engine", "QtoolError", "QuantizeResult", "evaluate", "export", "load", "quantize"]

_HOMES = {  # imported when first used
    "Engine": "engine.engine",
    "QtoolError": "errors",
    "QuantizeResult": "quantization",
    "evaluate": "evaluation.execution",
    "export": "conversion",
    "load": "runtime.load",
    "quantize": "evaluation.gated",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module `qtool` has no attribute `{name}`")
    value: object = getattr(importlib.import_module(f"qtool.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
