"""What the numbers of a checkpoint look like: saturated codes, dead channels, the range of the scales; and whether its files are as digested."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class ModuleNumbers:
    """The numbers of one quantized layer.

    ``saturated``: share of the codes at either end of the format's range. ``dead_rows`` and ``dead_columns``: outputs and inputs whose weights are
    all zero. ``scale_histogram``: (exponent e, count of scales in [2^e, 2^(e+1))), in order; of the effective scale, both levels of NVFP4 together.
    """

    name: str
    saturated: float
    dead_rows: int
    dead_columns: int
    scale_min: float
    scale_max: float
    scale_histogram: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class DeepReport:
    """All quantized layers' numbers, in the order of the headers, and ``digests``: what comparing with the manifest gave."""

    modules: tuple[ModuleNumbers, ...]
    digests: str

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers for ``--json``."""
        return asdict(self)
