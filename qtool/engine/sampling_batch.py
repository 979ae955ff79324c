"""What the rows of a step ask of the sampler, brought into arrays on the host."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qtool.engine.sampling_params import SamplingParams

NARROW = 1024  # a top_k up to this takes the largest logits instead of sorting all
SORTED_AT_ONCE = 16  # rows
Arrays = dict[str, NDArray[np.generic]]


class History:
    """The distinct tokens of one sequence, and how often each of them was generated: what penalties
    go by.
    """

    def __init__(self, prompt_ids: Sequence[int], output_ids: Sequence[int] = ()) -> None:
        distinct = np.unique(np.asarray(prompt_ids, np.int64))
        self._size = len(distinct)
        self._ids: NDArray[np.int64] = np.concatenate([distinct, np.zeros(256, np.int64)])
        self._counts: NDArray[np.float32] = np.zeros(len(self._ids), np.float32)
        self._indices = {token: index for index, token in enumerate(distinct.tolist())}
        for token in output_ids:
            self.append(token)

    @classmethod
    def of(
        cls, params: SamplingParams, prompt_ids: Sequence[int], output_ids: Sequence[int] = ()
    ) -> History | None:
        """Return the history that ``params`` need, None when they penalize nothing; only
        repetition_penalty counts the prompt.
        """
        if not params.penalizes:
            return None
        return cls(prompt_ids if params.repetition_penalty != 1 else (), output_ids)

    def append(self, token: int) -> None:
        """Count one generated token."""
        index = self._indices.setdefault(token, self._size)
        if index == self._size:
            if index == len(self._ids):
                self._ids, self._counts = (
                    np.concatenate([old, np.zeros_like(old)]) for old in (self._ids, self._counts)
                )
            self._ids[index] = token
            self._size += 1
        self._counts[index] += 1

    def counts(
        self, vocab_size: int, drafts: Sequence[int] = ()
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Return the distinct tokens that the model can predict, and how often each was generated
        (0: only in the prompt), with ``drafts`` after the others.
        """
        size = self._size
        for token in drafts:
            self.append(token)
        found = self._counts_now(vocab_size)
        for token in drafts:
            self._counts[self._indices[token]] -= 1
        for token in {*drafts}:
            if self._indices[token] >= size:
                del self._indices[token]
        self._size = size
        return found

    def _counts_now(self, vocab_size: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        ids, counts = self._ids[: self._size], self._counts[: self._size]
        inside = (ids >= 0) & (ids < vocab_size)  # placeholders of images lie outside
        return ids[inside], counts[inside]


@dataclass(slots=True)
class RowRequest:
    """What one row of a step asks for."""

    params: SamplingParams
    seed: int
    """From `SamplingParams.row_seed`, the same for all steps of a sequence."""
    position: int
    """Tokens generated before this one; with the seed it decides the noise."""
    history: History | None = None
    """From `History.of`."""
    end_ids: Collection[int] = ()
    """Tokens that must not come while ``position < min_new_tokens``."""
    logprobs: bool = False
    top_logprobs: int = 0
    """Alternatives; counts only with `logprobs`."""
    labels: Sequence[int] = ()
    """Tokens whose log probabilities are returned too, with `logprobs`."""
    mask: NDArray[np.int32] | None = None
    """The tokens that may come, from `Constraint.mask`, which knows of min_new_tokens."""
    drafts: Sequence[int] = ()
    """Tokens drafted before this one, which the history does not have."""

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


def draw_settings(
    requests: Sequence[RowRequest], vocab_size: int
) -> tuple[Arrays, tuple[int, ...]]:
    """Return the settings of some rows as arrays by name, and the width of each filter."""
    arrays: Arrays = {}
    if any(request.changes_logits for request in requests):
        arrays |= _penalties(requests, vocab_size)
        arrays |= _biases(requests, vocab_size)
        arrays |= _masks(requests)
    params = [request.params for request in requests]
    is_greedy = np.array([param.greedy for param in params])
    if is_greedy.all():
        return arrays, ()
    seeds = [request.seed for request in requests]
    arrays["keys"] = row_keys(seeds, [request.position for request in requests])
    temperatures = [1.0 if param.greedy else 1 / param.temperature for param in params]
    arrays["inverse"] = np.array(temperatures, np.float32)
    if is_greedy.any():
        arrays["greedy"] = is_greedy
    if any(param.min_p > 0 for param in params):
        arrays["min_p"] = np.array([param.min_p for param in params], np.float32)
    widths = []
    for number, (rows, width, top_k, top_p) in enumerate(_filters(params, is_greedy, vocab_size)):
        widths.append(width)
        arrays[f"rows{number}"] = rows
        arrays[f"top_k{number}"] = top_k
        arrays[f"top_p{number}"] = top_p
    return arrays, tuple(widths)


def _filters(
    params: Sequence[SamplingParams], is_greedy: NDArray[np.bool_], vocab_size: int
) -> Iterator[tuple[NDArray[np.int64], int, NDArray[np.int64], NDArray[np.float64]]]:
    """Yield rows that top_k or top_p filters, in groups: the rows, how many of the largest logits
    they need, their top_k and their top_p.
    """
    limits = [param.top_k if 0 < param.top_k < vocab_size else vocab_size for param in params]
    top_k = np.array(limits, np.int64)
    top_p = np.array([param.top_p for param in params], np.float64)
    filtered = ((top_k < vocab_size) | (top_p < 1)) & ~is_greedy
    narrow = (filtered & (top_k <= NARROW)).nonzero()[0].astype(np.int64)
    wide = (filtered & (top_k > NARROW)).nonzero()[0].astype(np.int64)
    if len(narrow):
        yield narrow, int(top_k[narrow].max()), top_k[narrow], top_p[narrow]
    for start in range(0, len(wide), SORTED_AT_ONCE):
        rows = wide[start : start + SORTED_AT_ONCE]
        yield rows, vocab_size, top_k[rows], top_p[rows]


def _penalties(requests: Sequence[RowRequest], vocab_size: int) -> Arrays:
    """Return which logits of the flat [R * V] are penalized, and by how much."""
    indices: list[NDArray[np.int64]] = []
    repetitions: list[NDArray[np.float32]] = []
    penalties: list[NDArray[np.float32]] = []
    for row, request in enumerate(requests):
        if request.history is None:
            continue
        params = request.params
        ids, counts = request.history.counts(vocab_size, request.drafts)
        penalty = params.frequency_penalty * counts + params.presence_penalty * (counts > 0)
        indices.append(ids + row * vocab_size)
        repetitions.append(np.full(len(ids), params.repetition_penalty, np.float32))
        penalties.append(penalty.astype(np.float32))
    if not indices:
        return {}
    return {
        "penalty_indices": np.concatenate(indices),
        "repetition": np.concatenate(repetitions),
        "penalty": np.concatenate(penalties),
    }


def _biases(requests: Sequence[RowRequest], vocab_size: int) -> Arrays:
    """Return what is added to which logits of the flat [R * V]."""
    indices: list[int] = []
    biases: list[float] = []
    for row, request in enumerate(requests):
        added = list(request.params.biases.items())
        if request.forbids_ends:
            added += [(token, -np.inf) for token in request.end_ids]
        inside = [(token, bias) for token, bias in added if 0 <= token < vocab_size]
        indices += [token + row * vocab_size for token, _ in inside]
        biases += [bias for _, bias in inside]
    if not indices:
        return {}
    return {"bias_indices": np.array(indices, np.int64), "bias": np.array(biases, np.float32)}


def _masks(requests: Sequence[RowRequest]) -> Arrays:
    """Return the rows that have a mask, and their masks."""
    masks = {row: request.mask for row, request in enumerate(requests) if request.mask is not None}
    if not masks:
        return {}
    return {
        "masked_rows": np.array(list(masks), np.int64),
        "masks": np.stack(list(masks.values())),
    }
