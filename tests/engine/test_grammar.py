"""Text held to a grammar: what may come next, against a slow reference; and answers of the example
model, which never learned JSON.
"""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st
from support import EXAMPLE
from tokenizers import Tokenizer

from qtool.engine import grammar
from qtool.engine.answer_constraint import AnswerConstraint
from qtool.engine.detokenizer import TextStream
from qtool.engine.engine import Engine
from qtool.engine.grammar import Compiler, Constraint
from qtool.engine.outputs import CompletionError
from qtool.engine.requests import GenerateRequest
from qtool.engine.sampling_params import SamplingParams
from qtool.engine.thoughts import Thoughts
from qtool.errors import ResourceError, UsageError

pytest.importorskip("xgrammar", reason="the extra `grammar` is not installed")
pytestmark = pytest.mark.usefixtures("one_thread")
pytest_plugins = ["support.sample_plugin"]

TOKENIZER = Tokenizer.from_file(str(EXAMPLE / "tokenizer.json"))
TEXTS = [
    TOKENIZER.decode([token], skip_special_tokens=False)
    for token in range(TOKENIZER.get_vocab_size())
]
EOS, SPECIAL = 0, {0, 1, 2, 3}
VOCAB_SIZE = 4107  # more than the tokenizer has, and no multiple of 32
COMPILER = Compiler(TOKENIZER, VOCAB_SIZE, [EOS])
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 3, "maxLength": 8},
        "age": {"type": "integer", "minimum": 18, "maximum": 99},
        "kind": {"enum": ["cat", "dog"]},
        "tags": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
        "home": {
            "type": "object",
            "properties": {"zip": {"type": "string", "pattern": "^[0-9]{5}$"}},
            "required": ["zip"],
        },
    },
    "required": ["name", "age", "kind", "tags", "home"],
}
STOPPED = {"type": "stop"}


def tokens_in(mask) -> set[int]:
    return set(np.unpackbits(mask.view(np.uint8), bitorder="little").nonzero()[0].tolist())


def constraint_of(end_ids=(EOS,), compiler=COMPILER, **params) -> Constraint:
    return Constraint(compiler, SamplingParams(**params), end_ids)


def is_person(text: str) -> bool:
    person = json.loads(text)
    return (
        list(person) == ["name", "age", "kind", "tags", "home"]
        and 3 <= len(person["name"]) <= 8
        and type(person["age"]) is int
        and 18 <= person["age"] <= 99
        and person["kind"] in ("cat", "dog")
        and 1 <= len(person["tags"]) <= 3
        and all(type(tag) is bool for tag in person["tags"])
        and list(person["home"]) == ["zip"]
        and re.fullmatch("[0-9]{5}", person["home"]["zip"]) is not None
    )


# what may come next


@pytest.mark.parametrize("kind", ["json_schema", "structural_tag"])
def test_no_model_is_let_go_on_with_whitespace_for_ever(kind):
    if kind == "json_schema":
        text, start = json.dumps(PERSON), ""
    else:
        content = {"type": "json_schema", "json_schema": PERSON}
        tag = {"type": "tag", "begin": "<f>", "content": content, "end": "</f>"}
        text, start = json.dumps({"type": "structural_tag", "format": tag}), "<f>"
    compiled = COMPILER.compile(kind, text)
    for begin in ("{", '{"name"', '{"name":', '{"name": "abc"', '{"name": "abc", '):
        matcher = grammar._xgrammar().GrammarMatcher(compiled)
        assert matcher.accept_string(start + begin)
        count = begin.endswith(" ")
        while matcher.accept_string(" "):
            count += 1
            assert count <= grammar.MAX_WHITESPACE


@settings(max_examples=20)
@given(
    st.sampled_from(
        ["[a-z]+", "(ab|abc|def )*x", "[0-9]{2,4}", "(yes|no)!?", "[ -~]{0,6}", "[ -~]*"]
    ),
    st.integers(0, 99),
    st.integers(0, 4),
)
def test_masks_are_those_of_the_regex(pattern, seed, least):
    constraint = constraint_of(regex=pattern, min_new_tokens=least)
    generator, text = np.random.default_rng(seed), ""
    follow = following(pattern, text)
    for position in range(5):
        ends = {EOS} if regex.fullmatch(pattern, text) and position >= least else set()
        assert tokens_in(constraint.mask) == follow | ends
        token = int(generator.choice(sorted(follow | ends)))
        if token == EOS:
            assert constraint.accept(EOS)
            break
        text += TEXTS[token]
        follow = following(pattern, text)
        assert constraint.accept(token) == (not follow)
        if not follow:
            break


def following(pattern: str, text: str) -> set[int]:
    """The tokens with which ``text`` is still the beginning of a match."""
    some = {
        token: new
        for token, new in enumerate(TEXTS)
        if new and token not in SPECIAL and "\N{REPLACEMENT CHARACTER}" not in new
    }
    return {
        token for token, new in some.items() if regex.fullmatch(pattern, text + new, partial=True)
    }


def test_an_end_token_comes_only_where_the_grammar_is_complete():
    x, y = TOKENIZER.token_to_id("Q"), TOKENIZER.token_to_id("Z")
    constraint = constraint_of(regex="QZ?", end_ids=[EOS, 2, y])
    assert tokens_in(constraint.mask) == {x}
    assert not constraint.accept(x)
    assert tokens_in(constraint.mask) == {EOS, 2, y}
    assert constraint.accept(2)
    # text, which ends the answer as a stop string does
    assert tokens_in(constraint_of(regex="ZQ", end_ids=[EOS, y]).mask) == {y}
    # with ignore_eos it is no end token
    assert EOS not in tokens_in(constraint_of(regex="Q*", end_ids=[]).mask)


def test_special_tokens_are_text_for_structural_tags_only():
    assert tokens_in(constraint_of(regex=r"<\|im_start\|>.*").mask).isdisjoint(SPECIAL)
    tag = {"type": "structural_tag", "format": {"type": "const_string", "value": "<|im_start|>"}}
    assert 1 in tokens_in(constraint_of(structural_tag=tag).mask)


@pytest.mark.parametrize(
    ("params", "says"),
    [
        ({"json_schema": "{"}, "json_schema: Failed to parse JSON: syntax error at line 1 near: ."),
        ({"json_schema": {"type": "objct"}}, 'json_schema: Unsupported type "objct"'),
        ({"json_schema": "false"}, "cannot accept any value"),
        (
            {"regex": "(a"},
            "regex: Regex parsing error at position 3: The parenthesis is not closed.",
        ),
        (
            {"ebnf": "root ::= x"},
            'ebnf: EBNF parser error at line 1, column 10: Rule "x" is not defined',
        ),
        (
            {"structural_tag": "{}"},
            "structural_tag: Invalid structural tag error: Structural tag must have a format field",
        ),
        ({"ebnf": 'root ::= ""'}, "no text but the empty one"),
        ({"ebnf": "root ::= root"}, "no token of the model continues the text"),
    ],
)
def test_a_broken_grammar_says_what_is_wrong(params, says):
    with pytest.raises(UsageError, match=re.escape(says)) as refusal:
        constraint_of(**params)
    assert refusal.value.code == "E_GRAMMAR" and refusal.value.hint
    assert "/" not in refusal.value.message  # where in its source xgrammar found it


def test_a_missing_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "xgrammar", None)
    with pytest.raises(ResourceError) as refusal:
        Compiler(TOKENIZER, VOCAB_SIZE, [EOS]).compile("regex", "a")
    assert (
        refusal.value.code == "E_NO_XGRAMMAR"
        and refusal.value.hint == "pip install 'qtool[grammar]'"
    )


def test_the_cache_keeps_what_was_used_last(monkeypatch):
    size = Compiler(TOKENIZER, VOCAB_SIZE, [EOS]).compile("regex", "[a-f]").memory_size_bytes
    monkeypatch.setattr(grammar, "CACHE_BYTES", 3 * size)
    compiler = Compiler(TOKENIZER, VOCAB_SIZE, [EOS])
    first = compiler.compile("regex", "[a-f]")
    assert compiler.compile("regex", "[a-f]") is first
    for letter in "ghi":
        compiler.compile("regex", f"[a-{letter}]")
        assert compiler.compile("regex", "[a-f]") is first
    assert len(compiler._kept) < 4


@pytest.mark.exhaustive
def test_a_grammar_compiled_in_another_process_is_used(monkeypatch):
    code = (
        "import json, sys; from qtool.engine.grammar import load, compile_to_json\n"
        "given = json.load(sys.stdin); load(*given[0]); print(compile_to_json(*given[1]))"
    )
    constraint = ("json_schema", json.dumps(PERSON))
    setup = json.dumps([[TOKENIZER.to_str(), VOCAB_SIZE, [EOS]], constraint])
    compiled = subprocess.run(
        [sys.executable, "-c", code], input=setup, capture_output=True, text=True, check=True
    ).stdout
    compiler = Compiler(TOKENIZER, VOCAB_SIZE, [EOS])
    compiler.take(*constraint, compiled)
    monkeypatch.setattr(
        compiler, "_compiled", lambda kind, text: pytest.fail("it was compiled again")
    )
    assert (
        constraint_of(compiler=compiler, json_schema=PERSON).mask
        == constraint_of(json_schema=PERSON).mask
    ).all()


def test_a_grammar_that_takes_too_long_ends_its_text(monkeypatch):
    monkeypatch.setattr(grammar, "GRACE_S", 0.05)
    monkeypatch.setattr(grammar, "TOKEN_S", 0.0)
    constraint = constraint_of(ebnf='root ::= root root | "x"')
    with pytest.raises(UsageError, match="too long") as refusal:
        for _ in range(2000):
            constraint.accept(TOKENIZER.token_to_id("x"))
    assert refusal.value.code == "E_GRAMMAR"


# answers of the engine


# thoughts before the answer


def answer_constraint_of(start, end, **params) -> tuple[AnswerConstraint, TextStream]:
    given = SamplingParams(**params, reasoning_start=start, reasoning_end=end)
    text = TextStream(TOKENIZER, given)
    inner = Constraint(COMPILER, given, [EOS])
    return AnswerConstraint(inner, text.thoughts, TOKENIZER, start, end), text


def follow(constraint, text, tokens) -> list[bool]:
    ended = []
    for token in tokens:
        text.push(token)
        ended.append(constraint.accept(token))
    return ended


def test_a_grammar_holds_what_follows_the_thoughts():
    constraint, text = answer_constraint_of(None, "##", regex="QZ", stop=["a"])
    thoughts = TOKENIZER.encode("a b = #").ids
    assert constraint.masks_along([*thoughts, *thoughts]) == [None] * (len(thoughts))
    assert not any(follow(constraint, text, thoughts))
    assert constraint.mask is None
    assert follow(constraint, text, TOKENIZER.encode("#").ids) == [False]
    q, z = TOKENIZER.token_to_id("Q"), TOKENIZER.token_to_id("Z")
    assert tokens_in(constraint.mask) == {q}
    assert follow(constraint, text, [q, z]) == [False, True]
    assert (text.finish(), text.thoughts.tokens) == ("a b = ##QZ", len(thoughts) + 1)


@pytest.mark.parametrize("end", ["##", "#漢"])
def test_drafts_stop_where_thoughts_may_end(end):
    constraint, _ = answer_constraint_of(None, end, regex="QZ")
    letter, (*half, last) = TOKENIZER.token_to_id("Q"), TOKENIZER.encode("漢").ids
    assert half  # a token for each byte: text that comes with the first is held till the last
    for token in (TOKENIZER.encode(end[-1]).ids[0], half[0], last):
        assert constraint.masks_along([letter, letter, token, letter]) == [None] * 3


def test_a_text_may_begin_with_thoughts_or_with_the_answer():
    q, z = TOKENIZER.token_to_id("Q"), TOKENIZER.token_to_id("Z")
    marker = TOKENIZER.encode("def f").ids
    assert len(marker) == 2
    constraint, text = answer_constraint_of("def f", "#", regex="QZ")
    assert tokens_in(constraint.mask) == {q, marker[0]}
    assert follow(constraint, text, marker[:1]) == [False]
    assert tokens_in(constraint.mask) == {marker[1]}  # a marker that began is completed
    follow(constraint, text, [marker[1], z, *TOKENIZER.encode("#").ids])
    assert tokens_in(constraint.mask) == {q}
    constraint, text = answer_constraint_of("def f", "#", regex="QZ")
    assert follow(constraint, text, [q, z]) == [False, True]
    assert (text.finish(), text.thoughts.tokens) == ("QZ", 0)


def test_what_follows_a_call_is_not_counted_as_thoughts():
    text = TextStream(TOKENIZER, SamplingParams(reasoning_end="##", reasoning_calls=["call("]))
    before = TOKENIZER.encode("a call(").ids
    for token in [*before, *TOKENIZER.encode("x)").ids]:
        text.push(token)
    assert text.thoughts.tokens == len(before)


@given(st.lists(st.sampled_from(["<t>", "</t>", "a", "</", " ", "\n"])), st.data())
def test_thoughts_end_at_the_same_place_in_any_pieces(pieces, data):
    start = data.draw(st.sampled_from([None, "<t>"]))
    text = "".join(pieces)
    whole = Thoughts(start, ["</t>", "a"])
    thoughts, answer = whole.push(text)
    answer += whole.flush()[1]
    assert thoughts + answer == text
    for cut in (pieces, text):
        one = Thoughts(start, ["</t>", "a"])
        parts = [*map(one.push, cut), one.flush()]
        assert "".join(part[0] for part in parts) == thoughts
        assert "".join(part[1] for part in parts) == answer


@pytest.fixture(scope="module", params=[False, True], ids=["", "overlapping"])
def engine(request):
    with Engine(EXAMPLE, dtype="float32", max_total_tokens=8192) as engine:
        engine.loop.overlap = request.param  # True is what a GPU does
        yield engine


def test_answers_follow_their_grammar_and_others_are_as_alone(engine):
    kinds = [
        ({"json_schema": PERSON}, is_person),
        ({"regex": "[a-z]{3,9}( [0-9]+)?\n"}, re.compile("[a-z]{3,9}( [0-9]+)?\n").fullmatch),
        (
            {"ebnf": 'root ::= word ("," word){2,4}\nword ::= "yes" | "no"'},
            re.compile("(yes|no)(,(yes|no)){2,4}").fullmatch,
        ),
        (
            {
                "structural_tag": {
                    "type": "structural_tag",
                    "format": {"type": "regex", "pattern": "[A-Z]{4}"},
                }
            },
            re.compile("[A-Z]{4}").fullmatch,
        ),
        ({}, lambda text: True),
    ]
    asked = [
        {"temperature": 1.0, "seed": seed, "max_new_tokens": 400 if params else 30, **params}
        for seed in range(3)
        for params, _ in kinds
    ]
    results = engine.generate(["def f("] * len(asked), asked)
    ended = set()
    for number, (result, (params, follows)) in enumerate(zip(results, kinds * 3, strict=True)):
        if result["meta_info"]["finish_reason"]["type"] == "stop":
            ended.add(number % len(kinds))
            assert follows(result["text"]), (params, result["text"])
    assert ended >= {0, 1, 2, 3}  # one of each kind at least: a number may go on to the last token
    for params, result in list(zip(asked, results, strict=True))[:5]:
        assert engine.generate("def f(", params)["output_ids"] == result["output_ids"]


def test_an_answer_follows_its_grammar_and_the_thoughts_before_it_do_not(engine):
    params = {"temperature": 0, "max_new_tokens": 60, "stop": "self"}
    free = engine.generate("def f(self", {**params, "stop": "\n"})["text"]
    held = engine.generate("def f(self", {**params, "reasoning_end": "\n", "regex": "[A-Z]{4}"})
    assert re.fullmatch(re.escape(free) + r"\n *[A-Z]{4}", held["text"])
    assert held["meta_info"]["finish_reason"] == STOPPED


def test_any_object(engine):
    texts = [
        result["text"]
        for result in engine.generate(
            ['x = {"a": 1}\ny = {"'] * 4,
            {"seed": 1, "max_new_tokens": 300, "json_schema": "$$ANY$$"},
        )
        if result["meta_info"]["finish_reason"]["type"] == "stop"
    ]
    assert texts
    assert all(isinstance(json.loads(text), dict) for text in texts)


def test_a_text_ends_as_soon_as_nothing_can_follow(engine):
    for params in ({}, {"ignore_eos": True}, {"min_new_tokens": 20}, {"max_new_tokens": 1}):
        result = engine.generate("def f(", {"temperature": 0, "regex": "x", **params})
        assert (result["text"], result["meta_info"]["finish_reason"]) == ("x", STOPPED)
    ended = engine.generate(
        "def f(", {"seed": 3, "regex": "(x?)+", "logit_bias": {EOS: 100}, "max_new_tokens": 20}
    )
    assert (
        ended["meta_info"]["finish_reason"] == {"type": "stop", "matched": EOS}
        and ended["text"] == ""
    )
    most = engine.generate(
        "def f(", {"seed": 3, "regex": "x+", "ignore_eos": True, "max_new_tokens": 20}
    )
    assert most["meta_info"]["finish_reason"] == {"type": "length", "length": 20}
    stop = engine.generate("def f(", {"seed": 3, "regex": "ab(ab)+", "stop": "ba"})
    assert (
        stop["meta_info"]["finish_reason"] == {"type": "stop", "matched": "ba"}
        and stop["text"] == "a"
    )


def test_penalties_biases_and_logprobs_go_with_a_grammar(engine):
    params = {
        "seed": 5,
        "json_schema": PERSON,
        "max_new_tokens": 300,
        "repetition_penalty": 1.3,
        "presence_penalty": 1,
        "top_p": 0.9,
        "min_p": 0.01,
    }
    params["logit_bias"] = dict.fromkeys(range(100, 200), -20)
    results = engine.generate(
        ["def f("] * 3,
        [{**params, "seed": seed} for seed in range(3)],
        return_logprob=True,
        top_logprobs_num=2,
    )
    for result in results:
        assert result["meta_info"]["finish_reason"] == STOPPED and is_person(result["text"])
        assert len(result["meta_info"]["output_token_logprobs"]) == len(result["output_ids"])
    model, _, _ = engine.generate(
        "def f(", {"temperature": 0, "max_new_tokens": 1}, return_logprob=True
    )["meta_info"]["output_token_logprobs"][0]
    first = results[0]["meta_info"]
    # the model's own, whatever may come
    assert first["output_top_logprobs"][0][0][0] == pytest.approx(model, abs=1e-4)


def test_several_answers_to_one_prompt(engine):
    params = {"n": 3, "seed": 7, "regex": "[a-z]{4,12}", "max_new_tokens": 20}
    texts = [result["text"] for result in engine.generate("def ", params)]
    assert len(set(texts)) == 3 and all(re.fullmatch("[a-z]{4,12}", text) for text in texts)
    assert texts == [
        result["text"] for result in asyncio.run(engine.async_generate("def ", params))
    ]
    assert texts[0] == engine.generate("def ", {**params, "n": 1})["text"]
    parts = list(engine.generate("def ", {**params, "n": 1}, stream=True))
    assert (
        parts[-1]["text"] == texts[0] and parts[-1]["meta_info"]["finish_reason"]["type"] == "stop"
    )


def test_a_preempted_text_goes_on_in_its_grammar(engine):
    asked = [
        {
            "seed": seed,
            "max_new_tokens": 50,
            "regex": "([a-z]{2,5} ){20,30}",
            **({"presence_penalty": 1} if seed % 2 else {}),
        }
        for seed in range(6)
    ]
    alone = [engine.generate("def f(", params)["output_ids"] for params in asked]
    with Engine(EXAMPLE, dtype="float32", max_total_tokens=256, chunked_prefill_size=16) as small:
        small.loop.overlap = engine.loop.overlap
        assert [result["output_ids"] for result in small.generate(["def f("] * 6, asked)] == alone
        assert small.loop.scheduler.preemptions > 0


def test_a_grammar_that_fails_on_its_way_harms_nobody(engine, monkeypatch):
    monkeypatch.setattr(grammar, "GRACE_S", -1.0)
    other = {"temperature": 0, "max_new_tokens": 30}
    wanted = engine.generate("import os", other)["text"]
    delivered = []
    slow = GenerateRequest("def f(", {"regex": "[a-z]{20,30}"}, None, stream=False)
    requests = engine.submit(slow, delivered.append)
    assert engine.generate("import os", other)["text"] == wanted
    while not all(request.done for request in requests):
        pass
    [output] = delivered
    assert output.index == 0 and isinstance(output, CompletionError)
    assert isinstance(output.error, UsageError) and output.error.code == "E_GRAMMAR"


def test_a_grammar_needs_a_tokenizer():
    with (
        Engine(EXAMPLE, dtype="float32", max_total_tokens=256, skip_tokenizer_init=True) as engine,
        pytest.raises(UsageError, match="needs a tokenizer") as refusal,
    ):
        engine.generate(input_ids=[5], sampling_params={"regex": "a"})
    assert refusal.value.code == "E_SAMPLING"
