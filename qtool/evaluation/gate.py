"""The quality gate: limits on what was measured, with defaults for each scheme."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from qtool.errors import UsageError, nearest
from qtool.scheme import Scheme

CONFIDENCE = 0.95  # of intervals
BATCHES = (1, 16, 64)  # that are timed
Verdict = Literal["pass", "fail", "inconclusive"]
NAMES: Mapping[str, str] = {
    "ppl": "perplexity",
    "ppl_ratio": "perplexity over the reference's",
    "mean_kl": "mean KL divergence from the reference, nats",
    "median_kl": "median of the KL divergence",
    "p99_kl": "99th percentile of the KL divergence",
    "max_kl": "largest KL divergence",
    "top1": "share of tokens with the reference's first choice",
    "confident_flips": "share of the reference's confident tokens with another first choice",
    "collapsed": "greedy answers that loop or end at once, more than the reference's, as a share",
    "faults": "faults of the checkpoint itself, such as another tokenizer",
    "size_ratio": "bytes over the reference's",
}
# by pattern: what tasks and batches are measured is for the caller to say
PATTERNS: Mapping[str, str] = {
    r"task:[\w.,/=-]+\.recovery": "a task's score over the reference's",
    r"task:[\w.,/=-]+": "a task's score",
    r"speedup@\d+": "the reference's time a token over the quantized model's, at a batch",
    r"prefill_speedup": "prompt tokens a second over the reference's",
}
_OPERATORS: Mapping[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
}
_LIMIT = re.compile(r"\s*([^<>=\s]+)\s*(<=|>=|<|>)\s*(\S+)\s*")


@dataclass(frozen=True)
class Measure:
    """A number, and the interval that holds it with `CONFIDENCE`."""

    value: float
    low: float | None = None
    """None: no interval is known."""

    high: float | None = None

    def to_dict(self) -> dict[str, float | None]:
        """Return the number for ``--json``."""
        return {"value": self.value, "low": self.low, "high": self.high}


@dataclass(frozen=True)
class Limit:
    """One condition of a gate."""

    name: str
    """What is measured."""

    operator: str
    """``<=``, ``>=``, ``<`` or ``>``."""

    value: float

    def __str__(self) -> str:
        return f"{self.name}{self.operator}{self.value:g}"


@dataclass(frozen=True)
class Check:
    """A limit, and what became of it."""

    limit: Limit
    measure: Measure
    verdict: Verdict

    def __str__(self) -> str:
        measure = self.measure
        interval = "" if measure.low is None else f" [{measure.low:.4g}, {measure.high:.4g}]"
        return f"{self.verdict}: {self.limit}: {measure.value:.4g}{interval}"

    def to_dict(self) -> dict[str, object]:
        """Return the check for ``--json``."""
        return {
            "limit": str(self.limit),
            "verdict": self.verdict,
            "measured": self.measure.to_dict(),
        }


def parse_gate(
    texts: Sequence[str],
    schemes: Sequence[Scheme],
    is_measured: Callable[[str], bool] = lambda name: True,
    tasks: Sequence[str] = (),
) -> list[Limit]:
    """Return the limits that ``texts`` name; ``default`` stands for those of the schemes.

    A limit that is named later replaces an earlier one of the same name and direction.

    Args:
        texts: such as ``mean_kl<=0.05``.
        schemes: of the quantized layers.
        is_measured: whether a run measures what a name stands for.
        tasks: whose recovery ``default`` has limits for.
    Raises: UsageError, for a text that is not a limit or names nothing that is measured.
    """
    limits: dict[tuple[str, str], Limit] = {}
    for text in texts:
        if text.strip() == "default":
            found = [each for each in default_gate(schemes, tasks) if is_measured(each.name)]
        else:
            found = [_limit(text)]
        limits.update({(each.name, each.operator[0]): each for each in found})
    for limit in limits.values():
        if not is_measured(limit.name):
            raise UsageError(
                "E_GATE",
                f"the gate asks for `{limit.name}`, which is not measured",
                hint="--tasks measures each task that it names, --speed batches of "
                f"{', '.join(map(str, BATCHES))}, --answers what collapsed; all of `qtool eval`",
            )
    return list(limits.values())


def _limit(text: str) -> Limit:
    match = _LIMIT.fullmatch(text)
    if not match:
        raise UsageError(
            "E_GATE", f"`{text}` is not a limit", hint="a limit looks like mean_kl<=0.05"
        )
    name, sign, number = match.groups()
    if name not in NAMES and not any(re.fullmatch(each, name) for each in PATTERNS):
        known = f"known: {', '.join(NAMES)}, task:NAME.recovery, speedup@BATCH"
        raise UsageError("E_GATE", f"`{name}` is not measured", hint=nearest(name, NAMES) or known)
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UsageError("E_GATE", f"`{text}`: `{number}` is not a number")
    return Limit(name, sign, value)


@dataclass(frozen=True)
class _Defaults:
    """How good a scheme of good repute is on the models that its sources measured."""

    recovery: float
    """Of task scores."""

    ppl_ratio: float
    mean_kl: float
    top1: float


# Recovery: Kurtic et al. 2024, "Give Me BF16 or Give Me Death?" (arXiv:2411.02355), for FP8, INT8
# and W4A16; NVIDIA's and Red Hat's model cards for NVFP4 and MXFP4. The other limits are about
# twice what the methods reach on the bundled models (recipes/README.md).
_EIGHT_BITS = _Defaults(recovery=0.995, ppl_ratio=1.02, mean_kl=0.02, top1=0.93)
_FOUR_BITS = _Defaults(recovery=0.98, ppl_ratio=1.08, mean_kl=0.08, top1=0.82)
_NVFP4 = _Defaults(recovery=0.96, ppl_ratio=1.12, mean_kl=0.12, top1=0.78)
_MXFP4 = _Defaults(recovery=0.95, ppl_ratio=1.18, mean_kl=0.18, top1=0.74)
_FEWER_BITS = _Defaults(recovery=0.90, ppl_ratio=1.5, mean_kl=0.5, top1=0.5)


def default_gate(schemes: Sequence[Scheme], tasks: Sequence[str] = ()) -> list[Limit]:
    """Return the limits for a checkpoint with layers of ``schemes``: those of the loosest one."""
    loosest = max(map(_defaults, schemes), key=lambda each: each.mean_kl, default=_EIGHT_BITS)
    return [
        Limit("faults", "<=", 0),
        Limit("ppl_ratio", "<=", loosest.ppl_ratio),
        Limit("mean_kl", "<=", loosest.mean_kl),
        Limit("top1", ">=", loosest.top1),
        Limit("collapsed", "<=", 0.5),
        *(Limit(f"task:{task}.recovery", ">=", loosest.recovery) for task in tasks),
    ]


def _defaults(scheme: Scheme) -> _Defaults:
    bits = scheme.bits_per_weight
    if bits >= 7.5:
        return _EIGHT_BITS
    if bits < 3.9:
        return _FEWER_BITS
    by_scale = {"e8m0": _MXFP4, "e4m3": _NVFP4}
    return by_scale.get(scheme.weights.scale, _FOUR_BITS)


def check_gate(
    limits: Sequence[Limit], measures: Mapping[str, Measure], *, strict: bool
) -> list[Check]:
    """Compare ``measures`` with ``limits``.

    Args:
        limits: the gate.
        measures: by name.
        strict: whether a limit inside the interval is ``inconclusive``.
    """
    unknown = Measure(math.nan)  # a task without a score, say: no limit holds
    return [_check(limit, measures.get(limit.name, unknown), strict) for limit in limits]


def _check(limit: Limit, measure: Measure, strict: bool) -> Check:
    holds = _OPERATORS[limit.operator]
    ends = [measure.value if end is None else end for end in (measure.low, measure.high)]
    if strict and len({holds(end, limit.value) for end in ends}) > 1:
        return Check(limit, measure, "inconclusive")
    return Check(limit, measure, "pass" if holds(measure.value, limit.value) else "fail")
