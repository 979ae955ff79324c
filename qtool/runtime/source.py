"""`Source`: a linear layer of a checkpoint, and where it goes."""

from __future__ import annotations

from dataclasses import dataclass

from qtool.name_map import LinearWeight
from qtool.scheme import Scheme


@dataclass(frozen=True)
class Source:
    """A linear layer of the checkpoint."""

    name: str
    target: LinearWeight
    """Where it goes in the model."""
    shape: tuple[int, int]
    """N outputs, K inputs."""
    scheme: Scheme | None
    """What it runs in; None for an unquantized layer."""
    experts: int = 1
    """How many matrices of N / experts outputs are stacked in it."""
