"""`Evaluation`: all that `eval` measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field

from qtool.checkpoint.part_costs import KEY as BY_LAYER
from qtool.checkpoint.part_costs import PartCost
from qtool.checkpoint.strict_json import finite
from qtool.evaluation.gate import Check, Measure


@dataclass(frozen=True)
class Side:
    """One of the two models."""

    path: str
    """The folder."""

    schemes: Mapping[str, Mapping[str, int]]
    """How many layers of each scheme each kernel multiplies; empty for a 16-bit model."""

    size_bytes: int
    """Of all tensors."""

    runs_on: str
    """``engine``, ``transformers`` for its layers around our kernels, or ``stored``."""

    @property
    def dequantizes(self) -> list[str]:
        """The schemes that are computed by the reference kernel."""
        return [name for name, kernels in self.schemes.items() if "reference" in kernels]


@dataclass(frozen=True)
class Data:
    """The texts."""

    source: str
    """As it was given."""

    documents: int
    windows: int
    tokens: int
    """That count: each was predicted by both models."""

    seq_len: int
    stride: int
    seed: int
    digest: str
    """sha256 of the tokens and of how they are cut."""


@dataclass(frozen=True)
class ShownToken:
    """A position where the two models differ most, as text."""

    kl: float
    where: str
    """File and line of the document."""

    position: int
    """Of the token that follows, in its document."""

    context: str
    """The text before it."""

    following: str
    """The token that follows in the text."""

    reference: str
    """The reference's first choice."""

    reference_probability: float
    quantized: str
    """The quantized model's first choice."""

    probability: float


@dataclass(frozen=True)
class ShownCollapse:
    """A greedy answer that collapsed, as text."""

    kind: str
    """``loop`` or ``sudden end``."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class Speed:
    """How fast one of the models is."""

    decode_ms: Mapping[int, float]
    """Milliseconds a token, by batch."""

    prefill_tokens_s: float
    """Prompt tokens a second."""

    weight_bytes: int
    """What the weights take in the device's memory; of a CPU the size of the checkpoint."""

    cache_tokens: int
    """Tokens of the KV cache that fit beside the weights."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A quantized checkpoint, compared with its reference."""

    model: Side
    reference: Side
    data: Data
    device: str
    measures: Mapping[str, Measure]
    """By the names that gates use, and ``reference_ppl``."""

    faults: Sequence[str]
    """What is wrong with the checkpoint itself."""

    kl_by_position: Sequence[tuple[int, float]]
    """First position of a bucket, and the mean KL divergence there."""

    worst: Sequence[ShownToken]
    """Worst first."""

    collapsed: Sequence[ShownCollapse]
    answers: int
    """Greedy answers that were compared."""

    speed: Mapping[str, Speed] = field(default_factory=dict)
    """Of ``model`` and ``reference``; empty when they were not timed."""

    by_layer: Sequence[PartCost] = ()
    """What each part costs by itself, worst first."""

    checks: Sequence[Check] = ()
    """The gate's limits; empty without a gate."""

    seconds: float = 0.0
    notes: Sequence[str] = field(default=())
    """What a reader should know."""

    @property
    def failed(self) -> list[Check]:
        """The limits that do not hold, or may not."""
        return [check for check in self.checks if check.verdict != "pass"]

    def to_dict(self) -> dict[str, object]:
        """Return the evaluation for ``--json``."""
        return {
            **asdict(self),
            "measures": {name: each.to_dict() for name, each in self.measures.items()},
            "checks": [check.to_dict() for check in self.checks],
            "passed": not self.failed if self.checks else None,
        }

    def for_manifest(self) -> dict[str, object]:
        """Return the numbers that the manifest and the model card keep; NaN becomes None."""
        kept = {
            "measures": {name: each.to_dict() for name, each in self.measures.items()},
            "data": {
                "tokens": self.data.tokens,
                "documents": self.data.documents,
                "seq_len": self.data.seq_len,
                "digest": self.data.digest,
            },
            "tasks": [*self._task_rows()],
            "speed": [*self._speed_rows()],
            "gate": [check.to_dict() for check in self.checks],
            BY_LAYER: [asdict(each) for each in self.by_layer],
        }
        return {key: finite(value) for key, value in kept.items()}

    def _task_rows(self) -> Iterator[dict[str, object]]:
        for name, measure in self.measures.items():
            kept = self.measures.get(f"{name}.recovery")
            if kept and kept.value:
                reference = measure.value / kept.value
                yield _compared(name.removeprefix("task:"), reference, measure.value)

    def _speed_rows(self) -> Iterator[dict[str, object]]:
        if not self.speed:
            return
        ours, theirs = self.speed["model"], self.speed["reference"]
        for batch, value in ours.decode_ms.items():
            name = f"milliseconds a token, batch {batch}"
            yield _compared(name, theirs.decode_ms[batch], value)
        yield _compared("prompt tokens a second", theirs.prefill_tokens_s, ours.prefill_tokens_s)


def _compared(name: str, reference: float, quantized: float) -> dict[str, object]:
    return {
        "name": name,
        "reference": reference,
        "quantized": quantized,
        "ratio": quantized / reference,
    }
