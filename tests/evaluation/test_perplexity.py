"""Perplexity of any checkpoint in one way: dequantized weights, simulated input rounding."""

import math

import pytest
import torch
from safetensors.torch import load_file
from support import EXAMPLE
from support.samples import PROMPT_TOKENS, load, token_sequences

from qtool.checkpoint import open_checkpoint
from qtool.errors import DataRefused
from qtool.evaluation.perplexity import load_dequantized, perplexity

pytest_plugins = ["support.sample_plugin"]
pytestmark = pytest.mark.usefixtures("one_thread")

TEXTS = token_sequences("evaluation.jsonl", 3, 160)


@pytest.fixture(scope="module")
def plain(one_thread):
    return perplexity(load_dequantized(open_checkpoint(EXAMPLE), dtype=torch.float32), TEXTS)


def test_perplexity_is_exp_of_the_mean_loss_that_transformers_computes():
    model = load(EXAMPLE, dtype=torch.float32)
    total = sum(
        model(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        for ids in (torch.tensor([text]) for text in TEXTS)
    )
    expected = math.exp(total / sum(len(text) - 1 for text in TEXTS))
    assert perplexity(
        load_dequantized(open_checkpoint(EXAMPLE), dtype=torch.float32), TEXTS
    ) == pytest.approx(expected, rel=1e-5)


def test_bf16_says_the_same_as_float32(plain):
    assert perplexity(load_dequantized(open_checkpoint(EXAMPLE)), TEXTS) == pytest.approx(
        plain, rel=5e-3
    )


def test_only_the_first_tokens_count_and_nothing_to_predict_is_refused():
    model = load_dequantized(open_checkpoint(EXAMPLE))
    assert perplexity(model, [TEXTS[0][:20], [5]]) == pytest.approx(
        perplexity(model, [TEXTS[0]], max_tokens=20)
    )
    with pytest.raises(DataRefused) as error:
        perplexity(model, [[1], []])
    assert error.value.code == "E_NO_TOKENS"


@pytest.mark.parametrize(
    ("name", "worse"),  # at most this much, relative
    [
        ("ct/FP8_BLOCK", 0.03),
        ("ct/W8A8", 0.02),
        ("ct/W4A16", 0.1),
        ("ct/NVFP4", 0.15),
        ("ct/mixed", 0.1),
        ("gptq/rtn4", 0.1),
        ("modelopt/FP8_KV", 0.03),
        ("modelopt/INT8_SQ", 0.03),
        ("modelopt/W4A8_AWQ", 0.15),
        ("modelopt/W4A8_MXFP4_FP8", 0.15),
        ("modelopt/MIXED", 0.15),
    ],
)
def test_every_scheme_stays_near_the_plain_model(sample, plain, name, worse):
    model = load_dequantized(open_checkpoint(sample(name)), dtype=torch.float32)
    assert plain * 0.97 < perplexity(model, TEXTS) < plain * (1 + worse)


@pytest.mark.parametrize(
    (
        "name",
        "nats",
        # mean KL divergence from the library's own model; where inputs are rounded, one flip early
        # on
        # changes many later
    ),
    [
        ("ct/FP8", 1e-5),
        ("ct/FP8_BLOCK", 1e-5),
        ("ct/W4A16_ASYM", 1e-5),
        ("ct/MXFP4", 1e-4),
        ("ct/NVFP4A16", 1e-3),
        ("gptq/asym_v1", 1e-3),
        ("gptq/desc_act", 1e-3),
        ("gptq/dynamic", 1e-3),
        ("modelopt/FP8_PB_WO", 1e-3),
    ],
)
def test_logits_are_those_of_the_library(sample, name, nats):
    model = load_dequantized(open_checkpoint(sample(name)), dtype=torch.float32)
    expected = load_file(f"{sample(name)}.reference.safetensors")["logits"].log_softmax(-1)
    with torch.no_grad():
        found = model(
            torch.tensor(token_sequences("evaluation.jsonl", 1, PROMPT_TOKENS))
        ).logits.log_softmax(-1)
    assert (expected.exp() * (expected - found)).sum(-1).mean() < nats
