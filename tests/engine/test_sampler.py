"""Draws against a slow float64 reference, row by row."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qtool.engine import sampler as module
from qtool.engine import sampling_batch
from qtool.engine.sampler import Sampler, greedy, logprobs_of, uniforms
from qtool.engine.sampling_batch import History, RowRequest, row_keys, token_keys
from qtool.engine.sampling_params import SamplingParams


def request(
    seed=0,
    position=0,
    history=None,
    end_ids=(),
    logprobs=False,
    top=0,
    labels=(),
    mask=None,
    **params,
):
    return RowRequest(
        SamplingParams(**params), seed, position, history, end_ids, logprobs, top, labels, mask
    )


# greedy rows, and rows that are no numbers


def broken_rows(dtype=torch.float32):
    inf, nan = math.inf, math.nan
    rows = [
        [1, 3, 2, 3],
        [nan, 1, 2, 3],
        [1, inf, 2, 3],
        [-inf] * 4,
        [-inf, -inf, 0, -inf],
        [nan, inf, 0, 0],
    ]
    return torch.tensor(rows, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0},
        {"temperature": 5e-7},
        {"top_k": 1},
        {"min_p": 1.0},
        {"temperature": 0, "logit_bias": {0: -1}},
    ],
)
def test_a_row_without_finite_logits_fails_alone(dtype, params):
    logits = broken_rows(dtype)
    logits[0, 3] = 2.5  # no ties: min_p keeps them
    tokens = Sampler(4, "cpu").sample(logits, [request(seed=i, **params) for i in range(6)]).tokens
    assert tokens.tolist() == [1, -1, -1, -1, 2, -1]


@pytest.mark.parametrize(
    "params",
    [{}, {"top_k": 2}, {"top_p": 0.5, "temperature": 0.5}, {"min_p": 0.1, "frequency_penalty": 1}],
)
def test_batch_mates_of_a_broken_row_get_what_they_get_alone(params):
    sampler = Sampler(4, "cpu")
    rows = [
        request(
            seed=i,
            history=History([0], [1, 1]) if "frequency_penalty" in params else None,
            **params,
        )
        for i in range(6)
    ]
    logits = broken_rows()
    tokens = sampler.sample(logits, rows).tokens.tolist()
    assert tokens == [sampler.sample(logits[i : i + 1], [rows[i]]).tokens.item() for i in range(6)]
    assert [token == -1 for token in tokens] == [False, True, True, True, False, True]


def test_greedy_takes_the_first_of_equals():
    assert greedy(broken_rows()).tolist() == [1, -1, -1, -1, 2, -1]


def test_a_greedy_batch_sends_nothing_to_the_device():
    sampler = Sampler(4, "cpu")
    assert not any(part.tensors for part in sampler.prepare([request(temperature=0)] * 70).parts)
    assert (
        sampler.sample(torch.eye(4).repeat(20, 1), [request(temperature=0)] * 80).tokens.tolist()
        == [0, 1, 2, 3] * 20
    )


# the noise


def test_the_hash_is_the_same_as_in_plain_integers():
    keys = row_keys([0, 1, 2**64 - 1, -5], [0, 1, 7, 2**31])
    tokens = token_keys(1000)
    got = uniforms(torch.from_numpy(keys), torch.from_numpy(tokens)).tolist()
    for row in range(4):
        first, second = (int(key) % 2**32 for key in keys[:, row])
        for token in (0, 1, 37, 998, 999):
            x = (int(tokens[token]) % 2**32 ^ first) * second % 2**32
            x = (x ^ x >> 15) * 0x2C1B3C6D % 2**32
            assert got[row][token] == x % 2**31
    # of every version and device: a seed's tokens stay
    assert got[0][:3] == [
        1161779196,
        266017435,
        1798844281,
    ]


def test_the_second_key_is_odd_so_that_no_two_hashes_meet():
    assert (row_keys(range(100), range(100))[1] % 2 == 1).all()


def test_no_two_tokens_share_their_noise():
    assert len(np.unique(token_keys(300_000))) == 300_000


def chi_square(counts, expected):
    """The statistic in standard deviations from its mean."""
    counts, expected = np.asarray(counts, float), np.asarray(expected, float)
    free = counts.size - 1
    return (((counts - expected) ** 2 / expected).sum() - free) / math.sqrt(2 * free)


DRAWS = 20_000


@pytest.fixture(scope="module")
def uniform_draws():
    """Tokens 0..15, all as likely: DRAWS positions of one seed."""
    rows = [request(seed=11, position=i) for i in range(DRAWS)]
    return Sampler(16, "cpu").sample(torch.zeros(DRAWS, 16), rows).tokens.numpy()


def test_equal_logits_are_drawn_equally_often(uniform_draws):
    assert abs(chi_square(np.bincount(uniform_draws, minlength=16), [DRAWS / 16] * 16)) < 4


@pytest.mark.parametrize("lag", [1, 2, 3, 16, 64])
def test_a_draw_tells_nothing_of_a_later_one(uniform_draws, lag):
    pairs = uniform_draws[:-lag] * 16 + uniform_draws[lag:]
    assert abs(chi_square(np.bincount(pairs, minlength=256), [len(pairs) / 256] * 256)) < 4


@pytest.mark.slow
def test_neighbouring_seeds_draw_apart():
    draws = (
        Sampler(16, "cpu")
        .sample(torch.zeros(DRAWS, 16), [request(seed=i) for i in range(DRAWS)])
        .tokens.numpy()
    )
    pairs = draws[:-1] * 16 + draws[1:]
    assert abs(chi_square(np.bincount(pairs, minlength=256), [len(pairs) / 256] * 256)) < 4


@pytest.mark.slow
def test_tokens_are_drawn_by_their_probability():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -3.0, 1.5])
    draws = (
        Sampler(6, "cpu")
        .sample(
            logits.expand(DRAWS, 6),
            [request(seed=3, position=i, temperature=0.7) for i in range(DRAWS)],
        )
        .tokens
    )
    expected = DRAWS * torch.softmax(logits.double() / 0.7, -1)
    assert abs(chi_square(torch.bincount(draws, minlength=6), expected)) < 4


def test_the_noise_over_a_large_vocabulary_is_as_rare_as_it_should_be():
    keys = torch.from_numpy(row_keys([5] * 500, range(500)))
    least = uniforms(keys, torch.from_numpy(token_keys(16384))).double().min(-1).values / 2**31
    quantiles = (1 - (1 - least) ** 16384).sort().values  # uniform, if the draws are independent
    # Kolmogorov-Smirnov, 0.1 %
    assert (quantiles - torch.linspace(0, 1, 500)).abs().max() < 1.95 / math.sqrt(500)


@pytest.mark.parametrize(
    "pair", [(0, 1), (0, 2**17), (3, 2**17 + 3), (1000, 1000 + 2**16), (5, 5 + 2**19)]
)
def test_two_tokens_have_independent_noise(pair):
    keys = torch.from_numpy(row_keys([9] * 20_000, range(20_000)))
    h = uniforms(keys, torch.from_numpy(token_keys(2**20))[list(pair)]).numpy() >> 27
    assert (
        abs(chi_square(np.bincount(h[:, 0] * 16 + h[:, 1], minlength=256), [20_000 / 256] * 256))
        < 4
    )


SETTINGS = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.3, 1.0, 2.5]),
        "top_k": st.sampled_from([-1, 1, 2, 5, 40]),
        "top_p": st.sampled_from([1.0, 0.9, 0.4]),
        "min_p": st.sampled_from([0.0, 0.05]),
        "repetition_penalty": st.sampled_from([1.0, 1.3]),
        "presence_penalty": st.sampled_from([0.0, 0.5]),
        "logit_bias": st.sampled_from([None, {3: 5.0, 4: -100}]),
    }
)


@pytest.mark.slow
@settings(max_examples=40)
@given(
    st.lists(SETTINGS, min_size=1, max_size=6),
    st.integers(0, 2**32),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.randoms(),
)
def test_a_row_draws_the_same_token_whatever_the_batch(kinds, seed, dtype, random):
    sampler = Sampler(50, "cpu")
    rows = [
        request(
            seed=seed + i,
            position=i,
            history=History.of(SamplingParams(**kind), [1, 2, 3], [3, 4]),
            **kind,
        )
        for i, kind in enumerate(kinds)
    ]
    logits = (torch.randn(len(rows), 50, generator=torch.Generator().manual_seed(seed)) * 3).to(
        dtype
    )
    alone = [sampler.sample(logits[i : i + 1], [row]).tokens.item() for i, row in enumerate(rows)]
    order = list(range(len(rows)))
    random.shuffle(order)
    assert sampler.sample(logits[order], [rows[i] for i in order]).tokens.tolist() == [
        alone[i] for i in order
    ]


@pytest.mark.parametrize("narrow", [1024, 0], ids=["narrow", "wide"])
def test_more_rows_than_one_part_draw_as_one_by_one(narrow, monkeypatch):
    monkeypatch.setattr(sampling_batch, "NARROW", narrow)
    sampler = Sampler(50, "cpu")
    logits = torch.randn(150, 50, generator=torch.Generator().manual_seed(0))
    kinds = [{}, {"temperature": 0}, {"top_k": 3}, {"top_p": 0.5}, {"logit_bias": {1: 9}}]
    # the first part is all greedy
    rows = [request(seed=i, **kinds[i % 5 if i > 64 else 1]) for i in range(150)]
    assert sampler.sample(logits, rows).tokens.tolist() == [
        sampler.sample(logits[i : i + 1], [rows[i]]).tokens.item() for i in range(150)
    ]


def test_the_logits_are_left_as_they_were():
    logits = torch.randn(2, 10)
    kept = logits.clone()
    Sampler(10, "cpu").sample(
        logits,
        [
            request(history=History([1], [2]), top_k=3, frequency_penalty=1, logit_bias={1: 2}),
            request(min_p=0.5),
        ],
    )
    assert torch.equal(logits, kept)


# the reference


def reference(logits, params, history=([], [])):
    """Probabilities of one row in float64, token by token."""
    logits = [float(value) for value in logits]
    prompt, output = history
    for token in {*prompt, *output}:
        logits[token] = (
            logits[token] / params.repetition_penalty
            if logits[token] > 0
            else logits[token] * params.repetition_penalty
        )
        logits[token] -= params.frequency_penalty * output.count(
            token
        ) + params.presence_penalty * (token in output)
    for token, bias in params.biases.items():
        logits[token] += bias
    if params.greedy:
        return [float(i == logits.index(max(logits))) for i in range(len(logits))]
    weights = [math.exp((value - max(logits)) / params.temperature) for value in logits]
    order = sorted(range(len(weights)), key=lambda i: -logits[i])
    if params.top_k > 0:
        order = order[: params.top_k]
    total, before, kept = sum(weights[i] for i in order), 0.0, []
    for i in order:
        if before < params.top_p * total or params.top_p == 1:
            kept.append(i)
        before += weights[i]
    least = logits[kept[-1]]
    chosen = [
        weight if value >= least and weight >= params.min_p else 0.0
        for weight, value in zip(weights, logits, strict=True)
    ]
    return [weight / sum(chosen) for weight in chosen]


def support_and_draws(logits, params, history=None, count=3000):
    vocab = len(logits)
    past = History.of(params, *history) if history else None
    rows = [RowRequest(params, 77, i, past) for i in range(count)]
    return torch.bincount(
        Sampler(vocab, "cpu").sample(logits.expand(count, vocab), rows).tokens, minlength=vocab
    )


LOGITS = torch.tensor([1.0, -0.5, 2.0, 0.25, 2.0, -3.0, 0.5, 1.5, -1.0, 0.0])


DRAWN: list[dict[str, object]] = [
    {"top_k": 1},
    {"top_k": 3},
    {"top_k": 11},
    {"top_p": 0.75, "temperature": 0.5},
    {"top_p": 0.999, "temperature": 3},
    {"top_p": 1e-9},
    {"top_k": 5, "top_p": 0.8, "min_p": 0.4},
    {"min_p": 0.2, "temperature": 2},
    {"repetition_penalty": 1.5},
    {"frequency_penalty": 0.7},
    {"presence_penalty": -1.2},
    {
        "repetition_penalty": 0.6,
        "frequency_penalty": -0.3,
        "presence_penalty": 0.9,
        "logit_bias": {"9": 2.5, 2: -1},
        "top_k": 4,
    },
    {"temperature": 0, "repetition_penalty": 2, "logit_bias": {3: 1}},
    {"logit_bias": {7: -100, 5: 4}},
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("params", "narrow"),
    [*((params, 1024) for params in DRAWN), *((params, 0) for params in DRAWN[1::3])],
    ids=repr,
)
def test_draws_follow_the_reference(params, narrow, monkeypatch):
    monkeypatch.setattr(sampling_batch, "NARROW", narrow)
    params, history = SamplingParams.from_dict(params), ([0, 2, 5], [2, 7, 7, 7, 9])
    expected = np.array(reference(LOGITS, params, history))
    counts = support_and_draws(LOGITS, params, history).numpy()
    assert set(counts.nonzero()[0]) <= set(expected.nonzero()[0])
    likely = expected > 0.002
    assert (
        abs(
            chi_square(
                [*counts[likely], counts[~likely].sum() + 1],
                [*(3000 * expected[likely]), 3000 * expected[~likely].sum() + 1],
            )
        )
        < 4
    )


@settings(max_examples=60)
@given(
    st.lists(st.integers(-16, 16), min_size=2, max_size=12),
    st.sampled_from([0.2, 0.7, 1.0, 1.9]),
    st.integers(1, 14),
    st.sampled_from([0.1, 0.37, 0.5, 0.81, 0.97, 1.0]),
    st.sampled_from([0.0, 0.03, 0.21]),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_the_smallest_kept_logit_is_the_reference_s(
    eighths, temperature, top_k, top_p, min_p, dtype
):
    logits = torch.tensor(eighths, dtype=dtype) / 8
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    support = {i for i, p in enumerate(reference(logits, params)) if p > 0}
    if params.greedy:
        return
    drawn = set()
    sampler = Sampler(len(eighths), "cpu")
    # each in turn gets the best of the noise, the others the worst: it is drawn if it is kept
    for token in range(len(eighths)):
        part = sampler.prepare([RowRequest(params, 0, 0)]).parts[0]
        noise = torch.full((1, len(eighths)), 2**31 - 1, dtype=torch.int32)
        noise[0, token] = 0
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "uniforms", lambda keys, tokens, noise=noise: noise)
            drawn.add(sampler._draw(logits[None], part).item())
    assert drawn == support


def test_equal_logits_are_kept_together():
    counts = support_and_draws(torch.tensor([1.0, 1.0, 1.0, 0.0]), SamplingParams(top_k=2))
    assert (counts > 0).tolist() == [True, True, True, False]


def test_without_top_p_the_least_likely_of_top_k_is_kept():
    logits = torch.tensor([[0.0, -40.0, -50.0]])
    ones = torch.ones(1, 1)
    assert module._largest_kept(logits, 3, 2 * ones.long(), ones.double(), ones).item() == -40


def test_top_k_beyond_the_narrow_width_sorts(monkeypatch):
    monkeypatch.setattr(sampling_batch, "NARROW", 4)
    prepared = Sampler(100, "cpu").prepare(
        [
            request(top_k=4),
            request(top_k=5),
            request(top_p=0.5),
            request(top_k=3, top_p=0.5),
            request(),
        ]
    )
    assert prepared.parts[0].widths == (4, 100)
    assert prepared.parts[0].tensors["rows0"].tolist() == [0, 3] and prepared.parts[0].tensors[
        "rows1"
    ].tolist() == [1, 2]


def test_the_end_waits_for_min_new_tokens():
    logits = torch.tensor([[9.0, 5.0, 1.0]]).repeat(3, 1)
    rows = [
        request(temperature=0, min_new_tokens=4, position=position, end_ids=[0, 7])
        for position in (0, 3, 4)
    ]
    assert Sampler(3, "cpu").sample(logits, rows).tokens.tolist() == [1, 1, 0]


def test_a_history_grown_token_by_token_counts_as_one_made_at_once():
    random = np.random.default_rng(0)
    prompt, output = random.integers(0, 3000, 500).tolist(), random.integers(0, 3000, 2000).tolist()
    grown = History(prompt)
    for token in output:
        grown.append(token)
    ids, counts = grown.counts(2990)
    assert sorted(ids.tolist()) == sorted(token for token in {*prompt, *output} if token < 2990)
    assert dict(zip(ids.tolist(), counts.tolist(), strict=True)) == {
        token: output.count(token) for token in {*prompt, *output} if token < 2990
    }
    assert History.of(SamplingParams(), prompt) is None
    # only repetition looks at the prompt
    assert History.of(SamplingParams(presence_penalty=1), prompt, [4]).counts(10)[0].tolist() == [4]


# log-probabilities


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logprobs_are_those_of_the_raw_logits(dtype):
    logits = torch.randn(130, 30, generator=torch.Generator().manual_seed(1)).to(dtype)
    targets = torch.arange(130) % 30
    targets = torch.stack((targets, 29 - targets), dim=1)
    got = logprobs_of(logits, targets, 5)
    expected = torch.log_softmax(logits.double(), -1)
    torch.testing.assert_close(got.chosen.double(), expected.gather(1, targets), atol=1e-5, rtol=0)
    torch.testing.assert_close(got.top.double(), expected.topk(5).values, atol=1e-5, rtol=0)
    torch.testing.assert_close(got.top.double(), expected.gather(1, got.top_ids), atol=1e-5, rtol=0)
    assert logprobs_of(logits, targets).top.shape == (130, 0)
    assert logprobs_of(logits[:0], targets[:0], 5).top.shape == (0, 5)


def test_logprobs_come_for_the_rows_that_want_them():
    logits = torch.randn(3, 10)
    kinds = {"temperature": 0, "logit_bias": {3: 50}}
    samples = Sampler(10, "cpu").sample(
        logits,
        [
            request(**kinds),
            request(**kinds, logprobs=True, top=2),
            request(**kinds, logprobs=True, labels=[7, 0]),
        ],
    )
    assert samples.tokens.tolist() == [3, 3, 3] and samples.logprob_rows == (1, 2)
    expected = torch.log_softmax(logits, -1)
    torch.testing.assert_close(samples.logprobs.chosen[:, 0], expected[1:, 3])
    torch.testing.assert_close(samples.logprobs.chosen[1, 1:], expected[2, [7, 0]])
    assert samples.logprobs.top_ids.shape == (2, 2)
    assert Sampler(10, "cpu").sample(logits, [request()] * 3).logprobs is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_draws_the_same_tokens_and_waits_for_nothing():
    vocab, kinds = (
        5000,
        [
            {},
            {"temperature": 0},
            {"top_k": 30, "top_p": 0.9},
            {"top_p": 0.5},
            {"min_p": 0.1},
            {"repetition_penalty": 1.2, "seed": 4},
        ],
    )
    rows = []
    for i in range(150):
        params = SamplingParams.from_dict(kinds[i % 6] | {"logit_bias": {5: 3.0}})
        rows.append(
            RowRequest(
                params,
                i,
                i,
                History.of(params, [1, 2], [3]),
                (7,),
                logprobs=i % 2 == 0,
                top_logprobs=i % 3,
            )
        )
    logits = torch.randn(150, vocab, generator=torch.Generator().manual_seed(0)) * 4
    logits[3, 5] = torch.nan
    expected = Sampler(vocab, "cpu").sample(logits, rows)
    sampler, there = Sampler(vocab, "cuda"), logits.cuda()
    sampler.sample(there, rows)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        samples = sampler.sample(there, rows)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert samples.tokens.tolist() == expected.tokens.tolist() and samples.tokens[3] == -1
    torch.testing.assert_close(
        samples.logprobs.chosen.cpu(), expected.logprobs.chosen, atol=1e-4, rtol=0, equal_nan=True
    )
    assert samples.logprobs.top_ids.shape == (75, 2)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tokens = greedy(there)
    there.copy_(logits.flip(0))
    graph.replay()
    assert torch.equal(tokens.cpu(), greedy(logits.flip(0)))


def test_the_default_dtype_changes_no_draw():
    rows, logits = [request(seed=i) for i in range(500)], torch.zeros(500, 100, dtype=torch.float32)
    expected = Sampler(100, "cpu").sample(logits, rows).tokens
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(Sampler(100, "cpu").sample(logits, rows).tokens, expected)
    finally:
        torch.set_default_dtype(before)


# masks


@pytest.mark.slow
@settings(max_examples=60)
@given(st.data())
def test_a_mask_leaves_what_it_names_and_other_rows_alone(data):
    vocab_size, rows = (
        data.draw(st.integers(1, 100)),
        data.draw(st.sampled_from([1, 2, 5, module.ROWS_AT_ONCE + 1])),
    )
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    logits = torch.randn(rows, vocab_size, generator=generator).to(
        data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    )
    before, left = logits.clone(), logits.clone()
    masked, plain = [], []
    for row in range(rows):
        params = data.draw(
            st.sampled_from(
                [
                    {"temperature": 0},
                    {},
                    {"top_k": 3, "temperature": 5},
                    {"logit_bias": {0: 90}},
                    {"min_new_tokens": 9},
                ]
            )
        )
        allowed = data.draw(st.none() | st.sets(st.integers(0, vocab_size - 1), min_size=1))
        plain.append(request(seed=row, **params))
        masked.append(plain[-1])
        if allowed is not None:
            flags = np.zeros(-(-vocab_size // 32) * 32, np.uint8)
            flags[list(allowed)] = 1
            mask = np.packbits(flags, bitorder="little").view(np.int32)
            # of which the mask knows
            masked[-1] = request(seed=row, mask=mask, end_ids=range(vocab_size), **params)
            left[row, torch.from_numpy(flags[:vocab_size] == 0)] = -math.inf
    sampler = Sampler(vocab_size, "cpu")
    assert (
        sampler.sample(logits, masked).tokens.tolist()
        == sampler.sample(left, plain).tokens.tolist()
    )
    assert torch.equal(logits, before)


def test_logprobs_are_those_before_the_mask():
    logits = torch.tensor([[1.0, 2.0, 3.0]])
    samples = Sampler(3, "cpu").sample(
        logits, [request(mask=np.array([1], np.int32), logprobs=True, top=1)]
    )
    assert samples.tokens.tolist() == [0]
    found = samples.logprobs.chosen[:, 0].tolist()
    assert found == pytest.approx([float(logits.log_softmax(-1)[0, 0])])
    assert samples.logprobs.top_ids.tolist() == [[2]]
