"""From what was measured after each token to numbers with intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from qtool.evaluation.agreement import Agreement
from qtool.evaluation.gate import CONFIDENCE, Measure

RESAMPLES = 2000
KL_BUCKETS = 32  # of the positions in a window
Floats = NDArray[np.float64]


def measures_of(agreement: Agreement, *, seed: int = 0) -> dict[str, Measure]:
    """Return the numbers of ``agreement`` by name, those of means with an interval from a bootstrap
    over documents: both models are always counted on the same documents.

    Args:
        agreement: at least one token.
        seed: of the bootstrap.
    """
    nll = np.array(agreement.nll, np.float64)
    reference_nll = np.array(agreement.reference_nll, np.float64)
    kl = np.array(agreement.kl, np.float64)
    same = np.array(agreement.same_top1, np.float64)
    confident = np.array(agreement.confident, np.float64)
    columns = np.stack(
        [np.ones_like(nll), nll, reference_nll, kl, same, confident, confident * (1 - same)]
    )
    boot = _Bootstrap(_by_document(columns, agreement.documents), seed)
    return {
        "ppl": boot.measure(lambda sums: _exp(sums[1] / sums[0])),
        "reference_ppl": boot.measure(lambda sums: _exp(sums[2] / sums[0])),
        "ppl_ratio": boot.measure(lambda sums: _exp((sums[1] - sums[2]) / sums[0])),
        "mean_kl": boot.measure(lambda sums: sums[3] / sums[0]),
        "median_kl": Measure(float(np.median(kl))),
        "p99_kl": Measure(float(np.quantile(kl, 0.99))),
        "max_kl": Measure(float(kl.max())),
        "top1": boot.measure(lambda sums: sums[4] / sums[0]),
        "confident_flips": boot.measure(lambda sums: sums[6] / np.maximum(sums[5], 1)),
    }


def kl_by_position(agreement: Agreement) -> list[tuple[int, float]]:
    """Return (first position of a bucket, mean KL divergence there) for `KL_BUCKETS` buckets at
    most.
    """
    positions = np.array(agreement.positions)
    width = max(1, math.ceil((positions.max() + 1) / KL_BUCKETS))
    buckets = positions // width
    sums = np.bincount(buckets, np.array(agreement.kl))
    counts = np.bincount(buckets)
    used: list[int] = np.flatnonzero(counts).tolist()
    return [(number * width, float(sums[number] / counts[number])) for number in used]


def _by_document(columns: Floats, documents: Sequence[int]) -> Floats:
    """Return the sums [C, D] of ``columns`` [C, N] over the tokens of each document."""
    numbers = np.unique(np.array(documents), return_inverse=True)[1]
    return np.stack([np.bincount(numbers, column) for column in columns])


def _exp(values: Floats) -> Floats:
    with np.errstate(over="ignore"):
        return np.exp(values)


class _Bootstrap:
    """Resamples documents, `RESAMPLES` times."""

    def __init__(self, sums: Floats, seed: int) -> None:
        self._total = sums.sum(-1)
        self._resampled: Floats | None = None
        count = sums.shape[1]
        if count > 1:
            generator = np.random.default_rng(seed)
            draws = generator.multinomial(count, np.full(count, 1 / count), RESAMPLES)
            self._resampled = sums @ draws.T.astype(np.float64)

    def measure(self, statistic: Callable[[Floats], Floats]) -> Measure:
        """Return ``statistic`` of the sums [C] or [C, RESAMPLES], with its percentile interval."""
        value = float(statistic(self._total))
        if self._resampled is None:
            return Measure(value)
        values = statistic(self._resampled)
        if not np.isfinite(values).all():
            return Measure(value)
        rest = (1 - CONFIDENCE) / 2
        low, high = np.quantile(values, [rest, 1 - rest])
        return Measure(value, float(low), float(high))
