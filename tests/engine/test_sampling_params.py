"""What a request may ask for."""

from __future__ import annotations

import math

import pytest

from qtool.engine.sampling_params import MAX_GRAMMAR, RANGES, WHOLE, SamplingParams
from qtool.errors import UsageError


@pytest.mark.parametrize(
    "values",
    [
        *({"temperature": value} for value in (-0.1, 101, math.nan, math.inf, 10**400, "1", True)),
        *({"top_p": value} for value in (0, 1.01, math.nan)),
        *({"top_k": value} for value in (0, -2, 1.5, True)),
        *({"min_p": value} for value in (-0.1, 1.1)),
        *({"frequency_penalty": value} for value in (-2.1, 2.1)),
        *({"presence_penalty": value} for value in (-2.1, 2.1)),
        *({"repetition_penalty": value} for value in (0, 2.1)),
        *({"max_new_tokens": value} for value in (0, -1, 2**31, 1.5)),
        *({"min_new_tokens": value} for value in (-1, 129)),
        *({"n": value} for value in (0, 129)),
        *({"seed": value} for value in (2**64, 1.5, False)),
        *({"stop": value} for value in ("x" * 1025, ["a"] * 65, 3, [3], b"a", {"a": 1}, "\ud800")),
        *({"stop_token_ids": value} for value in ([-1], [True], [1.0], "12", 3, [1] * 1025)),
        *(
            {"logit_bias": value}
            for value in (
                [1],
                {"a": 1},
                {-1: 1},
                {"-1": 1},
                {1: 101},
                {1: math.nan},
                {1: True},
                {1: "1"},
                {"1" * 11: 1},
                {1.0: 1},
            )
        ),
        *(
            {"regex": value}
            for value in (
                "",
                "a" * (MAX_GRAMMAR + 1),
                "é" * (MAX_GRAMMAR // 2 + 1),
                "\ud800",
                3,
                {"a": 1},
            )
        ),
        *(
            {"json_schema": value}
            for value in (
                "",
                3,
                [1],
                {"a": {1}},
                {"a": math.nan},
                {"a": "\ud800"},
                {"a": "x" * MAX_GRAMMAR},
            )
        ),
        *({"ebnf": ""}, {"structural_tag": b"{}"}),
        *({"logit_bias": dict.fromkeys(range(1025), 1)}, {"ignore_eos": 1}),
    ],
    ids=repr,
)
def test_a_wrong_value_is_refused_by_name(values):
    name = next(iter(values)).replace("seed", "sampling_seed")
    with pytest.raises(UsageError) as refusal:
        SamplingParams.from_dict(values)
    assert refusal.value.code == "E_SAMPLING"
    assert f"`{name}`" in refusal.value.message
    assert f"`{name}` takes " in refusal.value.hint
    assert len(refusal.value.message) < 200


def test_an_unknown_name_is_answered_with_the_right_one():
    with pytest.raises(UsageError) as refusal:
        SamplingParams.from_dict({"temprature": 1})
    assert "`temperature`" in refusal.value.hint
    with pytest.raises(UsageError, match="not a dictionary"):
        SamplingParams.from_dict([("temperature", 1)])


def test_values_at_the_bounds_are_taken():
    low = SamplingParams.from_dict(
        {
            "temperature": 0,
            "top_p": 1e-9,
            "top_k": 1,
            "min_p": 0,
            "repetition_penalty": 0.01,
            "max_new_tokens": 1,
        }
    )
    assert low.greedy and low.temperature == 0.0 and isinstance(low.temperature, float)
    high = SamplingParams.from_dict(
        {
            "temperature": 100,
            "top_k": 2**31 - 1,
            "logit_bias": {"7": -100, 8: 100},
            "stop": "x" * 1024,
            "stop_token_ids": [5],
            "max_new_tokens": None,
        }
    )
    assert high.biases == {7: -100.0, 8: 100.0}
    assert (
        high.stop_strings == ("x" * 1024,) and high.stop_ids == (5,) and high.max_new_tokens is None
    )


def test_seed_is_another_name_of_sampling_seed():
    assert (
        SamplingParams.from_dict({"seed": 5})
        == SamplingParams(sampling_seed=5)
        == SamplingParams.from_dict({"seed": 5, "sampling_seed": 5})
    )
    assert SamplingParams.from_dict({"seed": None}).sampling_seed is None
    with pytest.raises(UsageError, match="differ"):
        SamplingParams.from_dict({"seed": 5, "sampling_seed": 6})


def test_token_ids_the_model_lacks_are_refused():
    SamplingParams(logit_bias={9: 1}, stop_token_ids=[9]).check_vocabulary(10)
    for name, value in (("logit_bias", {10: 1}), ("stop_token_ids", [10])):
        with pytest.raises(UsageError, match=name):
            SamplingParams(**{name: value}).check_vocabulary(10)


def test_row_seeds_repeat_with_a_seed_and_never_without():
    fixed = SamplingParams(sampling_seed=-3)
    assert [fixed.row_seed(i) for i in range(4)] == [fixed.row_seed(i) for i in range(4)]
    assert (
        len(
            {fixed.row_seed(i) for i in range(100)}
            | {SamplingParams().row_seed() for _ in range(100)}
        )
        == 200
    )


def test_what_asks_for_nothing_is_taken():
    nothing = {"stop": ["a", ""], "n": None, "stop_regex": None, "custom_params": {}, "top_k": 5.0}
    taken = SamplingParams.from_dict(nothing)
    assert (taken.stop_strings, taken.n, taken.top_k) == (("a",), 1, 5)
    with pytest.raises(UsageError, match="`stop_regex` is not offered"):
        SamplingParams.from_dict({"stop_regex": "a"})


def test_a_text_follows_one_grammar():
    assert SamplingParams().constraint is None
    assert SamplingParams(regex="é" * (MAX_GRAMMAR // 2)).constraint == (
        "regex",
        "é" * (MAX_GRAMMAR // 2),
    )
    assert SamplingParams(json_schema={"type": "string", "title": "é"}).constraint == (
        "json_schema",
        '{"type": "string", "title": "é"}',
    )
    assert SamplingParams(structural_tag={"format": {}}).constraint == (
        "structural_tag",
        '{"format": {}}',
    )
    assert SamplingParams(json_schema="$$ANY$$").constraint == ("json_schema", '{"type": "object"}')
    with pytest.raises(UsageError, match="regex and ebnf") as refusal:
        SamplingParams(regex="a", ebnf="b")
    assert refusal.value.code == "E_SAMPLING"


def test_parameters_are_checked_without_torch(run_python):
    code = (
        "import sys, qtool.engine.sampling_params; print(*sys.modules.keys() & {'torch', "
        "'numpy', 'transformers', 'xgrammar'})"
    )
    assert run_python(code) == ""


@pytest.mark.parametrize("name", sorted(RANGES))
def test_http_and_engine_have_the_same_bounds(name):
    """Both take and refuse the same numbers: at each bound, and on both sides of it."""
    from pydantic import ValidationError

    from qtool.serve.api.protocol import CompletionRequest, GenerateRequest

    def engine_takes(value):
        try:
            SamplingParams.from_dict({"max_new_tokens": None, name: value})
        except UsageError:
            return False
        return True

    def http_takes(make):
        try:
            make()
        except ValidationError:
            return False
        return True

    for bound in RANGES[name]:
        step = 1 if name in WHOLE else 1e-6
        for value in (bound - step, bound, bound + step):
            if (name, value) in (("top_k", 0), ("max_new_tokens", 0)):
                continue  # what vLLM and OpenAI mean by 0, SGLang calls otherwise
            native = {"text": "a", "sampling_params": {name: value}}
            assert http_takes(lambda body=native: GenerateRequest(**body)) == engine_takes(value), (
                value
            )
            if name not in ("max_new_tokens", "min_new_tokens", "sampling_seed"):
                openai = {"prompt": "a", name: value}
                assert http_takes(lambda body=openai: CompletionRequest(**body)) == engine_takes(
                    value
                ), value


@pytest.mark.parametrize(
    "fields",
    [
        *({"stop": value} for value in ("", "x", "x" * 1024, "x" * 1025, ["x"] * 64, ["x"] * 65)),
        *(
            {name: value}
            for name in ("regex", "ebnf", "json_schema")
            for value in ("", "a", "a" * MAX_GRAMMAR, "é" * (MAX_GRAMMAR // 2 + 1))
        ),
        *({"logit_bias": {key: 1}} for key in ("0", str(2**31 - 1), str(2**31), "9" * 10)),
        *({"logit_bias": {"1": value}} for value in (-100, 100, 100.1)),
        *({"stop_token_ids": [value]} for value in (0, 2**31 - 1, 2**31)),
    ],
    ids=lambda fields: str(fields)[:40],
)
def test_http_and_engine_take_the_same_texts_and_tokens(fields):
    from pydantic import ValidationError

    from qtool.serve.api.protocol import CompletionRequest, GenerateRequest

    def is_taken(make, refused):
        try:
            make()
        except refused:
            return False
        return True

    expected = is_taken(lambda: SamplingParams.from_dict(fields), UsageError)
    native = {"text": "a", "sampling_params": fields}
    assert is_taken(lambda: GenerateRequest(**native), ValidationError) == expected
    openai = {"prompt": "a", **fields}
    assert is_taken(lambda: CompletionRequest(**openai), ValidationError) == expected


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_openai_asks_for_no_more_tokens_than_the_engine_gives(name):
    from pydantic import ValidationError

    from qtool.serve.api.protocol import ChatRequest

    messages = [{"role": "user", "content": "a"}]
    most = RANGES["max_new_tokens"][1]
    ChatRequest(messages=messages, **{name: most})
    for value in (0, most + 1):
        with pytest.raises(ValidationError):
            ChatRequest(messages=messages, **{name: value})
