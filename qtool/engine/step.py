"""Sequences, the chunks of them that run together, and the steps made of chunks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias


@dataclass(eq=False, slots=True)
class SequenceState:
    """A prompt and what was generated after it.

    The first eight fields are the caller's, the others the scheduler's.
    """

    prompt: list[int]
    max_new_tokens: int
    waits_for_tokens: bool = False
    """Each token must be read before the next is scheduled: penalties count tokens, and drafts
    follow them.
    """
    use_prefix: bool = True
    """False: every token of the prompt is computed (logprobs of the prompt)."""
    cache_salt: str = ""
    """Only sequences with the same one share pages."""
    needs_logits: bool = False
    """For all tokens of the prompt, which is then computed in small parts: logits take memory."""
    is_encoded: bool = False
    """Nothing is generated: what comes of the last token of the prompt is a vector."""
    owner: object = None
    """The caller's own object."""
    state: Literal["waiting", "running", "finished"] = "waiting"
    tokens: list[int] = field(init=False)
    """Prompt and outputs read back."""
    longest: int = 0
    """The length at which nothing more is scheduled."""
    pending: int = 0
    """Outputs launched and not read back."""
    computed: int = 0
    """Tokens whose keys and values the launched steps write."""
    pages: list[int] = field(default_factory=list)
    row: int | None = None
    digests: list[bytes] = field(default_factory=list)
    """Of the full pages of `tokens`, as far as needed so far."""
    registered: int = 0
    """Of `pages`, those that are known by their digest (or whose double is)."""
    cached_tokens: int = 0
    """Of the prompt, found in the cache at first admission."""
    preemptions: int = 0
    snapshots_at: Sequence[int] = ()
    """After how many tokens its states are copied; chunks end there."""

    def __post_init__(self) -> None:
        self.tokens = list(self.prompt)

    @property
    def length(self) -> int:
        """Tokens of the prompt and outputs, pending ones too."""
        return len(self.tokens) + self.pending


@dataclass(slots=True)
class Chunk:
    """Tokens ``start`` to ``start + count`` of a sequence, to be computed; after the last known
    one, the next is sampled.
    """

    sequence: SequenceState
    start: int
    count: int
    samples: bool
    drafts: Sequence[int] = ()
    """The last of the tokens, where they are not known, but drafted: after each of them, too, the
    next token is sampled.
    """

    @property
    def sampled(self) -> int:
        """How many tokens are sampled."""
        return 1 + len(self.drafts) if self.samples else 0

    def gained(self, tokens: Sequence[int]) -> Sequence[int]:
        """Return what of the ``tokens`` sampled the sequence gains: those after a draft that is
        another token are wrong.
        """
        for number, draft in enumerate(self.drafts):
            if tokens[number] != draft:
                return tokens[: number + 1]
        return tokens


# a chunk that samples, and the tokens that its sequence gains
Gain: TypeAlias = tuple[Chunk, Sequence[int]]


@dataclass(slots=True)
class Step:
    """One forward pass."""

    chunks: list[Chunk]
    decodes: int
    """So many chunks at the beginning have start > 0, samples, and one token before their drafts,
    which may be pending if there are none.
    """
    updates: list[tuple[int, int, int]]
    """(row, column, page) to set in the page table before the step; no (row, column) twice."""
    restores: Sequence[tuple[int, int]] = ()
    """(row, snapshot) of states to copy to the row before the step."""
    saves: Sequence[tuple[int, int]] = ()
    """(row, snapshot) of states to copy from the row after the step."""
    expands: int = 0
    """How many chunks at the end attend to keys and values made from latents, see
    `qtool.engine.attention.pages.Expanded`.
    """

    @property
    def decode_tokens(self) -> int:
        """Tokens of the chunks that `decodes` counts."""
        return sum(chunk.count for chunk in self.chunks[: self.decodes])

    @property
    def expanded(self) -> list[tuple[int, int]]:
        """Tokens before, and new tokens, of the chunks that `expands` counts."""
        return [
            (chunk.start, chunk.count) for chunk in self.chunks[len(self.chunks) - self.expands :]
        ]

    def logit_rows(self, whole: Sequence[int]) -> list[int]:
        """Return how many rows of logits each chunk has: one for each token where its position is
        in ``whole``, else one for each token that it samples.
        """
        return [
            chunk.count if position in whole else chunk.sampled
            for position, chunk in enumerate(self.chunks)
        ]

    def gained(self, tokens: Sequence[int]) -> list[Gain]:
        """Return the chunks that sample, and what each gains of the ``tokens`` of all of them."""
        found: list[Gain] = []
        start = 0
        for chunk in self.chunks:
            if chunk.samples:
                found.append((chunk, chunk.gained(tokens[start : start + chunk.sampled])))
                start += chunk.sampled
        return found
