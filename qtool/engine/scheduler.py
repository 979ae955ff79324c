"""The scheduler: chooses what runs in the next step, one token for each sequence that decodes, then
parts of prompts, within a budget of tokens.

A step may be launched before the tokens of the step before it are read: such a token is *pending*,
its value is on the device alone.

Pages are registered for reuse when the step that fills them is scheduled, so that sequences which
arrive together compute a common prompt once, even within one step: in each layer the keys and
values of all tokens are written before attention reads any. The price: when a step raises, the
sequences that share its pages must fail with it. They are in that step or, if the error shows only
when its tokens are read, in the steps launched since: fail the sequences of all of these. Keys and
values that are NaN make the logits of those who share them NaN: they fail by themselves.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from qtool.engine.attention.pages import PAGE
from qtool.engine.kv_cache import Pages, page_digest
from qtool.errors import UsageError

PROMPT_LOGITS = 256  # tokens of prompts a step whose logits are wanted


@dataclass(frozen=True)
class Limits:
    """How much runs at once."""

    max_running: int
    """Sequences that run."""
    token_budget: int
    """Tokens a step."""
    context_length: int
    """Tokens of one sequence."""


@dataclass(eq=False, slots=True)
class SequenceState:
    """A prompt and what was generated after it.

    The first six fields are the caller's, the others the scheduler's.
    """

    prompt: list[int]
    max_new_tokens: int
    waits_for_tokens: bool = False
    """Each token must be read before the next is scheduled: penalties count tokens."""
    use_prefix: bool = True
    """False: every token of the prompt is computed (logprobs of the prompt)."""
    needs_logits: bool = False
    """For all tokens of the prompt, which is then computed in small parts: logits take memory."""
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


@dataclass(slots=True)
class Step:
    """One forward pass."""

    chunks: list[Chunk]
    decodes: int
    """So many chunks at the beginning have count 1, samples, start > 0; their token may be
    pending.
    """
    updates: list[tuple[int, int, int]]
    """(row, column, page) to set in the page table before the step; no (row, column) twice."""


class Scheduler:
    """Sequences that run and that wait. All that run came before all that wait; both lists are in
    order of arrival.

    A sequence gets the pages of all its known tokens when it is admitted, and one more whenever it
    outgrows them. When there is none the newest running sequence gives up its pages and waits to be
    computed again, so the oldest always advances.
    """

    def __init__(
        self, pages: Pages, max_running: int, token_budget: int, context_length: int
    ) -> None:
        self.pages = pages
        # so that a prompt gets a token even if all others decode
        self.max_running = min(max_running, token_budget)
        self.token_budget = token_budget
        self.context_length = context_length
        self.running: list[SequenceState] = []
        self.waiting: deque[SequenceState] = deque()
        self.preemptions = 0
        self.prefix_queries = 0  # tokens of admitted prompts that might have been in the cache
        self.prefix_hits = 0  # those that were
        self._logits_left = PROMPT_LOGITS
        self._rows = list(range(self.max_running - 1, -1, -1))

    @property
    def kv_usage(self) -> float:
        """Share of the pages that sequences hold."""
        return 1 - self.pages.free / self.pages.count

    def add(self, sequence: SequenceState) -> None:
        """Let ``sequence`` wait for its turn; ``max_new_tokens`` is cut to what the context leaves.

        Raises: UsageError, when the prompt is empty or too long, or all pages together could not
            hold it with its outputs.
        """
        size = len(sequence.prompt)
        if not size:
            raise UsageError(
                "E_EMPTY_PROMPT", "the prompt has no tokens", hint="send one token at least"
            )
        if size >= self.context_length:
            message = (
                f"the prompt has {size} tokens; the context holds {self.context_length}, and one "
                "must be left for the answer"
            )
            raise UsageError("E_TOO_LONG", message, hint="shorten the prompt")
        sequence.max_new_tokens = min(sequence.max_new_tokens, self.context_length - size)
        # the prompt is computed, and sampled from, in any case
        sequence.longest = size + max(sequence.max_new_tokens, 1)
        stored = sequence.longest - 1  # the last token is not computed
        if -(-stored // PAGE) > self.pages.count:
            message = (
                f"{size} prompt tokens and {sequence.max_new_tokens} new ones do not fit the "
                f"key-value cache of {self.pages.count * PAGE} tokens"
            )
            raise UsageError(
                "E_TOO_LONG",
                message,
                hint="lower max_new_tokens, shorten the prompt, or give the cache more memory",
            )
        self.waiting.append(sequence)

    def schedule(self) -> Step | None:
        """Return the next step, or None when nothing can run before a pending token is read or a
        sequence arrives.

        The caller must launch the step, `rollback` it, or `fail` the sequences in it.
        """
        self._logits_left = PROMPT_LOGITS
        decodes: list[Chunk] = []
        prefills: list[Chunk] = []
        updates: list[tuple[int, int, int]] = []
        # prompts; no later sequence of the loop takes their pages, for they are older
        unfinished = self._schedule_decodes(decodes, updates)
        left = self.token_budget - len(decodes)
        for sequence in unfinished:
            left -= self._prefill(sequence, left, decodes, prefills)
        while left and self._can_admit() and self._admit(self.waiting[0], updates):
            left -= self._prefill(self.waiting.popleft(), left, decodes, prefills)
        chunks = decodes + prefills
        return Step(chunks, len(decodes), updates) if chunks else None

    def _schedule_decodes(
        self, decodes: list[Chunk], updates: list[tuple[int, int, int]]
    ) -> list[SequenceState]:
        """Add a token of each sequence that decodes to ``decodes``; return those that run and whose
        tokens are not all computed.
        """
        unfinished = []
        for sequence in self.running:  # preemption takes from the end of this list
            start, pending = sequence.computed, sequence.pending
            length = len(sequence.tokens) + pending
            if start < length - 1:
                unfinished.append(sequence)
            elif length == sequence.longest or (pending and sequence.waits_for_tokens):
                continue
            elif start < len(sequence.pages) * PAGE or self._grow(sequence, updates):
                decodes.append(Chunk(sequence, start, 1, True))
                sequence.computed = length
                sequence.pending = pending + 1
        return unfinished

    def _can_admit(self) -> bool:
        return bool(self.waiting) and len(self.running) < self.max_running

    def commit(self, step: Step, tokens: Iterable[int]) -> None:
        """Append the tokens read back, one for each chunk of ``step`` that samples; those of
        finished sequences are dropped.
        """
        sampled = (chunk.sequence for chunk in step.chunks if chunk.samples)
        for sequence, token in zip(sampled, tokens, strict=True):
            sequence.pending -= 1
            if sequence.state != "finished":
                sequence.tokens.append(token)
                self._register(sequence)

    def finish(self, sequence: SequenceState) -> None:
        """End ``sequence``, complete or aborted, and free its row and pages at once: what is
        launched runs before what comes later.
        """
        if sequence.state == "running":
            self.running.remove(sequence)
            self._vacate(sequence)
        elif sequence.state == "waiting":
            self.waiting.remove(sequence)
        sequence.state = "finished"

    def rollback(self, step: Step) -> SequenceState:
        """Take ``step`` back, which `schedule` just returned and could not be launched; return the
        newest of its sequences.

        They wait to be computed again, before all that wait. So do those that came after the first
        of them, though not in the step.
        """
        chunks = {chunk.sequence: chunk for chunk in step.chunks}
        first = next(number for number, sequence in enumerate(self.running) if sequence in chunks)
        newest = next(sequence for sequence in reversed(self.running) if sequence in chunks)
        while len(self.running) > first:
            sequence = self._preempt()
            if sequence in chunks:
                # pages that the step was to write are known already
                self.pages.forget(sequence.digests)
                sequence.pending -= chunks[sequence].samples
        return newest

    def fail(self, sequence: SequenceState) -> None:
        """End ``sequence``, also after `finish`, and forget its pages for reuse: what they hold may
        be wrong.
        """
        self.finish(sequence)
        self.pages.forget(sequence.digests)

    def _prefill(
        self, sequence: SequenceState, budget: int, decodes: list[Chunk], prefills: list[Chunk]
    ) -> int:
        """Add the next chunk of a prompt, of at most ``budget`` tokens, and return its size."""
        start = sequence.computed
        left = len(sequence.tokens) - start
        count = min(left, budget, self._logits_left) if sequence.needs_logits else min(left, budget)
        self._logits_left -= count if sequence.needs_logits else 0
        if count:
            chunk = Chunk(sequence, start, count, count == left)
            (decodes if chunk.samples and count == 1 and start else prefills).append(chunk)
            sequence.computed += count
            sequence.pending += chunk.samples
            self._register(sequence)
        return count

    def _admit(self, sequence: SequenceState, updates: list[tuple[int, int, int]]) -> bool:
        """Give the first that waits a row and the pages of its tokens, unless they are scarce."""
        # an admitted sequence must be in the step: it may share its pages, and must fail with it
        if sequence.needs_logits and not self._logits_left:
            return False
        if sequence.pending or sequence.length >= sequence.longest:
            return False
        pages = self._allocate(sequence)
        if pages is None:
            return False
        found, fresh = pages
        sequence.pages = found + fresh
        sequence.registered = len(found)
        sequence.computed = len(found) * PAGE
        sequence.row = self._rows.pop()
        sequence.state = "running"
        self.running.append(sequence)
        updates.extend((sequence.row, column, page) for column, page in enumerate(sequence.pages))
        if sequence.use_prefix and not sequence.preemptions:
            sequence.cached_tokens = sequence.computed
            self.prefix_hits += sequence.computed
            self.prefix_queries += len(sequence.tokens)
        return True

    def _allocate(self, sequence: SequenceState) -> tuple[list[int], list[int]] | None:
        """Return pages for all tokens of ``sequence``, those found in the cache and fresh ones;
        None where they are scarce.
        """
        # a page for each that runs: they go on for some steps before one is preempted
        reserve = len(self.running)
        if self.pages.free <= reserve:
            return None
        size = len(sequence.tokens)
        self._digest(sequence, size // PAGE)
        found: list[int] = []
        if sequence.use_prefix:
            # The last token is always computed: the next one is sampled from it.
            found = self.pages.match(sequence.digests[: (size - 1) // PAGE])
        needed = -(-size // PAGE) - len(found)
        fresh = self.pages.allocate(needed) if self.pages.free >= needed + reserve else None
        if fresh is None:
            self.pages.release(found)
            return None
        return found, fresh

    def _grow(self, sequence: SequenceState, updates: list[tuple[int, int, int]]) -> bool:
        """Give a running sequence one more page, if need be that of a newer one; False when it is
        the newest and was preempted itself.
        """
        while not (page := self.pages.allocate(1)):
            if self._preempt() is sequence:
                return False
        assert sequence.row is not None
        updates.append((sequence.row, len(sequence.pages), page[0]))
        sequence.pages += page
        return True

    def _preempt(self) -> SequenceState:
        """Let the newest that runs wait, before all that wait, to be computed again."""
        newest = self.running.pop()
        self._vacate(newest)
        newest.state = "waiting"
        newest.preemptions += 1
        self.preemptions += 1
        self.waiting.appendleft(newest)
        return newest

    def _vacate(self, sequence: SequenceState) -> None:
        assert sequence.row is not None
        self._rows.append(sequence.row)
        self.pages.release(sequence.pages)
        sequence.row = None
        sequence.pages = []
        sequence.computed = 0
        sequence.registered = 0

    def _register(self, sequence: SequenceState) -> None:
        """Register the pages whose tokens are all known and computed."""
        full = min(sequence.computed, len(sequence.tokens)) // PAGE
        if full > sequence.registered:
            self._digest(sequence, full)
            for number in range(sequence.registered, full):
                self.pages.register(sequence.pages[number], sequence.digests[number])
            sequence.registered = full

    def _digest(self, sequence: SequenceState, count: int) -> None:
        """Extend the digests to the first ``count`` pages."""
        digests = sequence.digests
        tokens = sequence.tokens
        for number in range(len(digests), count):
            before = digests[-1] if digests else b""
            digests.append(page_digest(before, tokens[number * PAGE : (number + 1) * PAGE]))
