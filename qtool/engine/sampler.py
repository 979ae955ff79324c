"""From logits to tokens: one draw for all rows of a step.

Temperature first, then top_k, then top_p over what is left, renormalised; min_p is relative to the
largest probability. Penalties and logit_bias change the logits before all of that. A draw is the
largest of ``p / E`` with ``E`` exponentially distributed (the Gumbel-max trick), where ``E`` is a
hash of seed, position and token: it knows neither the batch nor the row. Every sum that decides
something is one of integers, so the order in which a device adds does not show either.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from qtool.engine.sampling_batch import Arrays, RowRequest, draw_settings, token_keys

ROWS_AT_ONCE = 64  # of more rows the draw is made in parts, so that its temporaries stay small


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Natural logarithms of softmax(logits): of the chosen tokens and their labels [T, 1 + labels],
    and of the most probable tokens with their ids [T, top], largest first.
    """

    chosen: Tensor
    top: Tensor
    top_ids: Tensor

    def on_host(self) -> Logprobs:
        """Return copies on the host, which are there once the device has done what it was given."""
        parts = (self.chosen, self.top, self.top_ids)
        return Logprobs(*(part.to("cpu", non_blocking=True) for part in parts))


@dataclass(frozen=True, slots=True)
class Samples:
    """One token for each row, int64 [R] on the device, -1 where the logits are not finite;
    ``logprobs`` of ``logprob_rows``, in their order.
    """

    tokens: Tensor
    logprobs: Logprobs | None = None
    logprob_rows: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class _Part:
    """The settings of up to ROWS_AT_ONCE rows, by name on the device; empty when all are greedy as
    they are. ``widths``: of the filters in it.
    """

    rows: slice
    tensors: dict[str, Tensor]
    widths: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Prepared:
    """The settings of a step's rows, on the device."""

    parts: tuple[_Part, ...]
    logprob_rows: tuple[int, ...]
    logprob_index: Tensor | None
    """None: all rows."""
    top: int
    labels: Tensor | None = None
    """int64 [R, L] of ``logprob_rows``, padded with 0; None: no row has labels."""


def greedy(logits: Tensor) -> Tensor:
    """Return the index of the largest logit of each row, [R, V] -> int64 [R]; -1 for a row with NaN
    or +inf, or with nothing but -inf.
    """
    largest, tokens = _largest(logits)
    return tokens.masked_fill_(largest - largest != 0, -1)


def _largest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the largest logit of each row, NaN above all, and its first index, [R] each; on a GPU
    many blocks share a row.
    """
    rows, size = logits.shape
    parts = math.gcd(size, 256) if logits.is_cuda else 1
    if parts < 16:
        return logits.max(dim=-1)
    largest, indices = logits.view(rows, parts, -1).max(dim=-1)
    best, part = largest.max(dim=-1)
    return best, part * (size // parts) + indices.gather(1, part[:, None])[:, 0]


def logprobs_of(logits: Tensor, targets: Tensor, top: int = 0) -> Logprobs:
    """Return the log probabilities, by ``logits`` [T, V], of the tokens ``targets`` [T, C], where
    negative ones count as 0, and of the ``top`` most probable tokens.
    """
    parts = []
    for start in range(0, max(1, logits.shape[0]), ROWS_AT_ONCE):
        some = logits[start : start + ROWS_AT_ONCE].float()
        total = some.logsumexp(-1, keepdim=True)
        wanted = targets[start : start + ROWS_AT_ONCE].long().clamp(min=0)
        best = some.topk(min(top, logits.shape[1]), dim=-1)
        parts.append((some.gather(1, wanted) - total, best.values - total, best.indices))
    return Logprobs(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def uniforms(row_keys: Tensor, token_keys: Tensor) -> Tensor:
    """Return a hash of row and token, int32 [R, V] from [2, R] and [V]: numbers from 0 to 2^31 - 1,
    all as likely.
    """
    x = token_keys ^ row_keys[0, :, None]
    x *= row_keys[1, :, None]  # int32 products wrap around, on every device
    x ^= (x >> 15).bitwise_and_(0x1FFFF)  # a shift that fills with zeros
    x *= 0x2C1B3C6D
    return x.bitwise_and_(0x7FFFFFFF)


def _largest_kept(
    logits: Tensor, width: int, top_k: Tensor, top_p: Tensor, inverse: Tensor
) -> Tensor:
    """Return the smallest logit of each row that top_k and top_p keep, float32 [F, 1]; equal logits
    are kept together.

    Args:
        logits: [F, V].
        width: so many of the largest are looked at, top_k or more.
        top_k: int64 [F, 1].
        top_p: float64 [F, 1].
        inverse: 1 / temperature, float32 [F, 1].
    """
    narrow = width < logits.shape[1]
    largest = (
        logits.topk(width, dim=-1).values if narrow else logits.sort(dim=-1, descending=True).values
    ).float()
    # integers add up to the same in any order
    weights = (largest - largest[:, :1]).mul_(inverse).exp_().mul_(2.0**40).long()
    weights.masked_fill_(torch.arange(width, device=logits.device) >= top_k, 0)
    sums = weights.cumsum(1)
    limit = (sums[:, -1:] * top_p).ceil_().long().masked_fill_(top_p >= 1, 2**62)
    kept = (sums.sub_(weights) < limit).sum(1, keepdim=True)
    return largest.gather(1, torch.minimum(kept, top_k).clamp_(1, width) - 1)


class Sampler:
    """Draws one token for each row of a step. Nothing in it waits for the device."""

    def __init__(self, vocab_size: int, device: torch.device | str) -> None:
        self.vocab_size = vocab_size
        self.device = torch.device(device)
        self._token_keys = torch.from_numpy(token_keys(vocab_size)).to(self.device)
        self._bits = torch.tensor(
            [1 << bit for bit in range(8)], dtype=torch.uint8, device=self.device
        )
        self._half = torch.full((), -(2.0**-32), dtype=torch.float32, device=self.device)

    def sample(self, logits: Tensor, requests: Sequence[RowRequest]) -> Samples:
        """Draw a token for each row of ``logits`` [R, V], any float dtype, as ``requests`` [R] ask;
        ``logits`` stay as they are.
        """
        return self.draw(logits, self.prepare(requests))

    def prepare(self, requests: Sequence[RowRequest]) -> Prepared:
        """Bring the settings to the device, in one copy; none when all rows are greedy and no
        logits change.
        """
        starts = range(0, len(requests), ROWS_AT_ONCE)
        settings = [
            draw_settings(requests[start : start + ROWS_AT_ONCE], self.vocab_size)
            for start in starts
        ]
        rows = tuple(row for row, request in enumerate(requests) if request.logprobs)
        index: Arrays = {}
        if 0 < len(rows) < len(requests):
            index["rows"] = np.array(rows, np.int64)
        most = max((len(requests[row].labels) for row in rows), default=0)
        if most:
            labels = [[*requests[row].labels, *[0] * most][:most] for row in rows]
            index["labels"] = np.array(labels, np.int64)
        *on_device, on_device_index = self._to_device([*(arrays for arrays, _ in settings), index])
        parts = (
            _Part(slice(start, start + ROWS_AT_ONCE), tensors, widths)
            for start, tensors, (_, widths) in zip(starts, on_device, settings, strict=True)
        )
        top = max((requests[row].top_logprobs for row in rows), default=0)
        return Prepared(
            tuple(parts), rows, on_device_index.get("rows"), top, on_device_index.get("labels")
        )

    def draw(self, logits: Tensor, prepared: Prepared) -> Samples:
        """Draw a token for each row of ``logits`` [R, V] with settings that are on the device
        already.
        """
        if logits.shape[1] != self.vocab_size:
            raise ValueError(
                f"{logits.shape[1]} logits a row for a vocabulary of {self.vocab_size}"
            )
        if any(part.tensors for part in prepared.parts):
            drawn = [self._draw(logits[part.rows], part) for part in prepared.parts]
            tokens = torch.cat(drawn) if len(drawn) > 1 else drawn[0]
        else:
            tokens = greedy(logits)
        if not prepared.logprob_rows:
            return Samples(tokens)
        some, chosen = logits, tokens
        if prepared.logprob_index is not None:
            some, chosen = (
                logits.index_select(0, prepared.logprob_index),
                tokens.index_select(0, prepared.logprob_index),
            )
        targets = chosen[:, None]
        if prepared.labels is not None:
            targets = torch.cat((targets.long(), prepared.labels), dim=1)
        return Samples(tokens, logprobs_of(some, targets, prepared.top), prepared.logprob_rows)

    def _draw(self, logits: Tensor, part: _Part) -> Tensor:
        """Draw for up to ROWS_AT_ONCE rows, [R, V] -> [R]."""
        given = part.tensors
        if not given:
            return greedy(logits)
        logits = self._edited(logits, given)
        best, best_tokens = _largest(logits)
        tokens = best_tokens
        if "keys" in given:
            # float32, 0 for the best
            p = (logits - best[:, None].float()).mul_(given["inverse"][:, None])
            if part.widths:
                p.masked_fill_(logits < self._smallest_kept(logits, part), -torch.inf)
            p.exp_()
            if "min_p" in given:
                p.masked_fill_(p < given["min_p"][:, None], 0)
            # u = -(h + 1/2) / 2^31, exact near 0, where draws are decided, and never -1; log1p(u) =
            # -E
            u = torch.add(
                self._half,
                uniforms(given["keys"], self._token_keys),
                alpha=-(2.0**-31) * (1 - 2.0**-20),
            )
            tokens = p.div_(u.log1p_()).argmin(-1)
            if "greedy" in given:
                tokens = torch.where(given["greedy"], best_tokens, tokens)
        return tokens.masked_fill(best - best != 0, -1)

    def _edited(self, logits: Tensor, given: Mapping[str, Tensor]) -> Tensor:
        """Return the logits with penalties, biases, then masks: repetition over prompt and output,
        frequency and presence over output.
        """
        if not given.keys() & {"penalty_indices", "bias_indices", "masks"}:
            return logits
        logits = logits.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        flat = logits.view(-1)
        if "penalty_indices" in given:
            old = flat[given["penalty_indices"]]
            repetition = given["repetition"]
            flat[given["penalty_indices"]] = (
                torch.where(old > 0, old / repetition, old * repetition) - given["penalty"]
            )
        if "bias_indices" in given:
            flat.index_add_(0, given["bias_indices"], given["bias"])
        if "masks" in given:
            rows = given["masked_rows"]
            forbidden = (given["masks"].view(torch.uint8)[:, :, None] & self._bits == 0).flatten(1)[
                :, : self.vocab_size
            ]
            logits.index_copy_(
                0, rows, logits.index_select(0, rows).masked_fill_(forbidden, -torch.inf)
            )
        return logits

    def _smallest_kept(self, logits: Tensor, part: _Part) -> Tensor:
        """Return the smallest logit of each row that top_k and top_p keep, float32 [R, 1]; -inf for
        rows without.
        """
        smallest = torch.full(
            (logits.shape[0], 1), -torch.inf, dtype=torch.float32, device=logits.device
        )
        for number, width in enumerate(part.widths):
            rows, top_k, top_p = (
                part.tensors[f"{name}{number}"] for name in ("rows", "top_k", "top_p")
            )
            inverse = part.tensors["inverse"].index_select(0, rows)[:, None]
            smallest.index_copy_(
                0,
                rows,
                _largest_kept(
                    logits.index_select(0, rows), width, top_k[:, None], top_p[:, None], inverse
                ),
            )
        return smallest

    def _to_device(self, groups: Sequence[Arrays]) -> list[dict[str, Tensor]]:
        """Return the arrays as tensors on the device, by one copy from pinned memory."""
        arrays = [array for group in groups for array in group.values()]
        # each begins at a multiple of 8 bytes
        sizes = [-(-array.nbytes // 8) * 8 for array in arrays]
        if not sizes:
            return [{} for _ in groups]
        # torch reuses it once the copy is done
        staging = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=self.device.type == "cuda")
        for array, room in zip(arrays, torch.split(staging, sizes), strict=True):
            room.numpy()[: array.nbytes] = array.reshape(-1).view(np.uint8)
        pieces = iter(torch.split(staging.to(self.device, non_blocking=True), sizes))
        dtypes = {array.dtype: torch.from_numpy(array[:0]).dtype for array in arrays}
        return [
            {
                name: next(pieces)[: array.nbytes].view(dtypes[array.dtype]).view(array.shape)
                for name, array in group.items()
            }
            for group in groups
        ]
