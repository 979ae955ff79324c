"""Vectors and scores, as the engine's loop delivers them and as callers get them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from qtool.checkpoint.encoding import Encoding
from qtool.engine.sampling_params import SamplingParams
from qtool.errors import UsageError

Vector = NDArray[np.float32]
NO_TEXT = SamplingParams(max_new_tokens=1)
"""Of requests that generate nothing."""


def check_dimensions(encoding: Encoding, dimensions: int | None) -> None:
    """Raise UsageError, if vectors may not be cut to ``dimensions`` numbers."""
    allowed, size = encoding.dimensions, encoding.size
    if dimensions in (None, size):
        return
    if allowed is None:
        raise UsageError(
            "E_DIMENSIONS",
            f"dimensions is {dimensions}, and the model's config does not say that its vectors of "
            f"{size} numbers may be cut",
            hint="leave `dimensions` out; `is_matryoshka` in config.json allows it",
        )
    if dimensions not in (allowed or range(1, size + 1)):
        hint = f"one of {', '.join(map(str, allowed))}" if allowed else f"1 to {size}"
        raise UsageError("E_DIMENSIONS", f"dimensions is {dimensions}", hint=hint)


def vector_of(
    encoding: Encoding, data: bytes, dimensions: int | None = None, *, activate: bool = True
) -> Vector:
    """Return the vector or the score in ``data``, of `CompletionOutput.vector`.

    Args:
        encoding: of the model.
        data: what the engine computed.
        dimensions: the numbers of the vector, which `check_dimensions` allows.
        activate: False: as it is, without length 1 or a sigmoid.
    """
    vector = np.frombuffer(data, np.dtype("<f4"))[:dimensions]
    if not activate:
        return vector
    if encoding.normalize:
        return vector / np.float32(max(float(np.linalg.norm(vector)), 1e-12))
    if encoding.task == "score" and encoding.sigmoid:
        return np.float32(1) / (np.float32(1) + np.exp(-vector))
    return vector
