"""Drafted tokens change how many steps an answer takes, and nothing else."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from support import EXAMPLE
from support.fixed_steps import run_in_fixed_steps
from support.small_models import publish

from qtool.engine.config import EngineConfig, Speculation
from qtool.engine.cuda_graphs import PromptShape
from qtool.engine.engine import Engine
from qtool.engine.sampler import Sampler
from qtool.engine.sampling_batch import History, RowRequest
from qtool.engine.sampling_params import SamplingParams
from qtool.engine.speculation import NgramDrafter
from qtool.engine.step import Chunk, SequenceState
from qtool.errors import UsageError

pytestmark = pytest.mark.usefixtures("one_thread")
pytest_plugins = ["support.sample_plugin"]

OPTIONS = {"dtype": "float32", "max_total_tokens": 8192}
NGRAM = {"speculative_algorithm": "NGRAM", "speculative_ngram_min_match_window_size": 1}
NUM_STEPS = 3  # of models with states
REPEATED = [
    "import os\nimport sys\n" * 6,
    "for i in range(10):\n    print(i)\n" * 5,
    "def fibonacci(n):\n    if n < 2:\n        return n\n" * 3,
]
GREEDY = {"temperature": 0, "max_new_tokens": 30, "ignore_eos": True}
ASKED = [
    GREEDY,
    *({**GREEDY, "max_new_tokens": count} for count in (1, 2, 9)),
    {**GREEDY, "frequency_penalty": 0.4, "presence_penalty": 0.1},
    {**GREEDY, "repetition_penalty": 1.2, "min_new_tokens": 20, "ignore_eos": False},
    {**GREEDY, "stop": ["sys\nimport", "(i)\n\n"]},
    {**GREEDY, "stop": ["t s"], "no_stop_trim": True},
    {**GREEDY, "logit_bias": {11: 3.0}},
    {"temperature": 0.3, "max_new_tokens": 30, "seed": 5},
    {"temperature": 1.0, "top_p": 0.8, "top_k": 40, "min_p": 0.01, "max_new_tokens": 30, "seed": 6},
]
CASES = [
    *(("import os\n", {**GREEDY, "max_new_tokens": count}) for count in (50, 48)),
    *((REPEATED[0], params) for params in ASKED),
    *((text, GREEDY) for text in REPEATED[1:]),
    (REPEATED[0], {"temperature": 0.5, "max_new_tokens": 20, "seed": 7, "n": 2}),
]


def essence(result) -> tuple[object, ...]:
    return result["text"], result["output_ids"], result["meta_info"]["finish_reason"]


def answers(engine: Engine, cases=CASES) -> list[tuple[object, ...]]:
    """All of ``cases`` together."""
    texts, params = zip(*cases, strict=True)
    return [essence(result) for result in engine.generate(list(texts), list(params))]


@pytest.fixture(scope="module")
def wanted():
    """What decoding gives token by token, with the values of its log probabilities."""
    with Engine(EXAMPLE, **OPTIONS) as engine:
        found = answers(engine)
        logprobs = engine.generate(REPEATED, GREEDY, return_logprob=True, top_logprobs_num=2)
        return found, [result["meta_info"] for result in logprobs]


@pytest.fixture(scope="module")
def drafting():
    with Engine(EXAMPLE, **OPTIONS, **NGRAM) as engine:
        yield engine


@pytest.mark.slow
def test_answers_are_those_without_drafts(wanted, drafting):
    assert answers(drafting) == wanted[0]
    total = drafting.loop.spec.total
    assert total.accept_length > 1.5
    assert total.correct < total.proposed  # some were wrong, and taken back
    # from the prefix cache
    alone = [drafting.generate(text, params) for text, params in CASES[1:8]]
    assert [essence(result) for result in alone] == wanted[0][1:8]
    assert drafting.loop.scheduler.prefix_hits > 0


@pytest.mark.slow
def test_answers_in_chunks_and_with_preemptions_are_the_same(wanted):
    small = {"max_total_tokens": 128, "chunked_prefill_size": 20, "disable_radix_cache": True}
    with Engine(EXAMPLE, **{**OPTIONS, **small}, **NGRAM) as engine:
        assert answers(engine, CASES[:10]) == wanted[0][:10]
        assert engine.loop.scheduler.preemptions > 0
        assert engine.loop.spec.total.accept_length > 1.2
        pages = engine.loop.scheduler.pages
        assert pages.free == pages.count


def test_log_probabilities_and_counts_are_those_of_the_answer(wanted, drafting):
    results = drafting.generate(REPEATED, GREEDY, return_logprob=True, top_logprobs_num=2)
    for result, plain in zip(results, wanted[1], strict=True):
        meta = result["meta_info"]
        for name in ("output_token_logprobs", "output_top_logprobs"):
            assert len(meta[name]) == 30
            values, expected = (np.array(each[name], float)[..., :2] for each in (meta, plain))
            assert np.abs(values - expected).max() < 1e-4
        # a token of the prompt's step, then one of each step and the drafts that were right
        steps, correct = meta["spec_verify_ct"], meta["spec_num_correct_drafts"]
        assert 1 + steps + correct == meta["completion_tokens"] == 30
        assert meta["spec_accept_length"] == pytest.approx((steps + correct) / steps)
        assert not [name for name in plain if name.startswith("spec")]


def test_a_prompt_whose_last_token_has_drafts_is_counted_with_them():
    with Engine(EXAMPLE, **OPTIONS, **NGRAM, chunked_prefill_size=16) as engine:
        ids = engine.tokenizer(REPEATED[0]).input_ids[:17]
        meta = engine.generate(input_ids=ids, sampling_params=GREEDY)["meta_info"]
    assert meta["spec_verify_ct"] + meta["spec_num_correct_drafts"] == meta["completion_tokens"]


def test_the_log_has_the_accept_length(drafting, caplog):
    caplog.set_level("INFO", "qtool.engine")
    drafting.generate(REPEATED[0], GREEDY)
    drafting.generate(REPEATED[0], {**GREEDY, "max_new_tokens": 1})  # the line is written
    assert re.search(r"accept length [2-9]\.\d\d, \d+ of \d+ drafted tokens", caplog.text)


def test_a_stream_has_the_tokens_of_a_step_in_one_part(wanted, drafting):
    parts = list(drafting.generate(REPEATED[0], GREEDY, stream=True))
    assert essence(parts[-1]) == wanted[0][2]
    assert len(parts) == parts[-1]["meta_info"]["spec_verify_ct"] + 1 < 30


def test_a_grammar_holds_drafts_too(drafting, monkeypatch):
    pytest.importorskip("xgrammar", reason="the extra `grammar` is not installed")
    held = {"temperature": 1.0, "seed": 3, "max_new_tokens": 60, "regex": "(import [a-z]{2}\n){4}"}
    before = drafting.loop.spec.total.correct
    found = drafting.generate(REPEATED[0], held)
    assert drafting.loop.spec.total.correct > before
    drafter, drafting.loop.scheduler.propose = drafting.loop.scheduler.propose, None
    assert essence(drafting.generate(REPEATED[0], held)) == essence(found)
    drafting.loop.scheduler.propose = drafter
    # a grammar that takes longer than a draft may
    monkeypatch.setattr("qtool.engine.grammar.TOKEN_S", 0)
    assert essence(drafting.generate(REPEATED[0], held)) == essence(found)


def test_steps_of_a_fixed_size_compute_the_same(wanted):
    """What CUDA graphs do, by hand: sequences with drafts and without, beside prompts too."""
    small = {"chunked_prefill_size": 64, "max_running_requests": 6}
    with Engine(EXAMPLE, **OPTIONS, **NGRAM, **small) as engine:
        shapes = [PromptShape(0, 64), PromptShape(48, 64)]
        sizes = run_in_fixed_steps(engine, [8, 16, 48], shapes)
        assert answers(engine, CASES[:8]) == wanted[0][:8]
        assert answers(engine, CASES[2:3]) == wanted[0][2:3]
        assert {8, 48, PromptShape(48, 64)} <= {*sizes}


def test_a_draft_is_accepted_as_often_as_it_is_drawn():
    """Two tokens of 3000 sequences, the first drafted, have the distribution of the model."""
    count, draft = 3000, 2
    chances = torch.tensor([[0.1, 0.25, 0.4, 0.25], [0.3, 0.1, 0.1, 0.5]])
    rows = [
        RowRequest(SamplingParams(), seed=seed, position=position, drafts=[draft] * position)
        for seed in range(count)
        for position in range(2)
    ]
    drawn = Sampler(4, "cpu").sample(chances.log().repeat(count, 1), rows).tokens.tolist()
    chunk = Chunk(SequenceState([0], 9), 3, 2, samples=True, drafts=[draft])
    gained = [chunk.gained(drawn[start : start + 2]) for start in range(0, 2 * count, 2)]
    first = np.bincount([tokens[0] for tokens in gained], minlength=4) / count
    assert np.abs(first - chances[0].numpy()).max() < 0.03
    assert all((len(tokens) == 2) == (tokens[0] == draft) for tokens in gained)
    second = [tokens[1] for tokens in gained if len(tokens) == 2]
    assert np.abs(np.bincount(second) / len(second) - chances[1].numpy()).max() < 0.05


@pytest.mark.parametrize(
    ("tokens", "window", "room", "drafts"),
    [
        ([1, 2, 3, 4, 9, 1, 2, 3], (1, 3), 9, [4, 9, 1, 2]),
        ([1, 2, 3, 4, 9, 1, 2, 3], (1, 3), 1, [4]),
        # the longest match, though a shorter one is nearer
        ([1, 2, 3, 4, 7, 3, 5, 1, 2, 3], (1, 9), 4, [4, 7, 3, 5]),
        ([1, 2, 3, 4, 7, 3, 5, 1, 2, 3], (1, 1), 4, [5, 1, 2, 3]),
        ([1, 2, 3, 4, 1, 2, 3, 5, 1, 2, 3], (1, 9), 1, [5]),  # of equal ones the last
        ([6, 1, 2, 1, 2], (2, 9), 9, [1, 2, 1, 2]),  # what repeats goes on
        ([6, 6, 6], (2, 9), 9, [6, 6, 6, 6]),
        ([1, 2, 3, 7, 3], (2, 9), 9, []),
        ([1, 2, 3], (1, 9), 9, []),
        ([1], (1, 9), 9, []),
    ],
)
def test_what_is_drafted(tokens, window, room, drafts):
    drafter = NgramDrafter(Speculation(4, *window), tokens[:2])
    assert drafter.propose(tokens, room) == drafts
    longer = [*range(300), *tokens]  # the buffer grows
    assert NgramDrafter(Speculation(4, *window), tokens[:0]).propose(longer, 1) is not None


def test_penalties_count_drafts_and_forget_them():
    history = History([5, 7], [7, 9])
    alone = [part.tolist() for part in history.counts(100)]
    along = [part.tolist() for part in history.counts(100, [9, 4, 4])]
    history_of_all = History([5, 7], [7, 9, 9, 4, 4])
    assert along == [part.tolist() for part in history_of_all.counts(100)]
    assert [part.tolist() for part in history.counts(100)] == alone
    history.append(8)
    assert [part.tolist() for part in history.counts(100)] == [[5, 7, 9, 8], [0, 1, 1, 1]]


LONGER_CASES = [("".join(REPEATED), GREEDY), *CASES]  # states of longer prompts are copied


def draft_known(known):
    """Return what drafts tokens of ``known`` sequences, of which each fifth is wrong."""

    def propose(sequence, room):
        size = len(sequence.tokens)
        rest = next((each[size:] for each in known if each[:size] == sequence.tokens), [])
        places = enumerate(rest[: min(room, NUM_STEPS)], start=size)
        return [token ^ 1 if place % 5 == 3 else token for place, token in places]

    return propose


@pytest.fixture(scope="module", params=["qwen3_next", "qwen3_5"])
def with_states(request, tmp_path_factory):
    """A random model with gated delta nets, what it says token by token, and all of its tokens."""
    folder, _ = publish(request.param, tmp_path_factory.mktemp("states") / "model")
    with Engine(folder, **OPTIONS, device="cpu") as engine:
        found = answers(engine, LONGER_CASES)
        prompts = [engine.tokenizer(text).input_ids for text, _ in LONGER_CASES]
    known = [[*ids, *one[1]] for ids, one in zip(prompts, found, strict=False)]
    return folder, found, known


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({}, None),
        ({"max_total_tokens": 192, "chunked_prefill_size": 20, "disable_radix_cache": True}, 10),
        ({"max_running_requests": 6, "chunked_prefill_size": 64}, 8),
    ],
    ids=["together", "preempted", "fixed"],
)
def test_states_forget_drafts_that_were_wrong(with_states, options, count):
    folder, wanted, known = with_states
    given = {**OPTIONS, "device": "cpu", **NGRAM, "speculative_num_steps": NUM_STEPS, **options}
    with Engine(folder, **given) as engine:
        engine.loop.scheduler.propose = draft_known(known)
        is_fixed = "max_running_requests" in options
        shapes = [PromptShape(0, 64), PromptShape(24, 64)] if is_fixed else []
        used = run_in_fixed_steps(engine, [8, 24], shapes) if is_fixed else []
        assert answers(engine, LONGER_CASES[:count]) == wanted[:count]
        total = engine.loop.spec.total
        assert total.accept_length > 1.2 and 0 < total.correct < total.proposed
        if is_fixed:
            assert {8, 24, PromptShape(24, 64)} <= {*used}
        elif not options:
            alone = [engine.generate(text, params) for text, params in LONGER_CASES[:6]]
            assert [essence(result) for result in alone] == wanted[:6]
            assert engine.loop.scheduler.prefix_hits > 0
        else:
            assert engine.loop.scheduler.preemptions > 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"speculative_algorithm": "EAGLE3"}, "the engine runs no second model that drafts"),
        (
            {"speculative_algorithm": "NEXTN", "speculative_ngram_min_match_window_size": 3},
            "window_size is given, and speculative_algorithm is `NEXTN`",
        ),
        ({"speculative_algorithm": "suffix"}, "speculative_algorithm is `suffix`"),
        ({"speculative_num_steps": 3}, "speculative_num_steps is given"),
        ({**NGRAM, "speculative_num_steps": 3, "speculative_num_draft_tokens": 3}, "is 3 and"),
        ({**NGRAM, "speculative_num_steps": 32}, "speculative_num_steps is 32"),
        (
            {
                "speculative_algorithm": "NGRAM",
                "speculative_ngram_min_match_window_size": 5,
                "speculative_ngram_max_match_window_size": 4,
            },
            "is 5 and speculative_ngram_max_match_window_size 4",
        ),
    ],
)
def test_what_cannot_be_drafted_is_refused(options, said):
    with pytest.raises(UsageError, match=said):
        EngineConfig(**options)


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({}, (7, 2, 12)),
        ({"speculative_num_draft_tokens": 5}, (4, 2, 12)),
        ({"speculative_num_steps": 5, "speculative_num_draft_tokens": 6}, (5, 2, 12)),
        ({"speculative_ngram_max_match_window_size": 1}, (7, 1, 1)),
        ({"speculative_ngram_min_match_window_size": 20}, (7, 20, 20)),
    ],
)
def test_how_much_is_drafted(options, found):
    config = EngineConfig(speculative_algorithm="NGRAM", **options)
    assert config.speculation == Speculation(*found)
    assert EngineConfig().speculation is None
