"""Thoughts in what a model writes, whatever pieces it comes in."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qtool.errors import UsageError
from qtool.serve.api.answer_reader import AnswerForm, AnswerReader
from qtool.serve.api.prompt import template_message
from qtool.serve.api.protocol import Message
from qtool.serve.api.reasoning.styles import NAMES, STYLES, state_after, style_named
from qtool.serve.api.tools.choice import Choice
from qtool.serve.api.tools.deltas import fold

FREE = Choice("none", ())


def read(pieces, state="undecided", style="qwen3", choice=FREE):
    """The thoughts, the content and the names of calls of a text that comes in pieces."""
    form = AnswerForm(choice=choice, tool_style="hermes", markers=STYLES[style], state=state)
    reader = AnswerReader(form)
    answer = fold([*map(reader.push, pieces), reader.finish()])
    return answer.reasoning, answer.content, [call.function.name for call in answer.calls]


ANSWERS = [
    ("undecided", "<think>\nHm.\n\nYes.\n</think>\n\nIt is 4.\n", "Hm.\n\nYes.", "It is 4.\n"),
    ("undecided", "\n<think>a</think>b", "a", "b"),
    ("undecided", " no <think>a</think>", None, " no <think>a</think>"),
    ("undecided", "<think>\n\n</think>\n\nAt once.", None, "At once."),
    ("undecided", "<thin", None, "<thin"),
    ("undecided", " \n", None, " \n"),
    ("open", "Hm.</think>b", "Hm.", "b"),
    ("open", "\n<think>Hm.</think>b", "Hm.", "b"),  # again, though the prompt has it
    ("open", "a </thin</think> b", "a </thin", "b"),
    ("open", "cut off </th", "cut off </th", None),
    ("closed", " <think>a</think>", None, " <think>a</think>"),
]


@pytest.mark.parametrize("state, text, reasoning, content", ANSWERS)
def test_an_answer_is_thoughts_and_content_in_any_pieces(state, text, reasoning, content):
    assert read([text], state) == read(text, state) == (reasoning, content, [])


def test_a_call_ends_thoughts_where_tools_may_be_called():
    text = '<think>Ask.\n<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    assert read(text, choice=Choice("auto", ())) == ("Ask.", None, ["f"])
    assert read(text) == (text.removeprefix("<think>"), None, [])


@given(st.lists(st.sampled_from([*"<think>", "</think>", "</", "\n", "ab"])), st.data())
def test_no_text_loses_more_than_markers_and_the_space_around_them(pieces, data):
    state = data.draw(st.sampled_from(["undecided", "open", "closed"]))
    text = "".join(pieces)
    reasoning, content, _ = read(pieces, state)
    assert (reasoning, content, []) == read([text], state) == read(text, state)
    kept = (reasoning or "") + (content or "")
    lost = [text.replace("<think>", "", 1), text]
    assert "".join(kept.split()) in {
        "".join(one.split()) for some in lost for one in (some, some.replace("</think>", "", 1))
    }


def test_the_end_of_a_prompt_says_where_the_answer_begins():
    think = STYLES["qwen3"]
    for prompt, state in {
        "<|im_start|>assistant\n": "undecided",
        "<|im_start|>assistant\n<think>\n": "open",
        "<|im_start|>assistant\n<think>\n\n</think>\n\n": "closed",
        "<|im_start|>user\nWhat is <think>?<|im_end|>\n<|im_start|>assistant\n": "undecided",
    }.items():
        assert state_after(prompt, think) == state


def test_names_of_both_engines_are_taken_and_others_refused():
    assert set(map(style_named, NAMES)) <= set(STYLES)
    assert style_named("none") is None
    with pytest.raises(UsageError, match="qwen33") as caught:
        style_named("qwen33")
    assert "qwen3" in caught.value.hint


def test_thoughts_may_be_held_back_or_dropped_and_second_calls_too():
    text = "<think>a b</think>" + '<tool_call>{"name": "f", "arguments": {}}</tool_call>' * 2

    def deltas(**options):
        form = AnswerForm(
            choice=Choice("auto", ()), tool_style="hermes", markers=STYLES["qwen3"], **options
        )
        reader = AnswerReader(form)
        return [*map(reader.push, text), reader.finish()]

    assert [one.reasoning for one in deltas() if one.reasoning] == ["a", " b"]
    held = deltas(streams_reasoning=False, parallel=False)
    assert [one.reasoning for one in held if one.reasoning] == ["a b"]
    assert len(fold(held).calls) == 1
    assert fold(deltas(shows_reasoning=False)).reasoning is None


def test_thoughts_of_earlier_turns_reach_the_template_under_one_name():
    turn = Message.model_validate({"role": "assistant", "content": "b", "reasoning": "a"})
    assert template_message(turn)["reasoning_content"] == "a"
    call = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
    turn = Message.model_validate({**turn.model_dump(), "tool_calls": [call]})
    shown = template_message(turn, "{% if message.thinking %}")  # of gpt-oss
    assert (shown["thinking"], shown["content"]) == ("a\nb", "")
