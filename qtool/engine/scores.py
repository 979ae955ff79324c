"""Scores: how relevant documents are for queries, and the probabilities of labels after texts.
`Engine` and the server share this; it runs without torch.

Sources: sentence-transformers 5 `base/modality.py` and vLLM 0.33
`examples/pooling/score/template/`: templates take messages of the roles query and document, and the
instruction as a system message or as a variable.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, Self, TypeVar

import numpy as np

from qtool.checkpoint.encoding import Encoding
from qtool.checkpoint.strict_json import Json
from qtool.engine.outputs import CompletionOutput
from qtool.engine.sampling_params import SamplingParams
from qtool.engine.vectors import Vector
from qtool.errors import CheckpointRefused, UsageError

T = TypeVar("T")
P = TypeVar("P", str, list[int])
LABEL_PARAMS = SamplingParams(max_new_tokens=1, temperature=0)
"""Of requests for the probabilities of labels: they are read off the first generated token."""
_ROLE_PATTERNS = [
    re.compile(rf"['\"<]{role}['\">]", re.IGNORECASE) for role in ("query", "document")
]


def make_pairs(first: Sequence[T], second: Sequence[T]) -> list[tuple[T, T]]:
    """Return the pairs to score: the texts of both sides one by one, or the only one of ``first``
    with each of ``second``; texts or lists of tokens.

    Raises: UsageError, when the sides differ in length otherwise.
    """
    if len(first) == 1:
        first = [*first] * len(second)
    if len(first) != len(second):
        message = f"{len(first)} texts on one side and {len(second)} on the other"
        raise UsageError("E_PROMPT", message, hint="as many on both sides, or one on the first")
    return list(zip(first, second, strict=True))


class ScoreOptions(Protocol):
    """The options of a request for scores. None, False or empty asks for nothing, of use_activation
    None or True.
    """

    @property
    def label_token_ids(self) -> Sequence[int] | None:
        """Tokens whose probabilities are the scores."""

    @property
    def apply_softmax(self) -> bool | None:
        """Whether the probabilities of the labels sum to 1."""

    @property
    def item_first(self) -> bool | None:
        """Whether the item comes before the query."""

    @property
    def instruction(self) -> str | None:
        """What makes a document relevant, for a reranker."""

    @property
    def use_activation(self) -> bool | None:
        """Whether the scores of a reranker go through a sigmoid."""


def ignored_option_reason(options: ScoreOptions) -> str | None:
    """Return why one of ``options`` would be ignored; None if none would."""
    if options.label_token_ids is None:
        where = "without"
        asked = {"apply_softmax": options.apply_softmax, "item_first": options.item_first}
    else:
        where = "with"
        asked = {
            "instruction": bool(options.instruction),
            "use_activation": options.use_activation is False,
        }
    for name, is_asked in asked.items():
        if is_asked:
            return f"`{name}` means nothing {where} label_token_ids"
    return None


def join_pairs(pairs: Iterable[tuple[P, P]], *, item_first: bool) -> list[P]:
    """Return the prompts after which labels are scored, one for each pair of query and item."""
    return [item + query if item_first else query + item for query, item in pairs]


def check_complete(outputs: Iterable[CompletionOutput]) -> None:
    """Raise UsageError if one of ``outputs`` was aborted."""
    for output in outputs:
        if output.finish is not None and output.finish.reason["type"] == "abort":
            raise UsageError("E_ABORTED", "the request was aborted", hint="send it again")


def label_scores(output: CompletionOutput, *, apply_softmax: bool) -> list[float]:
    """Return the probability of each label; with ``apply_softmax`` they sum to 1."""
    logprobs = output.logprobs[0].labels
    likeliest = max(logprobs)
    if not apply_softmax or likeliest == -math.inf:
        return [math.exp(logprob) for logprob in logprobs]
    weights = [math.exp(logprob - likeliest) for logprob in logprobs]
    total = sum(weights)
    return [weight / total for weight in weights]


def distinct_texts(pairs: Iterable[tuple[str, str]]) -> list[str]:
    """Return the texts of ``pairs``, each once: an embedding model encodes these to score them."""
    return list(dict.fromkeys(text for pair in pairs for text in pair))


def cosines(pairs: Iterable[tuple[str, str]], vectors: Sequence[Vector]) -> list[float]:
    """Return the cosine similarity of each of ``pairs``, as vLLM does.

    Args:
        pairs: texts.
        vectors: the embeddings of their `distinct_texts`, in that order.
    """
    pairs = list(pairs)
    vector_by_text = dict(zip(distinct_texts(pairs), vectors, strict=True))
    return [_cosine(vector_by_text[first], vector_by_text[second]) for first, second in pairs]


def _cosine(first: Vector, second: Vector) -> float:
    lengths = float(np.linalg.norm(first)) * float(np.linalg.norm(second))
    return float(first @ second) / max(lengths, 1e-12)


def rank(scores: Sequence[float], top_n: int | None) -> list[int]:
    """Return the indexes of the ``top_n`` largest of ``scores``, in order; None or 0: of all."""
    return sorted(range(len(scores)), key=lambda index: -scores[index])[: top_n or None]


@dataclass(frozen=True)
class PairForm:
    """How a query and a document become the prompt of a reranker."""

    has_template: bool
    """Whether the chat template shows both; otherwise the tokenizer joins them."""
    instruction: str
    """The checkpoint's own; empty if it has none."""

    @classmethod
    def of(cls, encoding: Encoding | None, template: str | None) -> Self:
        """Return the form for a model with this ``encoding`` and chat ``template``.

        Raises: CheckpointRefused, when the model answers yes or no and its template asks nothing.
        """
        shown = all(role.search(template or "") for role in _ROLE_PATTERNS)
        if encoding is not None and encoding.labels and not shown:
            raise CheckpointRefused(
                "E_CHAT_TEMPLATE",
                "the model scores by the answers yes and no, and its chat template does not show a "
                "query and a document",
                hint="give a template with messages of these roles with --chat-template, or as "
                "`tokenizer.chat_template` of the engine",
            )
        return cls(shown, "" if encoding is None else encoding.prompt)

    def check(self, instruction: str | None) -> None:
        """Raise UsageError for an ``instruction`` that would be ignored."""
        if instruction and not self.has_template:
            raise instruction_not_shown()

    def conversations(
        self, pairs: Iterable[tuple[str, str]], instruction: str | None
    ) -> list[list[Json]]:
        """Return for each of ``pairs`` the messages that the template gets."""
        wanted = instruction or self.instruction
        system: list[Json] = [{"role": "system", "content": wanted}] if wanted else []
        return [
            [
                {"role": "query", "content": query},
                {"role": "document", "content": document},
                *system,
            ]
            for query, document in pairs
        ]

    def variables(self, instruction: str | None) -> dict[str, str]:
        """Return the variables that the template gets beside the messages."""
        wanted = instruction or self.instruction
        return {"instruction": wanted, "instruct": wanted} if wanted else {}

    def check_shown(self, instruction: str | None, prompt: str) -> None:
        """Raise UsageError for an ``instruction`` that the rendered ``prompt`` does not show."""
        if instruction and instruction.strip() not in prompt:
            raise instruction_not_shown()


def instruction_not_shown() -> UsageError:
    """Return the error for an instruction that would be ignored."""
    return UsageError(
        "E_INSTRUCTION",
        "`instruction` would be ignored: the prompts of this model do not contain it",
        hint="leave it out, or give a chat template that shows it",
    )
