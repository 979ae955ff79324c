"""From logits to tokens: one draw for all rows of a step.

Temperature first, then top_k, then top_p over what is left, renormalised; min_p is relative to the
largest probability. Penalties and logit_bias change the logits before all of that. A draw is the
largest of ``p / E`` with ``E`` exponentially distributed (the Gumbel-max trick), where ``E`` is a
hash of seed, position and token: it knows neither the batch nor the row. Every sum that decides
something is one of integers, so the order in which a device adds does not show either.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qtool.engine.sampling_params import SamplingParams

ROWS_AT_ONCE = 64  # of more rows the draw is made in parts, so that its temporaries stay small
NARROW = 1024  # a top_k up to this takes the largest logits instead of sorting all
SORTED_AT_ONCE = 16  # rows


class History:
    """The distinct tokens of one sequence, and how often each of them was generated: what penalties
    go by.
    """

    def __init__(self, prompt_ids: Sequence[int], output_ids: Sequence[int] = ()) -> None:
        distinct = np.unique(np.asarray(prompt_ids, np.int64))
        self._size = len(distinct)
        self._ids: NDArray[np.int64] = np.concatenate([distinct, np.zeros(256, np.int64)])
        self._counts: NDArray[np.float32] = np.zeros(len(self._ids), np.float32)
        self._places = {token: place for place, token in enumerate(distinct.tolist())}
        for token in output_ids:
            self.append(token)

    @classmethod
    def of(
        cls, params: SamplingParams, prompt_ids: Sequence[int], output_ids: Sequence[int] = ()
    ) -> History | None:
        """Return the history that ``params`` need, None when they penalize nothing; only
        repetition_penalty counts the prompt.
        """
        return (
            cls(prompt_ids if params.repetition_penalty != 1 else (), output_ids)
            if params.penalizes
            else None
        )

    def append(self, token: int) -> None:
        """Count one generated token."""
        place = self._places.setdefault(token, self._size)
        if place == self._size:
            if place == len(self._ids):
                self._ids, self._counts = (
                    np.concatenate([old, np.zeros_like(old)]) for old in (self._ids, self._counts)
                )
            self._ids[place] = token
            self._size += 1
        self._counts[place] += 1

    def counts(self, vocab_size: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Return the distinct tokens that the model can predict, and how often each was generated
        (0: only in the prompt).
        """
        ids, counts = self._ids[: self._size], self._counts[: self._size]
        inside = (ids >= 0) & (ids < vocab_size)  # placeholders of images lie outside
        return ids[inside], counts[inside]


@dataclass(slots=True)
class RowRequest:
    """What one row of a step asks for.

    seed: from `SamplingParams.row_seed`, the same for all steps of a sequence. position: tokens
        generated before this one; it decides the noise, with
    the seed. history: from `History.of`. end_ids: what must not come while position <
    min_new_tokens. top_logprobs counts only with logprobs.
    mask: the tokens that may come, from `Constraint.mask`, which knows of min_new_tokens.
    """

    params: SamplingParams
    seed: int
    position: int
    history: History | None = None
    end_ids: Collection[int] = ()
    logprobs: bool = False
    top_logprobs: int = 0
    mask: NDArray[np.int32] | None = None

    @property
    def changes_logits(self) -> bool:
        """Whether the logits are edited before the draw."""
        return (
            self.history is not None
            or bool(self.params.logit_bias)
            or self.mask is not None
            or self.forbids_ends
        )

    @property
    def forbids_ends(self) -> bool:
        """Whether end_ids must not come now."""
        return (
            self.mask is None and self.position < self.params.min_new_tokens and bool(self.end_ids)
        )


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Natural logarithms of softmax(logits): of the chosen tokens [T], and of the most probable
    ones with their ids [T, top], largest first.
    """

    chosen: Tensor
    top: Tensor
    top_ids: Tensor


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


def greedy(logits: Tensor) -> Tensor:
    """Return the place of the largest logit of each row, [R, V] -> int64 [R]; -1 for a row with NaN
    or +inf, or with nothing but -inf.
    """
    largest, tokens = _largest(logits)
    return tokens.masked_fill_(largest - largest != 0, -1)


def _largest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the largest logit of each row, NaN above all, and its first place, [R] each; on a GPU
    many blocks share a row.
    """
    rows, size = logits.shape
    parts = math.gcd(size, 256) if logits.is_cuda else 1
    if parts < 16:
        return logits.max(dim=-1)
    largest, places = logits.view(rows, parts, -1).max(dim=-1)
    best, part = largest.max(dim=-1)
    return best, part * (size // parts) + places.gather(1, part[:, None])[:, 0]


def logprobs_of(logits: Tensor, targets: Tensor, top: int = 0) -> Logprobs:
    """Return the log-probabilities, by ``logits`` [T, V], of ``targets`` [T] (negative ones count
    as 0) and of the ``top`` most probable tokens.
    """
    parts = []
    for start in range(0, max(1, logits.shape[0]), ROWS_AT_ONCE):
        some = logits[start : start + ROWS_AT_ONCE].float()
        total = some.logsumexp(-1, keepdim=True)
        chosen = (
            some.gather(1, targets[start : start + ROWS_AT_ONCE, None].long().clamp(min=0)) - total
        )
        best = some.topk(min(top, logits.shape[1]), dim=-1)
        parts.append((chosen[:, 0], best.values - total, best.indices))
    return Logprobs(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return a hash of each number.

    Source: SplitMix64, Steele, Lea and Flood 2014, doi:10.1145/2714064.2660195.
    """
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def row_keys(seeds: Sequence[int], positions: Sequence[int]) -> NDArray[np.int32]:
    """Return two random numbers for each pair of seed and position, [2, R]; the second is odd."""
    seed = np.array([number % 2**64 for number in seeds], np.uint64)
    mixed = _mix(_mix(seed) ^ _mix(np.array(positions, np.uint64)))
    return (
        np.stack([mixed & np.uint64(0xFFFFFFFF), mixed >> np.uint64(32) | np.uint64(1)])
        .astype(np.uint32)
        .view(np.int32)
    )


def token_keys(vocab_size: int) -> NDArray[np.int32]:
    """Return a number for each token id, [V]: random above the id's 20 bits, so that no two are the
    same or differ in their highest bits alone.
    """
    ids = np.arange(vocab_size, dtype=np.uint64)
    return (
        ((ids ^ (_mix(ids) << np.uint64(20))) & np.uint64(0xFFFFFFFF))
        .astype(np.uint32)
        .view(np.int32)
    )


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

    Args: logits [F, V]; width: so many of the largest are looked at, top_k or more; top_k int64,
        top_p float64, 1 / temperature float32, all [F, 1].
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
        self.vocab_size, self.device = vocab_size, torch.device(device)
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
        settings = [self._settings(requests[start : start + ROWS_AT_ONCE]) for start in starts]
        rows = tuple(row for row, request in enumerate(requests) if request.logprobs)
        index = {"rows": np.array(rows, np.int64)} if 0 < len(rows) < len(requests) else {}
        *on_device, ship_index = self._ship([*(arrays for arrays, _ in settings), index])
        parts = (
            _Part(slice(start, start + ROWS_AT_ONCE), tensors, widths)
            for start, tensors, (_, widths) in zip(starts, on_device, settings, strict=True)
        )
        top = max((requests[row].top_logprobs for row in rows), default=0)
        return Prepared(tuple(parts), rows, ship_index.get("rows"), top)

    def draw(self, logits: Tensor, prepared: Prepared) -> Samples:
        """Draw a token for each row of ``logits`` [R, V] with settings that are on the device
        already.
        """
        if logits.shape[1] != self.vocab_size:
            raise ValueError(
                f"{logits.shape[1]} logits a row for a vocabulary of {self.vocab_size}"
            )
        if any(part.tensors for part in prepared.parts):
            drawn = [
                self._draw(logits[part.rows], part) if part.tensors else greedy(logits[part.rows])
                for part in prepared.parts
            ]
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
        return Samples(tokens, logprobs_of(some, chosen, prepared.top), prepared.logprob_rows)

    def _draw(self, logits: Tensor, part: _Part) -> Tensor:
        """Draw for up to ROWS_AT_ONCE rows, [R, V] -> [R]."""
        given = part.tensors
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
        if not given.keys() & {"penalty_places", "bias_places", "masks"}:
            return logits
        logits = logits.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        flat = logits.view(-1)
        if "penalty_places" in given:
            old, repetition = flat[given["penalty_places"]], given["repetition"]
            flat[given["penalty_places"]] = (
                torch.where(old > 0, old / repetition, old * repetition) - given["penalty"]
            )
        if "bias_places" in given:
            flat.index_add_(0, given["bias_places"], given["bias"])
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

    def _settings(
        self, requests: Sequence[RowRequest]
    ) -> tuple[dict[str, NDArray[Any]], tuple[int, ...]]:
        """Return the settings of some rows as arrays by name, and the width of each of their
        filters.
        """
        arrays: dict[str, NDArray[Any]] = {}
        if any(request.changes_logits for request in requests):
            arrays |= self._edits(requests)
        params = [request.params for request in requests]
        is_greedy = np.array([param.greedy for param in params])
        if is_greedy.all():
            return arrays, ()
        arrays["keys"] = row_keys(
            [request.seed for request in requests], [request.position for request in requests]
        )
        arrays["inverse"] = np.array(
            [1.0 if param.greedy else 1 / param.temperature for param in params], np.float32
        )
        if is_greedy.any():
            arrays["greedy"] = is_greedy
        if any(param.min_p > 0 for param in params):
            arrays["min_p"] = np.array([param.min_p for param in params], np.float32)
        top_k = np.array(
            [
                param.top_k if 0 < param.top_k < self.vocab_size else self.vocab_size
                for param in params
            ],
            np.int64,
        )
        top_p = np.array([param.top_p for param in params], np.float64)
        filtered = ((top_k < self.vocab_size) | (top_p < 1)) & ~is_greedy
        narrow, wide = (
            (filtered & some).nonzero()[0].astype(np.int64)
            for some in (top_k <= NARROW, top_k > NARROW)
        )
        groups = [(rows, int(top_k[rows].max())) for rows in (narrow,) if len(rows)]
        groups += [
            (wide[start : start + SORTED_AT_ONCE], self.vocab_size)
            for start in range(0, len(wide), SORTED_AT_ONCE)
        ]
        for number, (rows, _) in enumerate(groups):
            arrays |= {
                f"rows{number}": rows,
                f"top_k{number}": top_k[rows],
                f"top_p{number}": top_p[rows],
            }
        return arrays, tuple(width for _, width in groups)

    def _edits(self, requests: Sequence[RowRequest]) -> dict[str, NDArray[Any]]:
        """Return which logits of the flat [R * V] change, and how, and the masks of the rows that
        have one.
        """
        penalties: list[tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.float32]]] = []
        places: list[int] = []
        biases: list[float] = []
        for row, request in enumerate(requests):
            params, first = request.params, row * self.vocab_size
            if request.history is not None:
                ids, counts = request.history.counts(self.vocab_size)
                penalty = params.frequency_penalty * counts + params.presence_penalty * (counts > 0)
                penalties.append(
                    (
                        ids + first,
                        np.full(len(ids), params.repetition_penalty, np.float32),
                        penalty.astype(np.float32),
                    )
                )
            added = list(params.biases.items())
            if request.forbids_ends:
                added += [(token, -np.inf) for token in request.end_ids]
            inside = [
                (token + first, bias) for token, bias in added if 0 <= token < self.vocab_size
            ]
            places += [place for place, _ in inside]
            biases += [bias for _, bias in inside]
        arrays: dict[str, NDArray[Any]] = {}
        if penalties:
            arrays |= dict(
                zip(
                    ("penalty_places", "repetition", "penalty"),
                    map(np.concatenate, zip(*penalties, strict=True)),
                    strict=True,
                )
            )
        if places:
            arrays |= {
                "bias_places": np.array(places, np.int64),
                "bias": np.array(biases, np.float32),
            }
        masks = {
            row: request.mask for row, request in enumerate(requests) if request.mask is not None
        }
        if masks:
            arrays |= {
                "masked_rows": np.array(list(masks), np.int64),
                "masks": np.stack(list(masks.values())),
            }
        return arrays

    def _ship(self, groups: Sequence[Mapping[str, NDArray[Any]]]) -> list[dict[str, Tensor]]:
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
