"""One checkpoint against another: how far the weights of each layer are apart."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Difference:
    """One linear layer of both checkpoints: signal to quantization noise in decibels (None when equal), and the largest difference of a weight.

    ``rescaled`` tells that rows or columns had been scaled (SmoothQuant, AWQ fold such factors into the layer before), and that the figures are
    what is left after undoing it.
    """

    name: str
    sqnr_db: float | None
    max_error: float
    rescaled: bool = False


@dataclass(frozen=True)
class Comparison:
    """All layers that both checkpoints have, the worst first, and the names that only one has."""

    base: str
    modules: tuple[Difference, ...]
    only_here: tuple[str, ...]
    only_there: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the comparison for ``--json``."""
        return asdict(self)
