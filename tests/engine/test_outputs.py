"""Increments of completions, merged, are the completions."""

from __future__ import annotations

from qtool.engine.outputs import (
    CompletionOutput,
    FinishInfo,
    TokenLogprob,
    merge,
    merge_by_index,
)

FINISH = FinishInfo(
    reason={"type": "stop", "matched": "x"},
    prompt_tokens=3,
    cached_tokens=0,
    first_token_s=0.5,
    latency_s=1.0,
)


def increment(index: int, text: str, token: int, finish: FinishInfo | None = None):
    logprob = TokenLogprob(-0.5, token, ((-0.5, token),))
    return CompletionOutput(index, text, [token], [logprob], finish)


def test_merged_increments_have_all_text_tokens_and_logprobs_in_order():
    merged = merge([increment(0, "a", 1), increment(0, "", 2), increment(0, "bc", 3, FINISH)])
    assert (merged.index, merged.text, merged.token_ids) == (0, "abc", [1, 2, 3])
    assert [one.token_id for one in merged.logprobs] == [1, 2, 3]
    assert merged.finish is FINISH


def test_log_probabilities_of_the_prompt_come_with_the_first_increment():
    first = increment(0, "a", 1)
    first.prompt_logprobs = [TokenLogprob(None, 5, None)]
    assert merge([first, increment(0, "b", 2)]).prompt_logprobs == first.prompt_logprobs


def test_a_single_increment_is_not_copied():
    one = increment(0, "a", 1)
    assert merge([one]) is one


def test_completions_of_one_request_are_merged_apart():
    outputs = [increment(1, "a", 1), increment(0, "x", 9), increment(1, "b", 2, FINISH)]
    merged = merge_by_index(outputs)
    assert [(one.index, one.text) for one in merged] == [(1, "ab"), (0, "x")]
    assert merged[0].finish is FINISH and merged[1].finish is None
