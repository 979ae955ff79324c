"""lm-eval's `local-completions` measures a served model: the log likelihoods are those of the
dequantized model in transformers.
"""

from __future__ import annotations

import httpx
import pytest
import torch
from support.lm_eval_tasks import QUESTIONS, task_folder
from transformers import AutoTokenizer

from qtool.checkpoint import open_checkpoint
from qtool.evaluation.perplexity import load_dequantized

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("serve")]  # one server for all


@pytest.fixture(scope="module")
def evaluate(served, tmp_path_factory):
    """A function that runs the two tasks with lm-eval, and returns its results."""

    def run(**model_args):
        import lm_eval
        from lm_eval.tasks import TaskManager

        return lm_eval.simple_evaluate(
            model="local-completions",
            model_args={
                "model": "tiny",
                "base_url": f"{served.url}/v1/completions",
                "tokenizer": served.model,
                "max_retries": 1,
                **model_args,
            },
            tasks=["tiny_choice", "tiny_write"],
            task_manager=TaskManager(include_path=str(folder), include_defaults=False),
            bootstrap_iters=0,
        )

    with task_folder(tmp_path_factory.mktemp("lm_eval")) as folder:
        yield run


@pytest.fixture(scope="module")
def likelihood(quantized_model):
    """A function that returns what transformers says of a continuation: its log likelihood, and how
    far it is behind the likeliest.
    """
    tokenizer = AutoTokenizer.from_pretrained(quantized_model)
    model = load_dequantized(open_checkpoint(quantized_model), dtype=torch.float32)

    def of(context: str, continuation: str) -> tuple[float, float]:
        start, ids = (
            len(tokenizer(context)["input_ids"]),
            torch.tensor([tokenizer(context + continuation)["input_ids"]]),
        )
        with torch.inference_mode():
            logprobs = model(ids).logits[0, start - 1 : -1].float().log_softmax(-1)
        own = logprobs.gather(1, ids[0, start:, None])
        others = logprobs.scatter(1, ids[0, start:, None], -torch.inf)
        return float(own.sum()), float((others.max(1).values - own[:, 0]).max())

    return of


@pytest.mark.parametrize(
    "how",
    [
        {"tokenized_requests": True, "num_concurrent": 1, "batch_size": 4},
        {"tokenized_requests": False, "num_concurrent": 4},
    ],
    ids=str,
)
def test_lm_eval_measures_a_served_model(evaluate, likelihood, served, how):
    found = evaluate(**how)
    told = [
        (*sample["arguments"][number], *sample["resps"][number][0])
        for sample in found["samples"]["tiny_choice"]
        for number in range(len(sample["arguments"]))
    ]
    assert len(told) == 3 * len(QUESTIONS)
    for context, continuation, value, greedy in told:
        wanted, behind = likelihood(context, continuation)
        assert value == pytest.approx(wanted, abs=0.3, rel=0.03)
        assert greedy == (behind < 0) or abs(behind) < 0.2
    right = [
        max(range(3), key=lambda number, row=row: likelihood(row[0], row[1][number])[0]) == row[2]
        for row in QUESTIONS
    ]
    assert (
        found["results"]["tiny_choice"]["acc,none"] == pytest.approx(sum(right) / len(right)) != 0
    )
    for sample in found["samples"]["tiny_write"]:
        text = sample["resps"][0][0]
        body = {
            "prompt": sample["doc"]["question"],
            "max_tokens": 10,
            "temperature": 0,
            "stop": ["\n\n", ")"],
        }
        whole = (
            httpx.post(f"{served.url}/v1/completions", json=body)
            .raise_for_status()
            .json()["choices"][0]["text"]
        )
        assert text[:8] == whole[:8] and ")" not in text and "\n\n" not in text
