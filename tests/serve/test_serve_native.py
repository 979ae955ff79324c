"""SGLang's `/generate` says what `Engine.generate` does; tokens there and back; what Prometheus
reads.
"""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections import Counter

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

import qtool

pytestmark = pytest.mark.xdist_group("serve")  # one server for all
PROMPT = "class Tree:\n    def __init__(self"  # the likeliest continuation is so by far
GREEDY = {"temperature": 0, "max_new_tokens": 12}
ALWAYS = {"id", "finish_reason", "prompt_tokens", "completion_tokens"}
AT_THE_END = {"cached_tokens", "e2e_latency"}


@pytest.fixture(scope="module")
def engine(quantized_model):
    with qtool.Engine(quantized_model, max_total_tokens=8192) as engine:
        yield engine


@pytest.fixture(scope="module")
def http(served):
    with httpx.Client(base_url=served.url, timeout=60) as http:
        yield http


@pytest.fixture(scope="module")
def post(http):
    """A function that returns what a route answers."""

    def post(path, **body):
        answer = http.post(path, json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    return post


def streamed(http, **body) -> list[dict]:
    with http.stream("POST", "/generate", json={**body, "stream": True}) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def assert_same(told, wanted) -> None:
    """That two results agree in all but names, times and the last digits of log probabilities."""
    assert (told["text"], told["output_ids"]) == (wanted["text"], wanted["output_ids"])
    one, other = told["meta_info"], wanted["meta_info"]
    assert set(one) == set(other)
    for name in ("finish_reason", "prompt_tokens", "completion_tokens"):
        assert one[name] == other[name]
    for name in ("input_token_logprobs", "output_token_logprobs"):
        assert_same_logprobs(one.get(name, []), other.get(name, []))
    for name in ("input_top_logprobs", "output_top_logprobs"):
        for some, others in zip(one.get(name, []), other.get(name, []), strict=True):
            assert (some is None) == (others is None)
            assert [value for value, *_ in some or []] == pytest.approx(
                [value for value, *_ in others or []], abs=0.05
            )


def assert_same_logprobs(told, wanted) -> None:
    assert [token for _, token, _ in told] == [token for _, token, _ in wanted]
    assert [value is None for value, *_ in told] == [value is None for value, *_ in wanted]
    assert [value or 0 for value, *_ in told] == pytest.approx(
        [value or 0 for value, *_ in wanted], abs=0.05
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"return_logprob": True},
        {"return_logprob": True, "top_logprobs_num": 2, "logprob_start_len": 0},
        {"return_logprob": True, "logprob_start_len": 3},
    ],
    ids=str,
)
def test_a_result_is_the_engines(engine, post, options):
    wanted = engine.generate(PROMPT, GREEDY, **options)
    assert_same(post("/generate", text=PROMPT, sampling_params=GREEDY, **options), wanted)
    tokens = engine.tokenizer(PROMPT)["input_ids"]
    assert_same(post("/generate", input_ids=tokens, sampling_params=GREEDY, **options), wanted)


def test_results_of_several_prompts_are_the_engines(engine, post):
    prompts, sampling = [PROMPT, "import os\nimport sys\n"], {**GREEDY, "max_new_tokens": 4}
    wanted = engine.generate(prompts, sampling)
    for one, other in zip(
        post("/generate", text=prompts, sampling_params=sampling), wanted, strict=True
    ):
        assert_same(one, other)
    ids = [engine.tokenizer(prompt)["input_ids"] for prompt in prompts]
    assert [
        one["output_ids"] for one in post("/generate", input_ids=ids, sampling_params=sampling)
    ] == [one["output_ids"] for one in wanted]
    assert isinstance(post("/generate", text=[PROMPT], sampling_params=sampling), list)


@pytest.mark.parametrize("stream", [False, True])
def test_each_prompt_may_have_options_of_its_own(engine, http, post, stream):
    body = {
        "text": [PROMPT, "import os\nimport sys\n"],
        "sampling_params": [{**GREEDY, "n": 2}, {**GREEDY, "max_new_tokens": 3, "n": 2}],
        "return_logprob": [True, False],
        "top_logprobs_num": [2, 0],
        "logprob_start_len": [0, -1],
    }
    wanted = engine.generate(body["text"], **{k: body[k] for k in body if k != "text"})
    body["rid"] = ["one", "two"]
    told = post("/generate", **body)
    if stream:
        last = {one["index"]: one for one in streamed(http, **body)}
        told = [last[index] for index in range(4)]
    for one, other in zip(told, wanted, strict=True):
        assert_same(one, other)
        assert ("output_token_logprobs" in one["meta_info"]) == (
            "output_token_logprobs" in other["meta_info"]
        )
    assert [one["meta_info"]["id"] for one in told] == ["one-0", "one-1", "two-0", "two-1"]
    assert [len(one["output_ids"]) for one in told] == [12, 12, 3, 3]


def test_choices_of_a_seed_are_the_engines(engine, post):
    sampling = {"n": 3, "sampling_seed": 11, "max_new_tokens": 6, "temperature": 0.7}
    told, again, wanted = (
        post("/generate", text=PROMPT, sampling_params=sampling),
        post("/generate", text=PROMPT, sampling_params=sampling),
        engine.generate(PROMPT, sampling),
    )
    assert [one["text"] for one in told] == [one["text"] for one in again]
    assert (
        len({one["text"] for one in told}) == 3
        and len({one["meta_info"]["id"] for one in told}) == 3
    )
    assert (
        told[0]["text"] == wanted[0]["text"]
        or told[0]["output_ids"][:2] == wanted[0]["output_ids"][:2]
    )


def test_a_stream_has_all_there_is_so_far(http, post):
    options = {"text": PROMPT, "sampling_params": GREEDY, "return_logprob": True}
    whole = [post("/generate", **options) for _ in range(2)][1]
    results = streamed(http, **options)
    assert_same(results[-1], whole)
    for before, after in itertools.pairwise(results):
        assert (
            after["text"].startswith(before["text"])
            and after["output_ids"][: len(before["output_ids"])] == before["output_ids"]
        )
        assert set(before["meta_info"]) >= ALWAYS and before["meta_info"]["finish_reason"] is None
        assert (
            len(before["meta_info"]["output_token_logprobs"])
            == before["meta_info"]["completion_tokens"]
            == len(before["output_ids"])
        )
    assert set(results[-1]["meta_info"]) >= ALWAYS | AT_THE_END


def test_a_stream_of_several_tells_them_apart(http):
    results = streamed(
        http, text=["one", "two"], sampling_params={"n": 2, "max_new_tokens": 3, "ignore_eos": True}
    )
    last = {one["index"]: one for one in results}
    assert (
        sorted(last) == [0, 1, 2, 3] and len({one["meta_info"]["id"] for one in last.values()}) == 4
    )
    assert all(
        one["meta_info"]["finish_reason"] == {"type": "length", "length": 3}
        for one in last.values()
    )


def test_log_probabilities_may_have_the_text_of_tokens(post):
    options = {
        "return_logprob": True,
        "logprob_start_len": 0,
        "top_logprobs_num": 1,
        "return_text_in_logprobs": True,
    }
    told = post(
        "/generate",
        text='x = "é"',
        sampling_params={"max_new_tokens": 1, "temperature": 0},
        **options,
    )
    meta = told["meta_info"]
    spelled = "".join(text for _, _, text in meta["input_token_logprobs"])
    assert spelled.replace("\N{REPLACEMENT CHARACTER}" * 2, "é") == 'x = "é"'
    assert (
        meta["output_top_logprobs"][0][0] == meta["output_token_logprobs"][0]
        and meta["input_top_logprobs"][0] is None
    )


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_can_be_scored_alone(http, post, stream):
    body = {
        "text": PROMPT,
        "sampling_params": {"max_new_tokens": 0},
        "return_logprob": True,
        "logprob_start_len": 0,
    }
    told = streamed(http, **body)[-1] if stream else post("/generate", **body)
    meta = told["meta_info"]
    assert (
        told["text"],
        told["output_ids"],
        meta["completion_tokens"],
        meta["output_token_logprobs"],
    ) == ("", [], 0, [])
    assert meta["finish_reason"] == {"type": "length", "length": 0}
    assert len(meta["input_token_logprobs"]) == meta["prompt_tokens"]


def test_what_sampling_parameters_may_be(post):
    def text(**sampling) -> str:
        return post("/generate", text=PROMPT, sampling_params={"max_new_tokens": 60, **sampling})[
            "text"
        ]

    assert text(regex="(yes|no)") in ("yes", "no")
    assert text(ebnf='root ::= "yes"') == "yes"
    schema = {
        "type": "object",
        "properties": {"a": {"const": 1}},
        "required": ["a"],
        "additionalProperties": False,
    }
    assert json.loads(text(json_schema=json.dumps(schema), temperature=0)) == {"a": 1}
    whole = text(temperature=0)
    assert text(temperature=0, stop="):") == whole.partition("):")[0] != whole
    assert text(temperature=0, stop="):", no_stop_trim=True) == whole.partition("):")[0] + "):"


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({}, "text or input_ids"),
        ({"text": "a", "input_ids": [1]}, "text or input_ids"),
        ({"input_ids": "a"}, "text"),
        ({"input_ids": [4096]}, "4096"),
        ({"text": "a", "sampling_params": {"temprature": 1}}, "temprature"),
        ({"text": "a", "sampling_params": {"top_p": 2}}, "top_p"),
        ({"text": "a", "image_data": "x"}, "image_data"),
        ({"text": ["a", "b"], "rid": ["x"]}, "2 prompts and 1 values of rid"),
        ({"text": ["a", "b"], "sampling_params": [{"n": 2}, {}]}, "n differs"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(http, body, says):
    answer = http.post("/generate", json=body)
    assert answer.status_code == 400 and says in answer.json()["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_is_aborted_by_its_name(http, post, stream):
    body = {
        "text": ["one", "two"],
        "rid": "long",
        "sampling_params": {"max_new_tokens": 1900, "ignore_eos": True, "n": 2},
        "stream": stream,
    }
    told: list[str] = []
    waiting = threading.Thread(target=lambda: told.append(http.post("/generate", json=body).text))
    waiting.start()
    deadline = time.monotonic() + 30
    while (
        http.get("/get_server_info").json()["internal_states"][0]["running"] < 4
        and time.monotonic() < deadline
    ):
        time.sleep(0.01)
    assert post("/abort_request", rid="other") == {"success": True}
    name = {"abort_all": True} if stream else {"rid": "long"}
    assert post("/abort_request", **name, other=None) == {"success": True}
    waiting.join(30)
    text = told[0]
    results = (
        [json.loads(line.removeprefix("data: ")) for line in text.split("\n\n")[:-2]]
        if stream
        else json.loads(text)
    )
    ended = [one["meta_info"] for one in results if one["meta_info"]["finish_reason"]]
    assert [one["finish_reason"]["type"] for one in ended] == ["abort"] * 4
    assert all(one["completion_tokens"] < 1900 for one in ended)


# Tokens


def test_text_becomes_tokens_and_text_again(engine, post):
    text = 'def f(x):\n    return "日本é🎉"  # <|im_end|>'
    told = post("/tokenize", prompt=text)
    assert (
        told["token_strs"] is None
        and told["tokens"] == engine.tokenizer(text)["input_ids"]
        and told["count"] == len(told["tokens"])
        and told["max_model_len"] == 2048
    )
    assert post("/detokenize", tokens=told["tokens"], skip_special_tokens=False)["text"] == text
    assert post("/detokenize", tokens=told["tokens"])["text"] == text.removesuffix("<|im_end|>")
    several = post("/tokenize", prompt=[text, "b"], model="tiny")
    assert several["tokens"] == [told["tokens"], engine.tokenizer("b")["input_ids"]] and several[
        "count"
    ] == [told["count"], 1]
    assert post("/detokenize", tokens=several["tokens"], skip_special_tokens=False)["text"] == [
        text,
        "b",
    ]


def test_messages_become_tokens(engine, post):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    wanted = engine.tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert post("/tokenize", messages=messages)["tokens"] == wanted
    without = post("/tokenize", messages=messages, add_generation_prompt=False)["tokens"]
    assert without == wanted[: len(without)] and len(without) < len(wanted)
    assert post("/v1/tokenize", messages=messages)["tokens"] == wanted
    assert post("/v1/detokenize", tokens=wanted) == post("/detokenize", tokens=wanted)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {}),
        ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}),
        ("/detokenize", {"tokens": [4096]}),
    ],
    ids=str,
)
def test_what_is_no_text_and_no_token_is_refused(http, path, body):
    assert http.post(path, json=body).status_code == 400


def test_tokens_have_names_if_asked(engine, post):
    told = post("/tokenize", prompt="a b", return_token_strs=True)
    assert told["token_strs"] == engine.tokenizer.convert_ids_to_tokens(told["tokens"])
    several = post("/tokenize", prompt=["a b", ""], return_token_strs=True)
    assert several["token_strs"] == [told["token_strs"], []]
    assert post("/detokenize", tokens=[])["text"] == ""


def test_the_cache_is_flushed(http, post):
    prompt = {"text": "one two three " * 20, "sampling_params": {"max_new_tokens": 1}}
    cached = [post("/generate", **prompt)["meta_info"]["cached_tokens"] for _ in range(2)]
    assert http.post("/flush_cache").status_code == http.get("/flush_cache").status_code == 200
    again = post("/generate", **prompt)["meta_info"]["cached_tokens"]
    assert cached[1] > 0 == again
    assert cached[1] % http.get("/server_info").json()["page_size"] == 0


@pytest.mark.parametrize("name", ["server_info", "model_info"])
def test_the_server_is_described_under_both_names_of_sglang(http, name):
    new, old = http.get(f"/{name}"), http.get(f"/get_{name}")
    assert new.status_code == old.status_code == 200 and new.json().keys() == old.json().keys()


def test_a_refusal_leaves_a_line_and_a_count(http, served):
    def count() -> float:
        families = text_string_to_metric_families(http.get("/metrics").text)
        samples = [one for family in families for one in family.samples]
        wanted = {"status": "400", "code": "unknown_parameter"}
        return sum(
            one.value
            for one in samples
            if one.name == "qtool:requests_refused_total" and wanted.items() <= one.labels.items()
        )

    before = count()
    answers = [
        http.post("/v1/completions", json={"prompt": "a secret", "max_token": 2}),
        http.post("/v1/completions", json={"prompt": [1 << 20], "rid": "mine"}),
        http.get("/nowhere"),
        http.post("/generate", content=b"{}", headers={"content-type": "text/plain"}),
    ]
    assert count() == before + 1
    lines = (
        "refused: POST /v1/completions: 400 unknown_parameter, param max_token",
        "refused: POST /v1/completions: 400 prompt",
        "refused: GET /nowhere: 404 not_found",
        "refused: POST /generate: 415 unsupported_media_type",
    )
    for answer, line in zip(answers, lines, strict=True):
        rid = answer.headers["x-request-id"]
        assert rid == answer.headers["request-id"]
        assert f"{line}, request {rid}\n" in served.said()
    assert answers[1].headers["x-request-id"] == "mine"
    assert "a secret" not in served.said()


WORDS = "four five six " * 20
CHAT = {"messages": [{"role": "user", "content": WORDS}], "max_tokens": 1}


@pytest.mark.parametrize(
    ("path", "body", "told"),
    [
        ("completions", {"prompt": WORDS, "max_tokens": 1}, "prompt_tokens_details.cached_tokens"),
        ("chat/completions", CHAT, "prompt_tokens_details.cached_tokens"),
        ("messages", CHAT, "cache_read_input_tokens"),
        (
            "responses",
            {"input": WORDS, "max_output_tokens": 1},
            "input_tokens_details.cached_tokens",
        ),
    ],
    ids=["completions", "chat", "messages", "responses"],
)
def test_a_salt_keeps_prompts_of_clients_apart(http, post, path, body, told):
    http.post("/flush_cache")
    found = []
    for salt in ({}, {"cache_salt": "a"}, {"extra_key": "a"}, {"cache_salt": "a"}):
        usage = post(f"/v1/{path}", **body, **salt)["usage"]
        for name in told.split("."):
            usage = usage[name]
        found.append(usage)
    assert found[:3] == [0, 0, 0] and found[3] > 0


def test_each_prompt_may_have_a_salt(http, post):
    http.post("/flush_cache")
    ask = {"text": [WORDS, WORDS], "sampling_params": {"max_new_tokens": 1}}
    post("/generate", **ask, extra_key=["a", None])
    apart = post("/generate", **ask, extra_key=["b", "a"])
    assert [one["meta_info"]["cached_tokens"] > 0 for one in apart] == [False, True]
    refused = http.post("/generate", json=ask | {"cache_salt": ["a"]})
    assert refused.status_code == 400 and "values of cache_salt" in refused.text


# Metrics

NAMES = {
    "vllm": {
        *(
            "vllm:num_requests_running",
            "vllm:num_requests_waiting",
            "vllm:kv_cache_usage_perc",
            "vllm:prompt_tokens",
            "vllm:generation_tokens",
        ),
        *(
            "vllm:request_success",
            "vllm:time_to_first_token_seconds",
            "vllm:inter_token_latency_seconds",
            "vllm:e2e_request_latency_seconds",
        ),
        *("vllm:request_queue_time_seconds", "vllm:request_prefill_time_seconds"),
        *("vllm:request_decode_time_seconds", "vllm:request_inference_time_seconds"),
        *("vllm:request_prompt_tokens", "vllm:request_generation_tokens"),
        *("vllm:request_max_num_generation_tokens", "vllm:time_per_output_token_seconds"),
        *("vllm:request_time_per_output_token_seconds", "vllm:gpu_cache_usage_perc"),
        *("vllm:prefix_cache_queries", "vllm:prefix_cache_hits", "vllm:num_preemptions"),
    },
    "sglang": {
        *(
            "sglang:num_running_reqs",
            "sglang:num_queue_reqs",
            "sglang:token_usage",
            "sglang:cache_hit_rate",
            "sglang:prompt_tokens",
        ),
        *(
            "sglang:generation_tokens",
            "sglang:time_to_first_token_seconds",
            "sglang:inter_token_latency_seconds",
        ),
        "sglang:e2e_request_latency_seconds",
        *("sglang:gen_throughput", "sglang:num_used_tokens", "sglang:num_requests"),
        *("sglang:time_per_output_token_seconds", "sglang:queue_time_seconds"),
        *("sglang:prompt_tokens_histogram", "sglang:generation_tokens_histogram"),
        "sglang:cached_tokens",
    },
}


def read_metrics(http) -> tuple[dict[str, str], Counter]:
    """The families with their types, and the samples by name and, where there is one, the reason or
    the bucket.
    """
    answer = http.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=")
    families = list(text_string_to_metric_families(answer.text))
    samples: Counter = Counter()
    for family in families:
        for sample in family.samples:
            assert family.name == "qtool:info" or sample.labels["model_name"] == "tiny"
            where = sample.labels.get("finished_reason") or sample.labels.get("le")
            samples[f"{sample.name} {where}" if where else sample.name] += sample.value
    return {family.name: family.type for family in families}, samples


@pytest.mark.parametrize("names", NAMES)
def test_dashboards_find_their_names(http, names):
    families, samples = read_metrics(http)
    assert NAMES[names] <= set(families)
    assert (
        families[f"{names}:prompt_tokens"] == "counter"
        and families[f"{names}:time_to_first_token_seconds"] == "histogram"
    )
    assert all(value >= 0 for value in samples.values())
    assert samples["vllm:num_requests_running"] == samples["sglang:num_queue_reqs"] == 0


def test_counters_grow_by_what_was_asked_for(http, post):
    size = len(post("/tokenize", prompt="Tell me more.")["tokens"])
    chat = post("/tokenize", messages=[{"role": "user", "content": "Hello"}])["count"]
    _, before = read_metrics(http)
    end = {"logit_bias": {"0": 100}}
    post("/v1/completions", prompt=["Tell me more."] * 2, max_tokens=5, n=2, ignore_eos=True)
    post("/v1/completions", prompt="Tell me more.", max_tokens=5, **end)
    messages = {
        "messages": [{"role": "user", "content": "Hello"}],
        "max_tokens": 40,
        "ignore_eos": True,
    }
    assert http.post(
        "/v1/chat/completions", json={**messages, "n": 3, "stream": True}
    ).text.endswith("[DONE]\n\n")
    post(
        "/generate", text="Tell me more.", sampling_params={"max_new_tokens": 4, "ignore_eos": True}
    )
    post("/generate", text="Tell me more.", sampling_params={"max_new_tokens": 0})
    assert http.post("/v1/completions", json={"prompt": "x", "temperature": -1}).status_code == 400
    _, after = read_metrics(http)
    grown = after - before
    for family in ("vllm", "sglang"):
        assert grown[f"{family}:prompt_tokens_total"] == 2 * size + size + chat + 2 * size
        assert grown[f"{family}:generation_tokens_total"] == 4 * 5 + 1 + 3 * 40 + 4
        for name, low, high in (
            ("time_to_first_token_seconds", 10, 10),  # choices
            ("e2e_request_latency_seconds", 10, 10),
            ("inter_token_latency_seconds", 1, 3 * 39),  # pieces of the stream
        ):
            assert (
                low
                <= grown[f"{family}:{name}_count"]
                == grown[f"{family}:{name}_bucket +Inf"]
                <= high
            )
            assert grown[f"{family}:{name}_sum"] > 0
    for name in ("queue", "prefill", "decode", "inference"):
        assert grown[f"vllm:request_{name}_time_seconds_count"] == 10
    assert grown["vllm:request_prompt_tokens_sum"] == grown["vllm:prompt_tokens_total"]
    assert grown["sglang:generation_tokens_histogram_sum"] == 4 * 5 + 1 + 3 * 40 + 4
    assert grown["sglang:num_requests_total"] == 10
    assert after["sglang:gen_throughput"] >= 0
    whole_s = grown["vllm:e2e_request_latency_seconds_sum"]
    assert 0 < grown["vllm:request_inference_time_seconds_sum"] < whole_s
    assert (
        grown["vllm:request_success_total length"],
        grown["vllm:request_success_total stop"],
    ) == (9, 1)
    assert grown["vllm:prefix_cache_queries_total"] == 2 * 2 * size + size + 3 * chat + 2 * size
    assert grown["vllm:prefix_cache_hits_total"] <= grown["vllm:prefix_cache_queries_total"]


def test_tokens_of_a_stream_that_was_left_are_counted(http, served):
    _, before = read_metrics(http)
    body = {"prompt": "Tell me more.", "max_tokens": 1900, "ignore_eos": True, "stream": True}
    with (
        httpx.Client(base_url=served.url) as visitor,
        visitor.stream("POST", "/v1/completions", json=body) as answer,
    ):
        next(answer.iter_lines())
    deadline = time.monotonic() + 10
    while (
        not (grown := read_metrics(http)[1] - before)["vllm:request_success_total abort"]
        and time.monotonic() < deadline
    ):
        time.sleep(0.02)
    assert (
        grown["vllm:request_success_total abort"] == 1
        and 0 < grown["vllm:generation_tokens_total"] < 1900
    )
