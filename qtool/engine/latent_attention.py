"""DeepSeek's multi-head latent attention: the cache keeps the latent of a token, not its keys and
values.

A model of transformers makes keys and values of latents by ``expand_kv``. As both are linear in the
latent, queries can be taken to the latents instead, and what attention gathers of the latents to
values: one head of ``rank + rotary`` numbers a token for all heads of queries (DeepSeek-V2, 2.1.2).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from qtool.engine.norms import TOLERANCE, distance, random_input
from qtool.runtime.causal_lm import CausalLM
from qtool.runtime.linear import QuantizedLinear

TOKENS = 8  # of the latents that are expanded for comparison
SMALLEST = 16  # numbers that tensor cores multiply at once; kernels want powers of two
# with a quantized `kv_b_proj`, which rounds the latents
ROUNDED_TOLERANCE = 0.1


class LatentAttention(nn.Module):
    """The way from queries to latents and from latents to values, in 16 bits.

    Args:
        weight: of ``kv_b_proj``, [heads * (key width + value width), rank].
        heads: of queries.
        key_width: of keys, without the rotary part.
    """

    def __init__(self, weight: Tensor, heads: int, key_width: int) -> None:
        super().__init__()
        each = weight.view(heads, -1, weight.shape[1])
        keys, values = each[:, :key_width], each[:, key_width:]
        self.rank: int = weight.shape[1]
        self.to_latents = nn.Parameter(keys.contiguous(), requires_grad=False)
        """[heads, key width, rank]"""
        self.to_values = nn.Parameter(values.mT.contiguous(), requires_grad=False)
        """[heads, rank, value width]"""

    def queries(self, q: Tensor) -> Tensor:
        """Return queries [heads, T, key width + rotary] for latents: [T, heads, rank + rotary]."""
        width = self.to_latents.shape[1]
        latent = torch.bmm(q[..., :width], self.to_latents)
        return torch.cat([latent, q[..., width:]], dim=-1).transpose(0, 1)

    def values(self, gathered: Tensor) -> Tensor:
        """Return the values [T, heads, value width] of gathered latents [T, heads, rank]."""
        return torch.bmm(gathered.transpose(0, 1), self.to_values).transpose(0, 1)

    def expand(self, latents: Tensor, rotary: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys and values that ``expand_kv`` makes of ``latents`` [1, 1, T, rank] and
        the rotary part of the keys [1, 1, T, rotary].
        """
        keys = latents @ self.to_latents.mT
        rotary = rotary.expand(-1, keys.shape[1], -1, -1)
        return torch.cat([keys, rotary], dim=-1), latents @ self.to_values


def keep_latents(model: CausalLM) -> None:
    """Let the attention of ``model`` keep latents, where it is seen to expand them as
    `LatentAttention` does.
    """
    for module in list(model.modules()):
        expand = getattr(module, "expand_kv", None)
        if callable(expand) and (latent := _of(module, expand, model.dtype)):
            module.latent = latent
            module.expand_kv = _side_by_side  # type: ignore[assignment]
            setattr(module, "kv_b_proj", None)  # noqa: B010 (a module, for mypy)


def _side_by_side(latents: Tensor, rotary: Tensor) -> tuple[Tensor, Tensor]:
    """Return, in place of keys and values, what the cache keeps of each token, and its latent."""
    return torch.cat([latents, rotary], dim=-1), latents


def _of(
    module: nn.Module, expand: Callable[..., tuple[Tensor, Tensor]], dtype: torch.dtype
) -> LatentAttention | None:
    """Return what ``module`` does with latents, None if it is something else."""
    linear = getattr(module, "kv_b_proj", None)
    if not isinstance(linear, nn.Linear | QuantizedLinear) or linear.bias is not None:
        return None
    if isinstance(linear, QuantizedLinear) and linear.spec.static_input:
        return None  # which would round the identity below
    rank, rotary, heads, key_width = (
        linear.in_features,
        *(int(getattr(module, name, 0)) for name in ("qk_rope_head_dim", "num_heads")),
        int(getattr(module, "qk_nope_head_dim", 0)),
    )
    if any(size < SMALLEST or size & (size - 1) for size in (rank, rotary)):
        return None
    device = next(iter((*linear.parameters(), *linear.buffers()))).device
    # a row of the identity is exact in every format that scales what it rounds
    weight = linear(torch.eye(rank, dtype=dtype, device=device)).T
    latent = LatentAttention(weight, heads, key_width)
    like = torch.empty(0, dtype=dtype, device=device)
    x, angles = (random_input((1, 1, TOKENS, size), like) for size in (rank, rotary))
    is_quantized = isinstance(linear, QuantizedLinear)
    tolerance = ROUNDED_TOLERANCE if is_quantized else TOLERANCE[dtype]
    pairs = zip(latent.expand(x, angles), expand(x, angles), strict=True)
    if all(distance(own, found, found) <= tolerance for own, found in pairs):
        return latent
    return None
