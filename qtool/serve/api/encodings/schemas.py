"""What the routes for embeddings and scores reply."""

from __future__ import annotations

from typing import Literal

from msgspec import UNSET, Struct, UnsetType


class EncodingUsage(Struct):
    """Tokens of a request."""

    prompt_tokens: int
    total_tokens: int
    completion_tokens: int = 0


class Embedding(Struct):
    """The vector of one text."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str
    """Numbers, or float32 in base64, little-endian."""


class Embeddings(Struct):
    """The reply of ``POST /v1/embeddings``."""

    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[Embedding]
    usage: EncodingUsage


class Score(Struct):
    """The score of one pair."""

    object: Literal["score"]
    index: int
    score: float


class Scores(Struct):
    """The reply of ``POST /v1/score``, vLLM's."""

    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[Score]
    usage: EncodingUsage


class LabelScores(Struct):
    """The reply of ``POST /v1/score`` to a request with ``label_token_ids``, SGLang's."""

    id: str
    object: Literal["scoring"]
    model: str
    scores: list[list[float]]
    """For each item the probability of each label."""
    usage: EncodingUsage


class RankedText(Struct):
    """A document."""

    text: str


class RankedDocument(Struct):
    """A document with its place in the request."""

    index: int
    relevance_score: float
    document: RankedText | UnsetType = UNSET


class Ranking(Struct):
    """The reply of ``POST /v1/rerank``, Cohere's and Jina's: the most relevant documents first."""

    id: str
    model: str
    results: list[RankedDocument]
    usage: EncodingUsage


GENERATED = (Embeddings, Scores, LabelScores, Ranking)
