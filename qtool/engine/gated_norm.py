"""`GatedNorm`: the norm over each head behind a gated delta net, with its gate and the rounding
after it in one launch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from qtool.engine.norms import TOLERANCE, Codes, distance, random_input, rounded
from qtool.runtime.kernels import current


class GatedNorm(nn.Module):
    """``norm(x) * silu(gate)`` over each head, an RMSNorm of one weight."""

    def __init__(self, weight: nn.Parameter, eps: float) -> None:
        super().__init__()
        self.weight = weight
        self.eps = eps

    @classmethod
    def of(cls, norm: nn.Module) -> GatedNorm | None:
        """Return ``norm`` as one, None when it is seen to compute something else."""
        weight, eps = (getattr(norm, name, None) for name in ("weight", "variance_epsilon"))
        if not isinstance(weight, nn.Parameter) or weight.dim() != 1 or not isinstance(eps, float):
            return None
        own = cls(weight, eps)
        x, gate = random_input((2, 5, len(weight)), weight).unbind()
        expected = norm(x, gate)
        same = distance(own.normalize(x, gate), expected, expected) <= TOLERANCE[x.dtype]
        return own if same else None

    def forward(self, x: Tensor, gate: Tensor, codes: Codes | None) -> tuple[Tensor, Tensor | None]:
        """Return the norm of ``x`` [T, heads, D], gated by ``gate`` of its shape: [T, heads * D],
        or its codes and their scales, f32 [T, 1].
        """
        if x.is_cuda:
            from qtool.engine import triton_delta_net

            with current(x.device):
                return triton_delta_net.gated_norm(x, gate, self.weight, self.eps, codes)
        return rounded(self.normalize(x, gate).flatten(1), codes)

    def normalize(self, x: Tensor, gate: Tensor) -> Tensor:
        """Return the gated norm of ``x``, of its shape and dtype, over the last dimension."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return (self.weight * wide.to(x.dtype) * silu(gate.float())).to(x.dtype)
