"""The kinds of norms that decoder layers have."""

from __future__ import annotations

from typing import NamedTuple


class NormKind(NamedTuple):
    """All of a norm but its weights."""

    eps: float
    """What is added to the mean of squares."""
    plus_one: bool = False
    """Whether the weight is what is added to 1, as Gemma has it."""
    late: bool = False
    """Whether to round only after the product with the weight, not before as well."""
    centered: bool = False
    """Whether the mean is subtracted first: a LayerNorm, otherwise an RMSNorm."""


NO_KIND = NormKind(0.0)
"""In place of the kind of a norm that is not there."""
