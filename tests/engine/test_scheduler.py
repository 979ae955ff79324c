"""Pages and steps: every piece of every sequence finds exactly the tokens before it in the cache,
whatever arrives, ends or fails meanwhile.
"""

from __future__ import annotations

import random
from array import array
from collections import Counter, deque

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from qtool.engine import scheduler as scheduler_module
from qtool.engine.attention.pages import PAGE
from qtool.engine.kv_cache import Pages, first_parent, page_digest
from qtool.engine.scheduler import Scheduler
from qtool.engine.state_snapshots import StateSnapshots
from qtool.engine.step import Chunk, SequenceState, Step
from qtool.errors import UsageError

VOCABULARY = 50
NAN = -1  # a token sampled from logits that are not finite
BAD = None  # what a page holds where keys and values are not finite
TORN = (-2,)  # and where a step that broke off left some layers unwritten: nobody may read it
SALTS = ("", "a", "b")
# prompts start as one of these
BASES = [[base * 7 + i % 5 for i in range(150)] for base in range(3)]


def next_token(prefix: list[int]) -> int:
    """What the model answers: it depends on all tokens."""
    return hash(tuple(prefix)) % VOCABULARY


def draft(sequence: SequenceState, room: int) -> list[int]:
    """Tokens of which about every fourth is wrong."""
    tokens = list(sequence.tokens)
    count = min(room, hash(tuple(tokens)) % 7)
    for _ in range(count):
        token = next_token(tokens)
        tokens.append((token + (hash((*tokens[-3:], 9)) % 4 == 0)) % VOCABULARY)
    return tokens[len(tokens) - count :]


def digests_of(tokens: list[int], salt: str = "") -> list[bytes]:
    digests = [first_parent(salt)]
    for start in range(0, len(tokens) - PAGE + 1, PAGE):
        digests.append(page_digest(digests[-1], tokens[start : start + PAGE]))
    return digests[1:]


class Device:
    """Runs steps as a GPU would: what a page's slot holds is the tokens up to its own, or BAD."""

    def __init__(self, *, has_states: bool = False) -> None:
        self.has_states = has_states
        self.table: dict[tuple[int, int], int] = {}
        self.slots: dict[tuple[int, int], tuple[int, ...] | None] = {}
        self.tokens: dict[SequenceState, list[int]] = {}  # with those the host has not read
        self.touched: set[SequenceState] = set()  # has read or written BAD
        # what states are of: the tokens up to the last, as in slots
        self.states: dict[int, tuple[int, ...] | None] = {}
        self.snapshots: dict[int, tuple[int, ...] | None] = {}

    def run(
        self, step: Step, bad: SequenceState | None = None, *, broken: bool = False
    ) -> list[int]:
        """Return the tokens sampled.

        ``bad``: all its keys and values are; ``broken``: everyone's are.
        """
        places = [(row, column) for row, column, _ in step.updates]
        assert len(set(places)) == len(places)
        self.table.update(zip(places, (page for *_, page in step.updates), strict=True))
        self.states.update((row, self.snapshots[place]) for row, place in step.restores)
        written: dict[tuple[int, int], SequenceState] = {}
        for chunk in step.chunks:
            tokens = self.tokens.setdefault(chunk.sequence, list(chunk.sequence.prompt))
            assert chunk.start + chunk.count - len(chunk.drafts) <= len(tokens)
            assert tokens[: len(chunk.sequence.tokens)] == chunk.sequence.tokens
            for position in range(chunk.start, chunk.start + chunk.count):
                place = self.place(chunk, position)
                assert place not in written
                written[place] = chunk.sequence
                self.slots[place] = (
                    BAD
                    if broken or chunk.sequence is bad
                    else tuple(self.ahead(chunk)[: position + 1])
                )
        self.advance_states(step, bad, broken=broken)
        spreading = True
        while spreading:  # who reads BAD writes it
            spreading = False
            for chunk in step.chunks:
                places = [
                    self.place(chunk, position) for position in range(chunk.start + chunk.count)
                ]
                if any(self.slots[place] is BAD for place in places):
                    self.touched.add(chunk.sequence)
                    for place in places[chunk.start :]:
                        spreading |= self.slots[place] is not BAD
                        self.slots[place] = BAD
        sampled = []
        for chunk in step.chunks:
            tokens = self.tokens[chunk.sequence]
            held = [
                self.slots[self.place(chunk, position)]
                for position in range(chunk.start + chunk.count)
            ]
            ahead = self.ahead(chunk)
            assert all(
                slot is BAD or slot == tuple(ahead[: position + 1])
                for position, slot in enumerate(held)
            )
            if chunk.samples:
                stops = range(len(ahead) - len(chunk.drafts), len(ahead) + 1)
                found = [NAN if BAD in held[:stop] else next_token(ahead[:stop]) for stop in stops]
                tokens += chunk.gained(found)
                sampled += found
        return sampled

    def advance_states(self, step: Step, bad: SequenceState | None, *, broken: bool) -> None:
        """States take the tokens of ``step``, drafts too, of which the next step drops the wrong
        ones; who reads a BAD one writes BAD.
        """
        for chunk in step.chunks:
            row, sequence = chunk.sequence.row, chunk.sequence
            before = self.states.get(row, ()) if chunk.start else ()
            tokens = tuple(self.ahead(chunk))
            is_bad = broken or sequence is bad or before is BAD
            assert is_bad or not self.has_states or before[: chunk.start] == tokens[: chunk.start]
            self.states[row] = BAD if is_bad else tokens
            if is_bad and self.has_states:
                self.touched.add(sequence)
                for position in range(chunk.start, chunk.start + chunk.count):
                    self.slots[self.place(chunk, position)] = BAD
        self.snapshots.update((index, self.states[row]) for row, index in step.saves)

    def ahead(self, chunk: Chunk) -> list[int]:
        """The tokens up to the end of ``chunk``, drafted ones too."""
        known = chunk.start + chunk.count - len(chunk.drafts)
        return [*self.tokens[chunk.sequence][:known], *chunk.drafts]

    def tear(self, step: Step) -> None:
        """Break off within ``step``: no tokens, and keys and values of some layers only."""
        self.table.update(((row, column), page) for row, column, page in step.updates)
        for chunk in step.chunks:
            self.slots.update(
                (self.place(chunk, position), TORN)
                for position in range(chunk.start, chunk.start + chunk.count)
            )
            self.states[chunk.sequence.row] = TORN

    def place(self, chunk: Chunk, position: int) -> tuple[int, int]:
        assert chunk.sequence.row is not None
        page = self.table[chunk.sequence.row, position // PAGE]
        assert page == chunk.sequence.pages[position // PAGE]
        return page, position % PAGE


class Loop:
    """The loop of an engine; checks each step and the state between steps."""

    def __init__(
        self,
        pages: int,
        max_running: int,
        token_budget: int,
        context_length: int = 200,
        *,
        drafts: bool = False,
        lookahead: int = 0,
        snapshots: int | None = None,
    ) -> None:
        self.scheduler = Scheduler(
            Pages(pages),
            max_running,
            token_budget,
            context_length,
            draft if drafts else None,
            lookahead,
            snapshots=None if snapshots is None else StateSnapshots(snapshots),
        )
        self.device = Device(has_states=snapshots is not None)
        # with their tokens, and how often the sequence of each chunk had been preempted
        self.flying: deque[tuple[Step, list[int], list[int]]] = deque()
        self.live: list[SequenceState] = []
        self.ended: Counter[SequenceState] = Counter()
        self.failed: list[SequenceState] = []

    def add(self, sequence: SequenceState) -> None:
        self.scheduler.add(sequence)
        self.live.append(sequence)

    def end(self, sequence: SequenceState) -> None:
        self.live.remove(sequence)
        self.ended[sequence] += 1
        self.scheduler.finish(sequence)

    def schedule(self) -> Step | None:
        scheduler = self.scheduler
        oldest = next(iter([*scheduler.running, *scheduler.waiting]), None)
        runs, advances = list(scheduler.running), False
        if oldest is not None and oldest.length < oldest.longest:
            advances = not (oldest.pending and (oldest.waits_for_tokens or oldest not in runs))
        before = {s: (s.length, s.computed, (s.state, s.preemptions), s.pending) for s in self.live}
        step = scheduler.schedule()
        chunks = step.chunks if step else []
        assert not advances or oldest in [chunk.sequence for chunk in chunks], (
            "the oldest does not advance"
        )
        assert sum(chunk.count for chunk in chunks) <= scheduler.token_budget
        assert len({chunk.sequence for chunk in chunks}) == len(chunks)
        assert step is None or chunks
        for number, chunk in enumerate(chunks):
            sequence, (length, computed, state, pending) = chunk.sequence, before[chunk.sequence]
            assert sequence.state == "running"
            assert chunk.count >= 1
            # else it was admitted, perhaps again: a page that it gave up was enough
            ran_on = state == (
                "running",
                sequence.preemptions,
            )
            assert chunk.start == (computed if ran_on else chunk.start // PAGE * PAGE)
            drafted = len(chunk.drafts)
            assert chunk.samples == (chunk.start + chunk.count - drafted == length)
            assert not drafted or (sequence.waits_for_tokens and scheduler.propose)
            assert drafted in (0, chunk.count - 1)
            assert length + drafted < sequence.longest
            assert (sequence.computed, sequence.pending) == (
                chunk.start + chunk.count - len(chunk.drafts),
                pending + chunk.samples,
            )
            assert sequence.length <= sequence.longest
            assert not (pending and sequence.waits_for_tokens)
            is_decode = chunk.count == 1 + drafted and chunk.samples and chunk.start > 0
            assert is_decode == (number < step.decodes)
            assert is_decode or chunk.start + chunk.count - drafted <= len(sequence.tokens)
        # Whoever was admitted or got pages is in the step, so no other loses changes of the table,
        # or shares its pages, when it fails.
        assert step is None or {row for row, *_ in step.updates} <= {
            chunk.sequence.row for chunk in chunks
        }
        return step

    def launch(self, bad: SequenceState | None = None) -> bool:
        step = self.schedule()
        if step:
            self.fly(step, bad)
        return step is not None

    def fly(self, step: Step, bad: SequenceState | None = None) -> None:
        preemptions = [chunk.sequence.preemptions for chunk in step.chunks]
        self.flying.append((step, self.device.run(step, bad), preemptions))

    def launch_raises(self) -> None:
        step = self.schedule()
        if step:
            self.device.run(step, broken=True)
            self.fail(step)

    def launch_lacks_memory(self, *, torn: bool) -> SequenceState | None:
        """Return who failed. ``torn``: some of the step ran before memory was short."""
        step, newest = self.schedule(), None
        if step:
            if torn:
                self.device.tear(step)
            sequences = [chunk.sequence for chunk in step.chunks]
            before = {
                chunk.sequence: chunk.sequence.pending - chunk.samples for chunk in step.chunks
            }
            newest = self.scheduler.rollback(step)
            assert newest is max(sequences, key=self.live.index)
            assert all((s.state, s.pending) == ("waiting", before[s]) for s in sequences)
            self.check()
            self.end(newest)
            self.scheduler.fail(newest)
        return newest

    def read(self, stop: int | None = None) -> None:
        step, tokens, _ = self.flying.popleft()
        gained = step.gained(tokens)
        self.scheduler.commit(gained)
        for chunk, gain in gained:
            sequence = chunk.sequence
            assert NAN not in gain[:-1]
            if gain[-1] == NAN:
                assert sequence in self.device.touched
                self.failed.append(sequence)
                self.end(sequence) if sequence in self.live else None
                self.scheduler.fail(sequence)
            elif sequence in self.live:
                size = len(sequence.tokens)
                assert sequence.tokens[size - len(gain) :] == gain
                if stop in gain or size - len(sequence.prompt) >= sequence.max_new_tokens:
                    self.end(sequence)

    def read_raises(self) -> None:
        for step, _, preemptions in self.flying:
            still = [  # nobody reads what the others wrote: they gave up their pages since
                chunk
                for chunk, before in zip(step.chunks, preemptions, strict=True)
                if chunk.sequence.pages and chunk.sequence.preemptions == before
            ]
            self.device.run(Step(still, 0, []), broken=True)
        for step, *_ in self.flying:
            self.fail(step)
        self.flying.clear()

    def fail(self, step: Step) -> None:
        for chunk in step.chunks:
            self.end(chunk.sequence) if chunk.sequence in self.live else None
            self.scheduler.fail(chunk.sequence)

    def turn(self) -> bool:
        """As the engine does: launch the next step, then read the tokens of the last; False when
        there was nothing to do.
        """
        while len(self.flying) > 1:
            self.read()
        launched = self.launch()
        if len(self.flying) > launched:
            self.read()
            launched = True
        self.check()
        return launched

    def drain(self) -> None:
        """Run until all have ended."""
        turns = 100 + 60 * sum(sequence.longest for sequence in self.live)
        while self.live or self.flying:
            assert self.turn(), "nothing runs, and nothing is on its way"
            turns -= 1
            assert turns, "this takes too long"

    def check(self) -> None:
        scheduler, pages = self.scheduler, self.scheduler.pages
        order = {sequence: number for number, sequence in enumerate(self.live)}
        everyone = [*scheduler.running, *scheduler.waiting]
        assert [order[s] for s in everyone] == list(range(len(self.live))), (
            "in order of arrival, and none is lost"
        )
        assert len(scheduler.running) <= min(scheduler.max_running, scheduler.token_budget)
        rows = [sequence.row for sequence in scheduler.running]
        assert sorted(rows + scheduler._rows) == list(range(scheduler.max_running))

        held = Counter(page for sequence in scheduler.running for page in sequence.pages)
        assert held == Counter(
            {page: count for page, count in enumerate(pages._references) if count}
        )
        assert sorted([*held, *pages._unused, *pages._idle]) == list(range(1, pages.count + 1)), (
            "a page is lost or owned twice"
        )
        assert pages.free == pages.count - len(held)
        named = {page: digest for page, digest in enumerate(pages._digests) if digest}
        assert {digest: page for page, digest in named.items()} == pages._by_digest
        assert set(pages._idle) <= set(named) and not set(pages._unused) & set(named)
        places = Counter(
            (page, column)
            for sequence in scheduler.running
            for column, page in enumerate(sequence.pages)
        )
        for sequence in scheduler.running:
            assert sequence.state == "running"
            assert len(sequence.pages) * PAGE >= sequence.computed
            for column, page in enumerate(sequence.pages):
                assert places[page, column] == held[page], "shared at different places"
                assert held[page] == 1 or (column + 1) * PAGE <= sequence.computed, (
                    "shared, and not full"
                )
        for sequence in scheduler.waiting:
            assert (sequence.state, sequence.row, sequence.pages, sequence.computed) == (
                "waiting",
                None,
                [],
                0,
            )
        assert all(sequence.state == "finished" and not sequence.pages for sequence in self.ended)
        assert set(self.ended.values()) <= {1}

        for page, digest in named.items():  # a registered page holds what its name says
            slots = [self.device.slots.get((page, slot)) for slot in range(PAGE)]
            if BAD not in slots:
                assert all(
                    slots[-1][: len(slots[-1]) - PAGE + 1 + i] == slot
                    for i, slot in enumerate(slots)
                )
                assert len(slots[-1]) % PAGE == 0
                assert digest in {digests_of(list(slots[-1]), salt)[-1] for salt in SALTS}
            else:
                assert self.device.touched, "registered, and not written"


prompts = st.builds(
    lambda base, shared, own: BASES[base][:shared] + own,
    st.integers(0, 2),
    st.integers(0, 60),
    st.lists(st.integers(0, 3), max_size=20),
)


class Engine(RuleBasedStateMachine):
    """Anything that may happen to an engine, in any order."""

    @initialize(
        pages=st.integers(2, 12),
        max_running=st.integers(1, 6),
        budget=st.sampled_from([1, 2, 5, 16, 33, 64, 400]),
        context=st.sampled_from([40, 200]),
        logits=st.sampled_from([3, 20, 256]),
        kind=st.sampled_from(
            [
                {},
                {"drafts": True},
                *({"snapshots": count} for count in (0, 1, 4)),
                {"drafts": True, "lookahead": 2, "snapshots": 4},
            ]
        ),
    )
    def begin(self, pages, max_running, budget, context, logits, kind):
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr("qtool.engine.scheduler.PROMPT_LOGITS", logits)
        self.patch.setattr("qtool.engine.state_snapshots.MIN_SPARED_TOKENS", PAGE)
        self.loop = Loop(pages, max_running, budget, context, **kind)

    @rule(
        prompt=prompts,
        new=st.integers(0, 60),
        waits=st.lists(st.booleans(), min_size=1, max_size=4),  # one sequence each
        use_prefix=st.sampled_from([True, True, False]),
        salt=st.sampled_from(SALTS),
        needs_logits=st.booleans(),
    )
    def arrive(self, prompt, new, waits, use_prefix, salt, needs_logits):
        scheduler = self.loop.scheduler
        for waits_for_tokens in waits:
            sequence = SequenceState(
                prompt,
                new,
                waits_for_tokens=waits_for_tokens,
                use_prefix=use_prefix,
                cache_salt=salt,
                needs_logits=needs_logits,
            )
            stored = len(prompt) + max(min(new, scheduler.context_length - len(prompt)), 1) - 1
            if (
                not 0 < len(prompt) < scheduler.context_length
                or stored > scheduler.pages.count * PAGE
            ):
                with pytest.raises(UsageError):
                    scheduler.add(sequence)
            else:
                self.loop.add(sequence)
                assert len(prompt) + sequence.max_new_tokens <= scheduler.context_length

    @precondition(lambda self: len(self.loop.flying) < 3)
    @rule()
    def launch(self):
        self.loop.launch()

    @precondition(lambda self: self.loop.flying)
    @rule(stop=st.integers(0, VOCABULARY))
    def read(self, stop):
        self.loop.read(stop)

    @rule(steps=st.integers(1, 40))
    def run(self, steps):
        for _ in range(steps):
            self.loop.turn()

    @precondition(lambda self: self.loop.live)
    @rule(data=st.data())
    def abort(self, data):
        # One whose NaN nobody has read yet would leave pages behind that fail the next reader,
        # once: `fail` cleans up, as below.
        candidates = [
            sequence for sequence in self.loop.live if sequence not in self.loop.device.touched
        ]
        if candidates:
            self.loop.end(data.draw(st.sampled_from(candidates)))

    @precondition(lambda self: self.loop.live and len(self.loop.flying) < 3)
    @rule(data=st.data())
    def nan(self, data):
        self.loop.launch(bad=data.draw(st.sampled_from(self.loop.live)))

    @precondition(lambda self: len(self.loop.flying) < 3)
    @rule()
    def launch_raises(self):
        self.loop.launch_raises()

    @precondition(lambda self: self.loop.live)
    @rule(flying=st.integers(0, 2), torn=st.booleans())
    def launch_lacks_memory(self, flying, torn):
        while len(self.loop.flying) < flying and self.loop.launch():
            pass
        self.loop.launch_lacks_memory(torn=torn)

    @precondition(lambda self: self.loop.flying)
    @rule()
    def read_raises(self):
        self.loop.read_raises()

    @invariant()
    def holds(self):
        if hasattr(self, "loop"):
            self.loop.check()

    def teardown(self):
        if not hasattr(self, "loop"):
            return
        try:
            self.end(self.loop)
        finally:
            self.patch.undo()

    @staticmethod
    def end(loop):
        loop.drain()
        assert loop.scheduler.pages.free == loop.scheduler.pages.count
        assert len(loop.scheduler._rows) == loop.scheduler.max_running
        # after a failure its prompt computes again; other remains of NaN fail once more at most
        for sequence in list(loop.failed):
            for _ in range(2):
                failures = len(loop.failed)
                loop.add(SequenceState(sequence.prompt, sequence.max_new_tokens))
                loop.drain()
                if len(loop.failed) == failures:
                    break
            else:
                raise AssertionError("NaN stays in the cache")
            loop.add(SequenceState(sequence.prompt, sequence.max_new_tokens))
            loop.drain()
            assert len(loop.failed) == failures, "NaN comes back"


TestEngine = Engine.TestCase
TestEngine.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


def answer(prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens))
    return tokens


@pytest.mark.parametrize("budget", [8, 40, 1000])
@pytest.mark.parametrize("waits", [False, True])
def test_a_cache_for_three_of_twenty_sequences(budget, waits):
    chance = random.Random(budget)
    loop = Loop(pages=3 * 8, max_running=8, token_budget=budget, drafts=waits)
    sequences = [
        SequenceState(
            [*BASES[i % 3][: chance.randrange(1, 60)], i],
            chance.randrange(50, 68),
            waits_for_tokens=waits and i % 2 == 0,
        )
        for i in range(20)
    ]
    for sequence in sequences:
        loop.add(sequence)
    loop.drain()
    assert loop.scheduler.preemptions > 1
    # computing again does not count
    assert loop.scheduler.prefix_queries == sum(len(sequence.prompt) for sequence in sequences)
    assert [s.tokens for s in sequences] == [answer(s.prompt, s.max_new_tokens) for s in sequences]


@pytest.fixture
def loop() -> Loop:
    return Loop(pages=40, max_running=8, token_budget=100, context_length=400)


def finished(loop: Loop, prompt: list[int], new: int = 3, **options: object) -> SequenceState:
    """A sequence that has run to its end."""
    sequence = SequenceState(prompt, new, **options)
    loop.add(sequence)
    loop.drain()
    return sequence


def test_decodes_come_first_and_prompts_share_what_is_left_of_the_budget(loop):
    sequences = [SequenceState([i + 1] * size, 5) for i, size in enumerate([10, 60, 150])]
    for sequence in sequences:
        loop.add(sequence)
    steps = []
    for _ in range(3):
        step = loop.schedule()
        steps.append(
            [
                (sequences.index(chunk.sequence), chunk.start, chunk.count, chunk.samples)
                for chunk in step.chunks
            ]
        )
        loop.scheduler.commit(step.gained([7] * sum(chunk.samples for chunk in step.chunks)))
    assert steps == [
        [(0, 0, 10, True), (1, 0, 60, True), (2, 0, 30, False)],
        [(0, 10, 1, True), (1, 60, 1, True), (2, 30, 98, False)],
        [(0, 11, 1, True), (1, 61, 1, True), (2, 128, 22, True)],
    ]


def test_chunks_that_attend_to_keys_and_values_of_latents_come_last(monkeypatch):
    """With few tokens after many a chunk does not, nor one whose context is too long."""
    steps = []
    for most in (1000, 59):
        monkeypatch.setattr(scheduler_module, "MAX_EXPANDED_TOKENS", most)
        scheduler = Scheduler(Pages(40), 4, 1000, 300, keeps_latents=True)
        for prompts in ([BASES[0][:64]], [BASES[1][:60], [*BASES[0][:64], 1, 2], BASES[2][:9]]):
            for prompt in prompts:
                scheduler.add(SequenceState(prompt, 1))
            step = scheduler.schedule()
            steps.append(([(chunk.start, chunk.count) for chunk in step.chunks], step.expands))
            assert step.expanded == steps[-1][0][len(step.chunks) - step.expands :]
            for chunk in step.chunks:
                scheduler.finish(chunk.sequence)
    assert steps == [
        ([(0, 64)], 1),
        ([(64, 2), (0, 60), (0, 9)], 2),
        ([(0, 64)], 0),
        ([(0, 60), (64, 2), (0, 9)], 1),
    ]


def test_a_prompt_seen_before_costs_its_last_tokens_only(loop):
    prompt = BASES[0][:64]
    first = finished(loop, prompt)
    again = finished(loop, prompt)
    longer = finished(loop, [*prompt, 1, 2])
    # at least one token is computed
    assert (first.cached_tokens, again.cached_tokens, longer.cached_tokens) == (
        0,
        48,
        64,
    )
    assert (loop.scheduler.prefix_hits, loop.scheduler.prefix_queries) == (112, 64 + 64 + 66)


def test_outputs_are_found_by_the_next_turn_of_a_talk(loop):
    first = finished(loop, BASES[0][:30], new=20)
    second = finished(loop, [*first.tokens, 1, 2, 3])
    assert second.cached_tokens == 48  # of 50; the last was sampled, and never computed


def test_a_prefix_of_other_tokens_is_not_found(loop):
    finished(loop, BASES[0][:64])
    other = finished(loop, [99, *BASES[0][1:64]])
    assert other.cached_tokens == 0  # though its pages 2 to 4 hold the same tokens
    assert finished(loop, BASES[0][16:64]).cached_tokens == 0  # the same pages at other positions


def test_only_prompts_of_one_salt_find_each_other(loop):
    salts = (*SALTS, "a", "")
    found = [finished(loop, BASES[0][:64], cache_salt=salt).cached_tokens for salt in salts]
    assert found == [0, 0, 0, 48, 48]
    spelled = array("i", BASES[0][:PAGE]).tobytes().decode()
    assert first_parent(spelled) != digests_of(BASES[0][:PAGE])[0]


def test_sequences_of_one_step_share_their_prompt(loop):
    several = [SequenceState(BASES[0][:40], 5) for _ in range(4)]
    for sequence in several:
        loop.add(sequence)
    step = loop.schedule()
    assert [(chunk.start, chunk.count) for chunk in step.chunks] == [
        (0, 40),
        (32, 8),
        (32, 8),
        (32, 8),
    ]
    assert {tuple(s.pages[:2]) for s in several} == {tuple(several[0].pages[:2])}
    assert len({s.pages[2] for s in several}) == 4


def test_use_prefix_false_computes_everything(loop):
    finished(loop, BASES[0][:64])
    sequence = SequenceState(BASES[0][:64], 3, use_prefix=False)
    loop.add(sequence)
    assert [(chunk.start, chunk.count) for chunk in loop.schedule().chunks] == [(0, 64)]
    assert (sequence.cached_tokens, loop.scheduler.prefix_queries) == (0, 64)


def test_identical_pages_are_registered_once(loop):
    finished(loop, BASES[0][:64], new=1)
    pages = loop.scheduler.pages
    known = dict(pages._by_digest)
    loop.add(SequenceState(BASES[0][:64], 1, use_prefix=False))
    loop.drain()
    assert pages._by_digest == known
    assert len(pages._unused) == 40 - 4


def test_a_failed_sequence_leaves_nothing_to_match(loop):
    loop.add(bad := SequenceState(BASES[0][:64], 9))
    loop.add(sharer := SequenceState(BASES[0][:90], 9))
    loop.launch()
    assert sharer.pages[:4] == bad.pages
    loop.scheduler.fail(bad)
    loop.live.remove(bad)
    assert sharer.pages[0] not in loop.scheduler.pages._unused  # who shares keeps the pages
    loop.add(later := SequenceState(BASES[0][:90], 9))
    loop.drain()
    assert later.cached_tokens == 0  # page 5 is still known, and no use without those before it
    assert sharer.tokens == answer(sharer.prompt, 9)


@pytest.mark.parametrize("how", ["finished", "preempted"])
def test_a_step_that_fails_late_takes_its_pages_from_the_cache(how):
    loop = Loop(pages=9, max_running=2, token_budget=200)
    loop.add(first := SequenceState(BASES[0][:64], 40))
    loop.add(second := SequenceState(BASES[1][:47], 40))
    loop.launch()
    digest = digests_of(second.prompt)[0]
    assert digest in loop.scheduler.pages._by_digest
    if how == "finished":
        loop.end(second)
    else:
        loop.scheduler.pages.allocate(loop.scheduler.pages.free)  # the first now needs a page
        loop.schedule()
        assert second.state == "waiting"
    loop.scheduler.fail(second)
    assert digest not in loop.scheduler.pages._by_digest
    assert digests_of(first.prompt)[0] in loop.scheduler.pages._by_digest


@pytest.mark.parametrize("torn", [False, True])
def test_a_step_without_memory_is_taken_back_and_its_newest_sequence_fails(loop, torn):
    loop.add(old := SequenceState(BASES[0][:40], 9))
    loop.launch()
    loop.launch()
    for prompt in (BASES[1][:50], BASES[1][:60]):
        loop.add(SequenceState(prompt, 9))
    _, middle, new = loop.live
    pages = loop.scheduler.pages
    known = digests_of(middle.prompt)[0]
    step = loop.schedule()
    assert new.pages[:3] == middle.pages[:3]
    assert known in pages._by_digest
    loop.device.tear(step) if torn else None
    assert loop.scheduler.rollback(step) is new
    loop.check()
    assert list(loop.scheduler.waiting) == [old, middle, new]
    # the tokens that are on their way to `old` will be read
    assert [s.pending for s in (old, middle, new)] == [
        2,
        0,
        0,
    ]
    assert known not in pages._by_digest  # nobody wrote it
    assert pages.free == pages.count
    loop.end(new)
    loop.scheduler.fail(new)
    loop.drain()
    assert [s.tokens for s in (old, middle)] == [answer(s.prompt, 9) for s in (old, middle)]


@pytest.mark.parametrize("seed", range(12))
def test_many_sequences_while_memory_is_short_again_and_again(seed, monkeypatch):
    chance = random.Random(seed)
    monkeypatch.setattr("qtool.engine.scheduler.PROMPT_LOGITS", chance.choice([3, 20, 256]))
    loop = Loop(
        pages=chance.choice([8, 16, 40]),
        max_running=chance.choice([3, 8]),
        token_budget=chance.choice([5, 33, 200]),
    )
    sequences, failed = [], []
    for _ in range(40):
        prompt = [*BASES[chance.randrange(3)][: chance.randrange(60)], chance.randrange(4)]
        waits, logits = chance.random() < 0.3, chance.random() < 0.3
        sequences.append(
            SequenceState(
                prompt, chance.randrange(1, 40), waits_for_tokens=waits, needs_logits=logits
            )
        )
        loop.add(sequences[-1])
        for _ in range(chance.randrange(5)):
            loop.turn()
        if chance.random() < 0.4:
            failed.append(loop.launch_lacks_memory(torn=chance.random() < 0.5))
            loop.check()
    loop.drain()
    assert any(failed)
    served = [sequence for sequence in sequences if sequence not in failed]
    assert [s.tokens for s in served] == [answer(s.prompt, s.max_new_tokens) for s in served]


def test_those_that_came_after_a_step_without_memory_wait_behind_it(loop):
    for i in range(3):
        loop.add(SequenceState([i] * 20, 9, waits_for_tokens=i == 1))
    old, middle, new = loop.live
    loop.launch()
    loop.add(last := SequenceState([3] * 20, 9))
    step = loop.schedule()
    assert [chunk.sequence for chunk in step.chunks] == [old, new, last]
    assert loop.scheduler.rollback(step) is last
    loop.check()
    assert list(loop.scheduler.waiting) == [old, middle, new, last]
    assert middle.pending == 1
    known = digests_of(middle.prompt)
    assert loop.scheduler.pages.match(known)  # it was computed before
    loop.scheduler.pages.release(loop.scheduler.pages.match(known) * 2)
    loop.drain()
    assert [s.tokens for s in (old, middle, new, last)] == [
        answer(s.prompt, 9) for s in (old, middle, new, last)
    ]


def test_none_is_admitted_without_a_part_in_the_step(loop, monkeypatch):
    monkeypatch.setattr("qtool.engine.scheduler.PROMPT_LOGITS", 20)
    for _ in range(2):
        loop.add(SequenceState(BASES[0][:40], 3, needs_logits=True))
    first, second = loop.live
    step = loop.schedule()
    assert [chunk.sequence for chunk in step.chunks] == [first]
    # else it shared a page of `first` and were not taken back with it
    assert second.state == "waiting"
    assert loop.scheduler.rollback(step) is first
    loop.drain()
    assert [s.tokens for s in (first, second)] == [answer(s.prompt, 3) for s in (first, second)]


def test_the_newest_gives_way_and_its_pending_token_is_kept():
    loop = Loop(pages=6, max_running=2, token_budget=100)
    loop.add(old := SequenceState([1] * 31, 20))
    loop.add(new := SequenceState([2] * 31, 20))
    loop.launch()
    while not loop.scheduler.preemptions:
        loop.launch()
        loop.read()
    assert (old.state, new.state, new.preemptions) == ("running", "waiting", 1)
    known = len(new.tokens)
    loop.drain()
    assert known > 32
    assert [old.tokens, new.tokens] == [answer(old.prompt, 20), answer(new.prompt, 20)]


def test_a_preempted_sequence_waits_for_its_pending_tokens_and_may_end_with_them():
    loop = Loop(pages=4, max_running=2, token_budget=100)
    loop.add(old := SequenceState([1] * 16, 40))
    loop.add(new := SequenceState([2] * 16, 3))
    loop.launch()
    loop.launch()
    taken = loop.scheduler.pages.allocate(loop.scheduler.pages.free)
    old.computed = 32  # needs a page now
    old.tokens += [0] * 15
    loop.scheduler.schedule()
    assert (new.state, new.pending, new.pages) == ("waiting", 2, [])
    loop.end(old)
    loop.scheduler.pages.release(taken or [])
    new.longest += 9
    assert loop.schedule() is None  # there is room, but what would be computed is not known
    loop.read()
    loop.end(new)
    step, tokens, _ = loop.flying.popleft()
    loop.scheduler.commit(step.gained(tokens))
    assert (len(new.tokens), new.state, len(loop.scheduler.waiting)) == (17, "finished", 0)


def test_a_page_is_registered_when_its_last_token_is_read(loop):
    loop.add(SequenceState([1] * 30, 9))
    for _ in range(3):
        loop.launch()
    known = []
    for _ in range(2):
        loop.read()
        loop.check()
        known.append(len(loop.scheduler.pages._by_digest))
    assert known == [1, 2]  # with 31 and 32 tokens


def test_prompts_whose_logits_are_wanted_share_a_small_budget(loop, monkeypatch):
    monkeypatch.setattr("qtool.engine.scheduler.PROMPT_LOGITS", 20)
    first, second = (
        SequenceState([1] * 30, 9, needs_logits=True, use_prefix=False),
        SequenceState([2] * 25, 9, needs_logits=True, use_prefix=False),
    )
    loop.add(first)
    loop.add(second)
    steps = [
        [
            (chunk.sequence is first, chunk.start, chunk.count)
            for chunk in loop.schedule().chunks
            if not chunk.start >= 30
        ]
        for _ in range(3)
    ]
    assert steps == [[(True, 0, 20)], [(True, 20, 10), (False, 0, 10)], [(False, 10, 15)]]


def test_drafts_take_what_nobody_else_needs():
    loop = Loop(pages=5, max_running=3, token_budget=9)
    loop.scheduler.propose = lambda sequence, room: answer(sequence.tokens, room)[
        len(sequence.tokens) :
    ]
    sequences = [SequenceState([i] * 3, 14, waits_for_tokens=i < 2) for i in range(3)]
    for sequence in sequences:
        loop.add(sequence)
    loop.turn()
    loop.turn()
    loop.read()
    step = loop.schedule()
    # of 9 tokens the sequences need 3, and each may have a third of the rest
    assert [(sequences.index(c.sequence), len(c.drafts)) for c in step.chunks] == [
        (0, 2),
        (1, 2),
        (2, 0),
    ]
    loop.fly(step)
    loop.read()
    assert len(sequences[0].tokens) == 3 + 1 + 3
    loop.drain()
    assert [s.tokens for s in sequences] == [answer(s.prompt, 14) for s in sequences]


def test_no_more_run_than_the_budget_has_tokens():
    loop = Loop(pages=40, max_running=4, token_budget=2)
    for i in range(4):
        # none decodes while a token is pending, so the budget alone would admit all
        loop.add(SequenceState([i], 5, waits_for_tokens=True))
    loop.launch()
    loop.launch()
    assert len(loop.scheduler.running) == 2
    loop.drain()


def test_none_is_admitted_into_the_last_pages():
    loop = Loop(pages=7, max_running=4, token_budget=100)
    for i in range(3):
        loop.add(SequenceState([i] * 20, 30))
    loop.launch()
    assert len(loop.scheduler.running) == 2  # a page is kept for each that runs


def test_an_abort_while_waiting(loop):
    for i in range(9):
        loop.add(SequenceState([i] * 20, 5))
    loop.launch()
    waiting = loop.scheduler.waiting[-1]
    loop.end(waiting)
    loop.scheduler.finish(waiting)  # twice is once
    loop.drain()
    assert waiting.tokens == [8] * 20


def test_the_cache_forgets_the_least_recently_used_first():
    loop = Loop(pages=12, max_running=2, token_budget=200)
    for base in (0, 1):
        finished(loop, BASES[base][:64], new=1)
    finished(loop, BASES[0][:65], new=1)  # uses the older one again
    finished(loop, [9] * 100, new=1)  # needs 7 pages; 4 were never used
    assert [finished(loop, BASES[base][:65], new=1).cached_tokens for base in (0, 1)] == [64, 16]


@pytest.mark.parametrize(
    ("prompt", "new", "code"),
    [
        (0, 5, "E_EMPTY_PROMPT"),
        (400, 1, "E_TOO_LONG"),
        (399, 5, None),
        (300, 999, None),
        (1, 999, None),
        (1, 0, None),
    ],
)
def test_what_can_never_fit_is_refused(loop, prompt, new, code):
    sequence = SequenceState([1] * prompt, new)
    if code:
        with pytest.raises(UsageError) as refusal:
            loop.scheduler.add(sequence)
        assert refusal.value.code == code
        assert not loop.scheduler.waiting
    else:
        loop.add(sequence)
        loop.drain()
        assert len(sequence.tokens) == prompt + max(min(new, 400 - prompt), 1)


def test_a_sequence_may_fill_the_whole_cache_and_no_more():
    loop = Loop(pages=4, max_running=2, token_budget=100)
    with pytest.raises(UsageError, match="do not fit the key-value cache of 64 tokens"):
        loop.add(SequenceState([1] * 60, 6))
    assert len(finished(loop, [1] * 60, new=5).tokens) == 65  # the last one is never computed


def test_usage_counts_pages_that_are_held(loop):
    loop.add(SequenceState([1] * 33, 5))
    loop.launch()
    assert loop.scheduler.kv_usage == pytest.approx(3 / 40)
    loop.drain()
    assert loop.scheduler.kv_usage == 0


def test_states_are_kept_where_prompts_end_and_where_they_part():
    loop = Loop(pages=60, max_running=4, token_budget=400, context_length=400, snapshots=4)
    shared = [token % 40 for token in range(10 * PAGE + 3)]

    def cached(*own: int) -> int:
        sequence = SequenceState([*shared, *own], 3)
        loop.add(sequence)
        loop.drain()
        assert sequence.tokens == answer(sequence.prompt, 3)
        return sequence.cached_tokens

    assert cached(*[41] * 40) == 0
    assert cached(*[41] * 40) == 12 * PAGE  # the same prompt, up to its last whole page
    assert cached(*[42] * 40) == 0  # it leaves a copy where the two part
    assert cached(*[43] * 40) == 10 * PAGE
    loop.scheduler.forget_all()
    assert cached(*[43] * 40) == 0
