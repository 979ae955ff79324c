"""`Arrangement`: how the bytes of a tensor follow from those in a file of another tool."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

STEP = 64  # rows that are turned together: they stay in the CPU's cache


class Arrangement(NamedTuple):
    """What is done to the bytes in the file. Rows move as a whole, so blocks stay what they are."""

    heads: int = 0
    """In each of so many heads, rows 0, 2, 4 ... become the first half and the others the second:
    rotary embeddings of ggml rotate neighbours, those of transformers halves.
    """
    shift: float = 0.0
    """What is added to each number, an F32."""
    other: tuple[Path, int] | None = None
    """File and offset of a second part of the same size: its rows come after those of the first,
    one by one.
    """
    is_transposed: bool = False
    """Whether each matrix of a stack lies the other way in the file."""
    part: tuple[int, int] = (0, 1)
    """Which of how many equal ranges of columns, of a matrix that lies the other way: the file has
    the bytes of all.
    """

    def apply(self, data: Any, shape: tuple[int, ...]) -> bytes:
        """Return the bytes of the tensor.

        Args:
            data: what lies in the file, or in both parts one after the other.
            shape: of the tensor.
        """
        import numpy as np

        found = np.frombuffer(data, np.uint8)
        if self.shift:
            return (found.view("<f4") + np.float32(self.shift)).tobytes()
        if self.heads:
            row = found.size // shape[0]
            return found.reshape(self.heads, -1, 2, row).swapaxes(1, 2).tobytes()
        if self.other:
            rows = math.prod(shape[:2]) if not self.is_transposed else shape[0] * shape[2]
            found = found.reshape(2, rows // 2, -1).swapaxes(0, 1)
        return (self._turn(found, shape) if self.is_transposed else found).tobytes()

    def _turn(self, found: Any, shape: tuple[int, ...]) -> Any:
        """Return the part of ``found``, matrices that lie the other way, that is of ``shape``."""
        import numpy as np

        *_, columns, rows = shape
        part, parts = self.part
        width = found.size // parts // math.prod(shape)
        whole = np.ascontiguousarray(found).view(f"u{width}").reshape(-1, rows, parts * columns)
        own = whole[:, :, part * columns : (part + 1) * columns]
        turned = np.empty((len(own), columns, rows), own.dtype)
        for row in range(0, rows, STEP):
            turned[:, :, row : row + STEP] = own[:, row : row + STEP].swapaxes(1, 2)
        return turned
