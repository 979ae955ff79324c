"""qtool: one command over three libraries, from a language model to a quantized checkpoint that loads."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qtool.errors import QtoolError
    from qtool.export import export
    from qtool.quantize import QuantizeResult, quantize
    from qtool.runtime.engine import Engine
    from qtool.runtime.load import load

__version__ = "0.1.0"
__all__ = ["Engine", "QtoolError", "QuantizeResult", "export", "load", "quantize"]

_HOMES = {  # imported when first used
    "Engine": "runtime.engine",
    "QtoolError": "errors",
    "QuantizeResult": "quantize",
    "export": "export",
    "load": "runtime.load",
    "quantize": "quantize",
}


class _Package(ModuleType):
    """Keeps ``qtool.quantize`` the function: importing the module of that name would otherwise put the module in its place."""

    def __getattr__(self, name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module `qtool` has no attribute `{name}`")
        value = getattr(importlib.import_module(f"qtool.{_HOMES[name]}"), name)
        setattr(self, name, value)
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
