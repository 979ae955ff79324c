"""What is inside a checkpoint, and whether to trust it: its headers, its numbers, another
checkpoint beside it, the engine that is to load it.
"""

from qtool.inspection.html_report import render_page
from qtool.inspection.report import Inspection, Module, Row, inspect
from qtool.inspection.text import render

__all__ = ["Inspection", "Module", "Row", "inspect", "render", "render_page"]
