"""The bodies of requests for embeddings, scores and ranked documents.

Sources: OpenAI's API reference; Cohere's and Jina's for rerank; vLLM 0.33
`entrypoints/pooling/*/protocol.py`; SGLang 0.5.23 `srt/entrypoints/openai/protocol.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, PlainValidator, WithJsonSchema, model_validator

from qtool.engine.sampling_params import LARGEST
from qtool.engine.scores import ignored_option_reason
from qtool.serve.api.body import Part
from qtool.serve.api.fields import (
    PROMPT_SCHEMA,
    ModelName,
    PromptInput,
    RequestId,
    TokenId,
    Whole,
    are_tokens,
    check_prompt,
)
from qtool.serve.api.protocol import CacheFields

MAX_INPUTS = 2048  # OpenAI's limit
MAX_LABELS = 256
_NOT_CUT = "texts that are too long are refused: shorten them"
NOT_OFFERED = {
    "stream": "the reply comes whole",
    "truncate": _NOT_CUT,
    "truncation": _NOT_CUT,
    "truncate_prompt_tokens": _NOT_CUT,
    "chat_template_kwargs": "`instruction` is the only variable, in scores",
    "lora_request": "this server loads no adapters",
}
"""Fields of all these routes that would change the answer, and what to do instead."""
SIDES = (("text_1", "query", "queries", "data_1"), ("text_2", "documents", "items", "data_2"))
"""The names that each side of a request for scores may have."""
_IN_TEXT = "write it into the texts, as the model's card says"
Texts = str | Annotated[list[str], Field(min_length=1, max_length=MAX_INPUTS, fail_fast=True)]
Input = Annotated[
    PromptInput,
    PlainValidator(partial(check_prompt, most=MAX_INPUTS)),
    WithJsonSchema(PROMPT_SCHEMA),
]


class EncodingFields(CacheFields):
    """What all these requests may say."""

    model: ModelName | None = None
    rid: RequestId | None = None
    use_activation: bool | None = None
    """Whether embeddings are normalized to length 1, and scores go through a sigmoid, where the
    checkpoint says so; None means true. vLLM's.
    """


class EmbeddingRequest(EncodingFields):
    """``POST /v1/embeddings``."""

    not_offered: ClassVar[Mapping[str, str]] = {
        **NOT_OFFERED,
        "messages": "send texts in `input`",
        "embed_dtype": "numbers are float32",
        "embedding_type": "numbers are float32",
        "embedding_types": "numbers are float32",
        "output_dtype": "numbers are float32",
        "endianness": "base64 is little-endian",
        "output_dimension": "`dimensions` cuts vectors",
        "input_type": _IN_TEXT,
        "instruction": _IN_TEXT,
        "instruct": _IN_TEXT,
        "prompt_name": _IN_TEXT,
        "task": _IN_TEXT,
        "late_chunking": "each text has a vector of its own",
    }
    input: Input
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[Whole, Field(ge=1, le=LARGEST)] | None = None
    add_special_tokens: bool | None = None
    normalize: bool | None = None
    """An older name of ``use_activation`` in vLLM."""

    @model_validator(mode="after")
    def _take_normalize(self) -> Self:
        if self.use_activation is None:
            self.use_activation = self.normalize
        return self


class PairFields(EncodingFields):
    """What requests for scores may say."""

    instruction: str | None = None
    """What makes a document relevant, for templates that show it."""

    instruct: str | None = None
    """SGLang's name of ``instruction``."""

    @model_validator(mode="after")
    def _take_instruct(self) -> Self:
        self.instruction = self.instruction or self.instruct
        return self


class ScoreRequest(PairFields):
    """``POST /v1/score``: ``text_1``, ``query`` or ``queries``, and ``text_2``, ``documents`` or
    ``items``.
    """

    not_offered: ClassVar[Mapping[str, str]] = {
        **NOT_OFFERED,
        "return_pooled_hidden_states": "/v1/embeddings of an embedding model gives vectors",
    }
    text_1: Texts | None = None
    queries: Texts | None = None
    query: Input | None = None
    """SGLang's name, as is ``items``: tokens or texts."""
    data_1: Texts | None = None
    text_2: Texts | None = None
    documents: Texts | None = None
    items: Input | None = None
    data_2: Texts | None = None
    label_token_ids: (
        Annotated[list[TokenId], Field(min_length=1, max_length=MAX_LABELS, fail_fast=True)] | None
    ) = None
    """Tokens whose probabilities after both texts are the scores, as in SGLang; only for models
    that generate text.
    """

    apply_softmax: bool | None = None
    """Whether the probabilities of the labels sum to 1."""

    item_first: bool | None = None
    """Whether the second side comes first in the text."""

    @model_validator(mode="after")
    def _check_labels(self) -> Self:
        """Refuse what would be ignored."""
        problem = ignored_option_reason(self)
        if problem is not None:
            raise ValueError(problem)
        return self

    @model_validator(mode="after")
    def _check_kinds(self) -> Self:
        """Refuse tokens on one side only, and where nothing but texts are scored."""
        sides = [getattr(self, name) for name in (*SIDES[0], *SIDES[1])]
        kinds = {are_tokens(given) for given in sides if given is not None}
        if True in kinds and (self.label_token_ids is None or False in kinds):
            raise ValueError("`query` and `items` may be tokens, both, with label_token_ids")
        return self


class Document(Part):
    """A document as an object."""

    text: str


class RerankRequest(PairFields):
    """``POST /v1/rerank``."""

    not_offered: ClassVar[Mapping[str, str]] = {
        **NOT_OFFERED,
        "rank_fields": "send the text of documents",
        "raw_scores": "`use_activation: false` gives logits",
        "return_embeddings": "the reply has scores",
        "score_threshold": "`top_n` limits the documents that are returned",
        "max_tokens_per_doc": "shorten the documents",
        "max_chunks_per_doc": "shorten the documents",
    }
    query: str
    documents: Annotated[
        list[str | Document], Field(min_length=1, max_length=MAX_INPUTS, fail_fast=True)
    ]
    top_n: Annotated[Whole, Field(ge=0, le=LARGEST)] | None = None
    """How many documents are returned; None and 0 mean all."""

    return_documents: bool | None = None
    """Whether the reply has the texts; None means true, and false on /v2/rerank."""
