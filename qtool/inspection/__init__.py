"""What a checkpoint holds, whether its numbers are sound, and which engines load it."""

from qtool.inspection.report import Inspection, Module, Row, inspect
from qtool.inspection.text import render

__all__ = ["Inspection", "Module", "Row", "inspect", "render"]
