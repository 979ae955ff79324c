"""Messages between the server and the engine's process, and what waits for them."""

from __future__ import annotations

import asyncio

import pytest

from qtool.engine.outputs import CompletionOutput, FinishInfo, SpecCounts, TokenLogprob
from qtool.engine.sampling_params import SamplingParams
from qtool.errors import ResourceError, UsageError, from_wire
from qtool.serve.api.replies import Account
from qtool.serve.backend.engine_client import OutputStream
from qtool.serve.backend.messages import (
    LENGTH,
    EngineStats,
    Failed,
    KeyedOutput,
    Outputs,
    Submission,
    Submit,
    decode_from_engine,
    decode_to_engine,
    encode,
    wire_error,
)
from qtool.serve.http.errors import status_of
from qtool.serve.metrics import Metrics
from qtool.serve.service import Busy, Loading

FINISH = FinishInfo(
    reason={"type": "length", "length": 2},
    prompt_tokens=3,
    cached_tokens=1,
    first_token_s=None,
    latency_s=1.0,
    queue_s=0.5,
    spec=SpecCounts(steps=4, drafts=2, proposed=10, correct=6),
)


def test_a_submission_arrives_as_it_was_sent():
    params = SamplingParams(
        stop=["é", "世"],
        stop_token_ids=[7],
        logit_bias={"3": 1},
        sampling_seed=2**64 - 1,
        json_schema={"type": "object"},
    )
    submission = Submission([[1, 2]], params, stream=True, rid="r", grammar=("a", "b", "c"))
    data = encode(Submit(3, submission))
    assert LENGTH.unpack(data[: LENGTH.size]) == (len(data) - LENGTH.size,)
    message = decode_to_engine(data[LENGTH.size :])
    assert isinstance(message, Submit)
    assert (message.key, message.submission) == (3, submission)


def test_outputs_and_errors_of_submissions_share_a_message():
    output = CompletionOutput(1, "a", [4], [TokenLogprob(-1.5, 4, ((-1.5, 4),))], FINISH)
    error = wire_error(UsageError("E_PROMPT", "no prompt", hint="give one"))
    sent = Outputs([KeyedOutput(1, output), KeyedOutput(2, error)])
    assert decode_from_engine(encode(sent)[LENGTH.size :]) == sent


def test_usage_and_metrics_say_what_came_of_drafts():
    metrics = Metrics("m")
    account = Account("chat", metrics, streamed=False)
    account.note(CompletionOutput(0, "a", [4], [], FINISH), 1)
    usage = account.usage().completion_tokens_details
    assert (usage.accepted_prediction_tokens, usage.rejected_prediction_tokens) == (6, 4)
    stats = EngineStats(1, 0, 0.5, 8, 4, 0, 9, spec=FINISH.spec)
    lines = metrics.render(stats).decode().splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if "spec_" in line and line[0] != "#")
    assert values == {
        'vllm:spec_decode_num_drafts_total{model_name="m"}': "2.0",
        'vllm:spec_decode_num_draft_tokens_total{model_name="m"}': "10.0",
        'vllm:spec_decode_num_accepted_tokens_total{model_name="m"}': "6.0",
        'sglang:spec_accept_length{model_name="m"}': "2.5",
        'sglang:spec_accept_rate{model_name="m"}': "0.6",
    }


def test_an_error_with_half_of_a_surrogate_pair_is_sent_escaped():
    error = UsageError("E_PROMPT", "`\ud800` is unknown", hint="")
    message = decode_from_engine(encode(Failed(wire_error(error)))[LENGTH.size :])
    assert isinstance(message, Failed)
    rebuilt = from_wire(dict(message.error))
    assert type(rebuilt) is UsageError and rebuilt.message == "`\\ud800` is unknown"


def test_a_slow_reader_gets_increments_merged():
    async def read() -> list[list[CompletionOutput]]:
        stream = OutputStream(key=0, completions=2)
        stream.put(CompletionOutput(0, "a", [1], []))
        stream.put(CompletionOutput(1, "x", [8], [], FINISH))
        stream.put(CompletionOutput(0, "b", [2], [], FINISH))
        return [outputs async for outputs in stream]

    [outputs] = asyncio.run(read())
    assert [(one.index, one.text, one.token_ids) for one in outputs] == [
        (0, "ab", [1, 2]),
        (1, "x", [8]),
    ]
    assert all(one.finish == FINISH for one in outputs)


def test_a_reader_gets_the_error_of_its_submission():
    async def read() -> None:
        stream = OutputStream(key=0, completions=1)
        stream.fail(ResourceError("E_OUT_OF_MEMORY", "no memory", hint=""))
        await stream.collect()

    with pytest.raises(ResourceError, match="no memory"):
        asyncio.run(read())


@pytest.mark.parametrize("draining, code", [(False, "loading"), (True, "draining")])
def test_a_server_that_is_loading_refuses_requests(draining, code):
    loading = Loading()
    if draining:
        loading.drain()
    with pytest.raises(Busy) as refusal:
        loading.ready()
    assert (status_of(refusal.value), refusal.value.code) == (503, code)
