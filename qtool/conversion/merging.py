"""Merges an adapter into the tensors of a checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from qtool.conversion.adapter import Adapter, LowRank
from qtool.formats.packing import read_stored

if TYPE_CHECKING:
    from torch import Tensor


def merged(adapter: Adapter, name: str, tensor: Tensor) -> Tensor:
    """Return what ``tensor``, called ``name`` in the checkpoint, is with ``adapter`` merged, f32.

    Raises: CheckpointRefused, when a tensor of the adapter cannot be read.
    """
    # PEFT also saves an embedding as a whole where it was adapted
    whole = adapter.replaced.get(name)
    weight = (tensor if whole is None else read_stored(whole)).float()
    low_rank = adapter.low_rank.get(name)
    return weight if low_rank is None else _add(weight, low_rank)


def _add(weight: Tensor, low_rank: LowRank) -> Tensor:
    """Return ``weight`` with ``low_rank`` added, [N, K] or, where it is transposed, [K, N]."""
    b, a = read_stored(low_rank.b).float(), read_stored(low_rank.a).float()
    matrix = weight.T if low_rank.is_transposed else weight
    changed = torch.addmm(matrix, b, a, alpha=low_rank.scaling)
    if low_rank.magnitude is not None:
        # Liu et al. 2024, arXiv:2402.09353, equation 5
        length = torch.linalg.vector_norm(changed, dim=1, keepdim=True)
        changed = changed * (read_stored(low_rank.magnitude).float().view(-1, 1) / length)
    return changed.T.contiguous() if low_rank.is_transposed else changed
