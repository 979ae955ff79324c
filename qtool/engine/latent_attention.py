"""DeepSeek's multi-head latent attention: the cache keeps the latent of a token, not its keys and
values.

A model of transformers makes keys and values of latents by ``expand_kv``. As both are linear in the
latent, queries can be taken to the latents instead, and what attention gathers of the latents to
values: one head of ``rank + rotary`` numbers a token for all heads of queries. Source: DeepSeek-AI
2024, arXiv:2405.04434, section 2.1.2. Large chunks of prompts attend to keys and values that are
made of the cached latents, see `qtool.engine.attention.latents`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor, nn

from qtool.engine.norms import NotFused, distance, random_input, tolerance_of
from qtool.errors import one_line
from qtool.runtime.causal_lm import CausalLM
from qtool.runtime.linear import QuantizedLinear

TOKENS = 8  # of the latents that are expanded for comparison
SMALLEST = 16  # numbers that tensor cores multiply at once; kernels want powers of two
LOG = logging.getLogger("qtool.engine")


class LatentAttention(nn.Module):
    """The way from queries to latents and from latents to keys and values, in 16 bits.

    Args:
        weight: of ``kv_b_proj``, [heads * (key width + value width), rank].
        heads: of queries.
        key_width: of keys, without the rotary part.
    """

    def __init__(self, weight: Tensor, heads: int, key_width: int) -> None:
        super().__init__()
        self.rank: int = weight.shape[1]
        self.key_width = key_width
        """Of keys, without the rotary part."""
        each = weight.reshape(heads, -1, weight.shape[1]).contiguous()
        self.weight: Tensor = nn.Parameter(each, requires_grad=False)
        """[heads, key width + value width, rank]"""

    @property
    def value_width(self) -> int:
        """Of values."""
        return self.weight.shape[1] - self.key_width

    def queries(self, q: Tensor, q_rope: Tensor) -> Tensor:
        """Return queries for latents [T, heads, rank + rotary] of queries [T, heads, key width] and
        their rotary part [T, heads, rotary].
        """
        tokens, heads, width = q_rope.shape
        result = q.new_empty(tokens, heads, self.rank + width)
        self.take_to_latents(q, result)
        result[..., self.rank :] = q_rope
        return result

    def take_to_latents(self, q: Tensor, result: Tensor) -> None:
        """Write what queries [T, heads, key width] become to the first numbers of each head of
        ``result`` [T, heads, rank + rotary].
        """
        to_latents = self.weight[:, : self.key_width]
        torch.bmm(q.transpose(0, 1), to_latents, out=result[..., : self.rank].transpose(0, 1))

    def values(self, gathered: Tensor) -> Tensor:
        """Return the values [T, heads, value width] of gathered latents [T, heads, rank]."""
        tokens, heads, _ = gathered.shape
        result = gathered.new_empty(tokens, heads, self.value_width)
        to_values = self.weight[:, self.key_width :].mT
        torch.bmm(gathered.transpose(0, 1), to_values, out=result.transpose(0, 1))
        return result

    def expand(self, latents: Tensor, rotary: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values [..., heads, T, width] of ``latents`` [..., 1, T, rank] and the
        rotary part of the keys [..., 1, T, rotary], as ``expand_kv`` makes them.
        """
        both = latents @ self.weight.mT
        keys, values = both[..., : self.key_width], both[..., self.key_width :]
        return torch.cat([keys, rotary.expand(*keys.shape[:-1], -1)], dim=-1), values


def keep_latents(model: CausalLM) -> None:
    """Let the attention of ``model`` keep latents, where it is seen to expand them as
    `LatentAttention` does. Logs why not.
    """
    for module in list(model.modules()):
        expand = getattr(module, "expand_kv", None)
        if not callable(expand):
            continue
        try:
            module.latent = _seen_in(module, expand, model.dtype)
        except Exception as error:  # the code of an architecture may raise anything
            name = type(module).__name__
            reason = one_line(error)
            LOG.info("%s keeps keys and values, not latents: %s", name, reason)
            continue
        module.expand_kv = _concat_latent  # type: ignore[assignment]
        setattr(module, "kv_b_proj", None)  # noqa: B010 (a module, for mypy)


def _concat_latent(latents: Tensor, rotary: Tensor) -> tuple[Tensor, Tensor]:
    """Return, in place of keys and values, what the cache keeps of each token, and its latent."""
    return torch.cat([latents, rotary], dim=-1), latents


def _seen_in(
    module: nn.Module, expand: Callable[..., tuple[Tensor, Tensor]], dtype: torch.dtype
) -> LatentAttention:
    """Return what ``module`` does with latents.

    Raises: NotFused, when it is something else, or no kernel is for it.
    """
    linear = getattr(module, "kv_b_proj", None)
    if not isinstance(linear, nn.Linear | QuantizedLinear) or linear.bias is not None:
        raise NotFused("`kv_b_proj` is not a linear layer of its own without a bias")
    if (
        isinstance(linear, QuantizedLinear) and linear.spec.static_input
    ):  # it would round the identity below
        raise NotFused("the inputs of `kv_b_proj` are rounded by a calibrated scale")
    rank, rotary, heads, key_width = (
        linear.in_features,
        *(
            int(getattr(module, name, 0))
            for name in ("qk_rope_head_dim", "num_heads", "qk_nope_head_dim")
        ),
    )
    if any(size < SMALLEST or size & (size - 1) for size in (rank, rotary)):
        raise NotFused(f"{rank} and {rotary} numbers are not powers of two above {SMALLEST - 1}")
    device = next(iter((*linear.parameters(), *linear.buffers()))).device
    # a row of the identity is exact in every format that scales what it rounds
    weight = linear(torch.eye(rank, dtype=dtype, device=device)).T
    latent = LatentAttention(weight, heads, key_width)
    like = torch.empty(0, dtype=dtype, device=device)
    x, angles = (random_input((1, 1, TOKENS, size), like) for size in (rank, rotary))
    pairs = zip(latent.expand(x, angles), expand(x, angles), strict=True)
    off = max(distance(own, found, found) for own, found in pairs)
    if not off <= tolerance_of(linear, dtype):
        raise NotFused(f"it expands them otherwise (relative error {off:.1e})")
    return latent
