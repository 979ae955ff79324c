"""Packages that a process need not import."""

from __future__ import annotations

import sys

UNUSED = ("scipy", "sklearn", "torchao")
"""What transformers imports where it is installed, for metrics, losses and quantizers of its own,
which takes seconds: a third of the start of an engine.
"""


def skip_unused(backend: str | None = None) -> None:
    """Let this process not import what of `UNUSED` the library of ``backend`` does not need; None:
    there is none.
    """
    needed = {None: (), "modelopt": ("scipy", "torchao")}.get(backend, ("torchao",))
    skipped = [name for name in UNUSED if name not in needed]
    sys.modules.update(dict.fromkeys(skipped))  # type: ignore[arg-type]
