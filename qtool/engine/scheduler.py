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
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from qtool.engine.attention.pages import MAX_EXPANDED_TOKENS, PAGE, pairs_saved
from qtool.engine.kv_cache import Pages, first_parent, page_digest
from qtool.engine.state_snapshots import StateSnapshots, boundaries
from qtool.engine.step import Chunk, Gain, SequenceState, Step
from qtool.errors import UsageError

PROMPT_LOGITS = 256  # tokens of prompts a step whose logits are wanted
MAX_DRAFTS = 256  # drafted tokens a step


@dataclass(frozen=True)
class Limits:
    """How much runs at once."""

    max_running: int
    """Sequences that run."""
    token_budget: int
    """Tokens a step."""
    context_length: int
    """Tokens of one sequence."""
    drafts: int = 0
    """Tokens drafted for one sequence in a step."""
    lookahead: int = 0
    """Tokens after those of a step that the drafting layer keeps keys and values of."""
    snapshots: int = 0
    """Copies of states, for prompts that begin alike, if the model's layers keep states."""

    @property
    def most_decodes(self) -> int:
        """Tokens of a step that are sampled from, drafts among them."""
        running = self.max_running
        with_drafts = min(running * (1 + self.drafts), running + MAX_DRAFTS, self.token_budget)
        return max(running, with_drafts)


# drafts at most so many tokens that may follow those of a sequence, all of which are known
Propose: TypeAlias = Callable[[SequenceState, int], Sequence[int]]


class Scheduler:
    """Sequences that run and that wait. All that run came before all that wait; both lists are in
    order of arrival.

    A sequence gets the pages of all its known tokens when it is admitted, and one more whenever it
    outgrows them. When there is none the newest running sequence gives up its pages and waits to be
    computed again, so the oldest always advances. Drafted tokens get the budget and the pages that
    nobody else needs.

    Args:
        pages: of the KV cache.
        max_running: as in `Limits`.
        token_budget: as in `Limits`.
        context_length: as in `Limits`.
        propose: drafts tokens for sequences that wait for their tokens.
        lookahead: as in `Limits`.
        snapshots: of the states that layers keep for a sequence; without them, a sequence whose
            layers keep states may not start with the pages of another.
        keeps_latents: whether chunks may attend to keys and values made from latents.
    """

    def __init__(
        self,
        pages: Pages,
        max_running: int,
        token_budget: int,
        context_length: int,
        propose: Propose | None = None,
        lookahead: int = 0,
        snapshots: StateSnapshots | None = None,
        *,
        keeps_latents: bool = False,
    ) -> None:
        self.pages = pages
        self.snapshots = snapshots
        # so that a prompt gets a token even if all others decode
        self.max_running = min(max_running, token_budget)
        self.token_budget = token_budget
        self.context_length = context_length
        self.propose = propose
        self.lookahead = lookahead
        self.keeps_latents = keeps_latents
        self.running: list[SequenceState] = []
        self.waiting: deque[SequenceState] = deque()
        self.preemptions = 0
        self.prefix_queries = 0  # tokens of admitted prompts that might have been in the cache
        self.prefix_hits = 0  # those that were
        self._logits_left = PROMPT_LOGITS
        self._restores: list[tuple[int, int]] = []  # of the step that is made, as the next
        self._saves: list[tuple[int, int]] = []
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
        if size >= self.context_length + sequence.is_encoded:
            message = f"the prompt has {size} tokens; the context holds {self.context_length}"
            if not sequence.is_encoded:
                message += ", and one must be left for the answer"
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
        self._restores, self._saves = [], []
        if self.snapshots is not None:
            self.snapshots.begin_step()
        decodes: list[Chunk] = []
        prefills: list[Chunk] = []
        updates: list[tuple[int, int, int]] = []
        # prompts; no later sequence of the loop takes their pages, for they are older
        unfinished = self._schedule_decodes(decodes, updates)
        left = self.token_budget - sum(chunk.count for chunk in decodes)
        for sequence in unfinished:
            left -= self._prefill(sequence, left, decodes, prefills)
        while left and self._can_admit() and self._admit(self.waiting[0], updates):
            left -= self._prefill(self.waiting.popleft(), left, decodes, prefills)
        if not decodes and not prefills:
            return None
        expands = 0
        if self.keeps_latents:
            prefills, expands = _put_expanded_last(prefills)
        chunks = decodes + prefills
        return Step(chunks, len(decodes), updates, self._restores, self._saves, expands)

    def _schedule_decodes(
        self, decodes: list[Chunk], updates: list[tuple[int, int, int]]
    ) -> list[SequenceState]:
        """Add a token of each sequence that decodes to ``decodes``, and drafts after it; return
        those that run and whose tokens are not all computed.
        """
        unfinished = []
        room = min(MAX_DRAFTS, self.token_budget - len(self.running))  # of drafts
        share = -(-room // max(1, len(self.running)))  # the first of them are right most often
        for sequence in self.running:  # preemption takes from the end of this list
            start, pending = sequence.computed, sequence.pending
            length = len(sequence.tokens) + pending
            if start < length - 1:
                unfinished.append(sequence)
            elif length == sequence.longest or (pending and sequence.waits_for_tokens):
                continue
            elif start < len(sequence.pages) * PAGE or self._grow(sequence, updates):
                drafts = self._draft(sequence, min(room, share), updates)
                room -= len(drafts)
                decodes.append(Chunk(sequence, start, 1 + len(drafts), samples=True, drafts=drafts))
                sequence.computed = length
                sequence.pending = pending + 1
        return unfinished

    def _draft(
        self, sequence: SequenceState, room: int, updates: list[tuple[int, int, int]]
    ) -> Sequence[int]:
        """Return at most ``room`` tokens that may follow those of ``sequence``, and give it their
        pages, as far as others do not need them soon.
        """
        if self.propose is None or not sequence.waits_for_tokens:
            return ()
        room = min(room, sequence.longest - sequence.length - 1)
        drafts = self.propose(sequence, room) if room > 0 else ()
        free = self.pages.free - len(self.running)
        written = min(sequence.length + len(drafts) + self.lookahead, sequence.longest)
        missing = -(-written // PAGE) - len(sequence.pages)
        pages = self.pages.allocate(max(0, min(missing, free))) or []
        self._append(sequence, pages, updates)
        return drafts[: len(sequence.pages) * PAGE - sequence.length]

    def _can_admit(self) -> bool:
        return bool(self.waiting) and len(self.running) < self.max_running

    def commit(self, gained: Iterable[Gain]) -> None:
        """Append the tokens read back, from `Step.gained`; those of finished sequences are
        dropped.
        """
        for chunk, tokens in gained:
            sequence = chunk.sequence
            sequence.pending -= 1
            if sequence.state != "finished":
                sequence.tokens += tokens
            if sequence.state == "running":  # else its pages are gone
                sequence.computed += len(tokens) - 1  # drafts that were right
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
                self._forget(sequence)
                sequence.pending -= chunks[sequence].samples
        return newest

    def fail(self, sequence: SequenceState) -> None:
        """End ``sequence``, also after `finish`, and forget its pages for reuse: what they hold may
        be wrong.
        """
        self.finish(sequence)
        self._forget(sequence)

    def forget_all(self) -> None:
        """Let no later sequence start with the pages of those before it."""
        self.pages.forget_all()
        if self.snapshots is not None:
            self.snapshots.forget_all()

    def _forget(self, sequence: SequenceState) -> None:
        self.pages.forget(sequence.digests)
        if self.snapshots is not None:
            self.snapshots.forget(sequence.digests)

    def _prefill(
        self, sequence: SequenceState, budget: int, decodes: list[Chunk], prefills: list[Chunk]
    ) -> int:
        """Add the next chunk of a prompt, of at most ``budget`` tokens, and return its size."""
        start = sequence.computed
        left = len(sequence.tokens) - start
        count = min(left, budget, self._logits_left) if sequence.needs_logits else min(left, budget)
        stop = next((each for each in sequence.snapshots_at if each > start), start + count)
        count = min(count, stop - start)
        self._logits_left -= count if sequence.needs_logits else 0
        if count:
            chunk = Chunk(sequence, start, count, count == left)
            (decodes if chunk.samples and count == 1 and start else prefills).append(chunk)
            sequence.computed += count
            sequence.pending += chunk.samples
            self._register(sequence)
            self._save_states(sequence)
        return count

    def _save_states(self, sequence: SequenceState) -> None:
        """Copy the states of ``sequence`` after this step, where that is wanted."""
        if self.snapshots is None or sequence.computed not in sequence.snapshots_at:
            return
        index = self.snapshots.save(sequence.digests[sequence.computed // PAGE - 1])
        if index is not None:
            assert sequence.row is not None
            self._saves.append((sequence.row, index))

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
        found, fresh, snapshot = pages
        sequence.pages = found + fresh
        sequence.registered = len(found)
        sequence.computed = len(found) * PAGE
        sequence.row = self._rows.pop()
        if snapshot is not None:
            self._restores.append((sequence.row, snapshot))
        sequence.state = "running"
        self.running.append(sequence)
        updates.extend((sequence.row, column, page) for column, page in enumerate(sequence.pages))
        if sequence.use_prefix and not sequence.preemptions:
            sequence.cached_tokens = sequence.computed
            self.prefix_hits += sequence.computed
            self.prefix_queries += len(sequence.tokens)
        return True

    def _allocate(self, sequence: SequenceState) -> tuple[list[int], list[int], int | None] | None:
        """Return pages for all tokens of ``sequence``, those found in the cache and fresh ones, and
        which snapshot of states goes with the former; None where pages are scarce.
        """
        # a page for each that runs: they go on for some steps before one is preempted
        reserve = len(self.running)
        if self.pages.free <= reserve:
            return None
        size = len(sequence.tokens)
        self._digest(sequence, size // PAGE)
        # The last token is always computed: the next one is sampled from it.
        digests = sequence.digests[: (size - 1) // PAGE] if sequence.use_prefix else []
        snapshot = None
        if self.snapshots is not None:
            known = self.pages.known(digests)
            count, snapshot = self.snapshots.longest(digests[:known])
            digests = digests[:count]
            if self.snapshots.count:
                sequence.snapshots_at = boundaries(size, known * PAGE, count * PAGE)
        found = self.pages.match(digests)
        needed = -(-size // PAGE) - len(found)
        fresh = self.pages.allocate(needed) if self.pages.free >= needed + reserve else None
        if fresh is None:
            self.pages.release(found)
            return None
        return found, fresh, snapshot

    def _grow(self, sequence: SequenceState, updates: list[tuple[int, int, int]]) -> bool:
        """Give a running sequence one more page, if need be that of a newer one; False when it is
        the newest and was preempted itself.
        """
        while not (page := self.pages.allocate(1)):
            if self._preempt() is sequence:
                return False
        self._append(sequence, page, updates)
        return True

    @staticmethod
    def _append(
        sequence: SequenceState, pages: list[int], updates: list[tuple[int, int, int]]
    ) -> None:
        """Add ``pages`` to those of a running sequence."""
        assert sequence.row is not None
        for page in pages:
            updates.append((sequence.row, len(sequence.pages), page))
            sequence.pages.append(page)

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
            before = digests[-1] if digests else first_parent(sequence.cache_salt)
            digests.append(page_digest(before, tokens[number * PAGE : (number + 1) * PAGE]))


def _put_expanded_last(prefills: Sequence[Chunk]) -> tuple[list[Chunk], int]:
    """Return the chunks in order, but last those that attend to keys and values made from latents,
    and how many these are; see `qtool.engine.attention.pages.Expanded`.
    """
    absorbed: list[Chunk] = []
    expanded: list[Chunk] = []
    left = MAX_EXPANDED_TOKENS
    for chunk in prefills:
        end = chunk.start + chunk.count
        if pairs_saved(chunk.start, chunk.count) > 0 and end <= left:
            left -= end
            expanded.append(chunk)
        else:
            absorbed.append(chunk)
    return absorbed + expanded, len(expanded)
