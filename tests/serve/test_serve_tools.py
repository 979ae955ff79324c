"""Calls in what a model writes, whatever pieces it comes in; what a request may ask for, and the
schema that forces it.
"""

from __future__ import annotations

import copy
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from qtool.errors import UsageError
from qtool.serve.api.fields import MAX_TOOLS
from qtool.serve.api.prompt import template_message
from qtool.serve.api.protocol import (
    AllowedTools,
    ChatRequest,
    Message,
    NamedTool,
    Tool,
)
from qtool.serve.api.tools.choice import choose, schema_for
from qtool.serve.api.tools.deltas import fold
from qtool.serve.api.tools.forced import NamedParser, RequiredParser
from qtool.serve.api.tools.parsers import make_parser, parser_for
from qtool.serve.api.tools.styles import detect, style_named
from qtool.serve.api.validation import describe_invalid_body

NAMES = ("weather", "f", "g.h-1")
STYLES = ("hermes", "llama3_json")  # in which a call is a JSON object
ID = re.compile(r"call_[0-9a-f]{24}")


def tool_fields(name, parameters=None, **more):
    return {
        "type": "function",
        "function": {
            "name": name,
            **({} if parameters is None else {"parameters": parameters}),
            **more,
        },
    }


def tool(name, parameters=None, **more):
    return Tool.model_validate(tool_fields(name, parameters, **more))


CALLABLE = [
    tool(
        name,
        {
            "type": "object",
            "properties": {
                "text": {"type": "string"},
                "count": {"type": "integer"},
                "half": {"type": ["number", "null"]},
                "sure": {"type": "boolean"},
                "list": {"type": "array"},
                "map": {"$ref": "#/$defs/Map"},
            },
            "$defs": {"Map": {"type": "object"}},
        },
    )
    for name in NAMES
]


def named(name):
    return NamedTool.model_validate({"type": "function", "function": {"name": name}})


def allowed(mode, *tools):
    return AllowedTools.model_validate(
        {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": list(tools)}}
    )


def parser_of(kind):
    return {"named": lambda: NamedParser("f"), "required": RequiredParser}.get(
        kind, lambda: make_parser(kind, CALLABLE)
    )()


def deltas_of(kind, pieces):
    parser = parser_of(kind)
    return [*map(parser.push, pieces), parser.finish()], parser


def read(kind, *pieces):
    """The content and the calls, without their ids, of a text that comes in pieces."""
    deltas, parser = deltas_of(kind, pieces)
    answer = fold(deltas)
    content, calls = answer.content, answer.calls
    assert parser.called == bool(calls)
    assert all(ID.fullmatch(call.id) and call.type == "function" for call in calls)
    assert len({call.id for call in calls}) == len(calls)
    return content, [(call.function.name, call.function.arguments) for call in calls]


# Whole answers

ARGUMENTS = (
    '{"city": "Zürich \\"}{ \\u00e9\\\\", "days": [1, {"a": {}}, "</tool_call>"], "x": null}'
)

ANSWERS = [
    ("hermes", "Hello <b>you</b>, 1 < 2", "Hello <b>you</b>, 1 < 2", []),
    ("hermes", " \n text with space \n", " \n text with space \n", []),
    ("hermes", "", "", []),
    ("hermes", (
        f'<tool_call>\n{{"name": "f", "arguments": '
        f'{ARGUMENTS}}}\n</tool_call>'
    ), None, [("f", ARGUMENTS)]),
    ("hermes", f'<tool_call>{{"arguments":{ARGUMENTS},"name":"f"}}</tool_call>',
     None, [("f", ARGUMENTS)]),
    ("hermes", (
        '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>\n<tool_call>\n{"name": "f", '
        '"arguments": {"a":1}}\n</tool_call>\n'
    ),
     None, [("f", "{}"), ("f", '{"a":1}')]),
    ("hermes", (
        'Let me see.\n\n<tool_call>\n{"name": "f", "arguments": '
        '{}}\n</tool_call>'
    ), "Let me see.", [("f", "{}")]),
    ("hermes", (
        'A\n<tool_call>{"name": "f", "arguments": '
        '{}}</tool_call>\nB\n'
    ), "A\n\nB", [("f", "{}")]),
    ("hermes", '\n<tool_call>{"name": "f", "arguments": {}}</tool_call>\n B', "B", [("f", "{}")]),
    ("hermes", (
        '<tool_call>{"name": "nobody", "arguments": '
        '{}}</tool_call>'
    ), None, [("nobody", "{}")]),
    ("hermes", '<tool_call>{"name": "\\u0066", "parameters": {}}</tool_call>', None, [("f", "{}")]),
    ("hermes", (
        '<tool_call>{"id": [1, "}"], "name": "f", "x": tru, "arguments": {}, "y": '
        '1}</tool_call>'
    ), None, [("f", "{}")]),
    ("hermes", '<tool_call>{"name": "f"}</tool_call>', None, [("f", "{}")]),
    ("hermes", (
        '<tool_call>{"name": "f", "arguments": "{\\"a\\": '
        '1}"}</tool_call>'
    ), None, [("f", '"{\\"a\\": 1}"')]),
    ("hermes", '<tool_call>{"name": "f", "arguments": null }</tool_call>', None, [("f", "null")]),
    # models forget brackets and markers
    ("hermes", (
        '<tool_call>{"name": "f", "arguments": {}}<tool_call>{"name": "f", "arguments": '
        '{}}'
    ), None, [("f", "{}"), ("f", "{}")]),
    ("hermes", (
        '<tool_call>{"name": "f", "arguments": {"a": 1}</tool_call><tool_call>{"name": "f", '
        '"arguments": {}}</tool_call>'
    ),
     None, [("f", '{"a": 1}'), ("f", "{}")]),
    ("hermes", (
        '<tool_call>{"name": "f", "arguments": {"a": '
        '1</tool_call>'
    ), None, [("f", '{"a": 1')]),
    # not a call: given back as it was written
    ("hermes", "<tool_call>", "<tool_call>", []),
    ("hermes", "  <tool_call>\nsorry\n</tool_call>\n", "  <tool_call>\nsorry\n</tool_call>\n", []),
    ("hermes", "a </tool_call> b", "a </tool_call> b", []),
    ("hermes", '<tool_call>{"name": "f", "arguments": ',
     '<tool_call>{"name": "f", "arguments": ', []),
    ("hermes", (
        '<tool_call>{"name": "f", "arguments": '
        '}</tool_call>'
    ), '<tool_call>{"name": "f", "arguments": }</tool_call>', []),
    ("hermes", (
        '<tool_call>{"arguments": {"a": '
        '1}}</tool_call>'
    ), '<tool_call>{"arguments": {"a": 1}}</tool_call>', []),
    ("hermes", (
        '<tool_call>{"name": "", "arguments": '
        '{}}</tool_call>'
    ), '<tool_call>{"name": "", "arguments": {}}</tool_call>', []),
    ("hermes", (
        '<tool_call>{"name": "\\ud800", "arguments": '
        '{}}</tool_call>'
    ), '<tool_call>{"name": "\\ud800", "arguments": {}}</tool_call>', []),
    ("hermes", (
        '<tool_call>x<tool_call>{"name": "f", "arguments": '
        '{}}</tool_call>'
    ), "<tool_call>x", [("f", "{}")]),
    ("hermes", (
        '<tool_<tool_call>{"name": "f", "arguments": '
        '{}}</tool_call>'
    ), "<tool_", [("f", "{}")]),
    ("llama3_json", "Hello {1} <|python_ta", "Hello {1} <|python_ta", []),
    ("llama3_json", f'{{"name": "f", "parameters": {ARGUMENTS}}}', None, [("f", ARGUMENTS)]),
    ("llama3_json", f'\n{{"type": "function", "parameters": {ARGUMENTS}, "name": "f"}}',
     None, [("f", ARGUMENTS)]),
    ("llama3_json", (
        '<|python_tag|>{"name": "f", "arguments": {}}; {"name": "weather", "parameters": {"a": '
        '1}}'
    ), None,
     [("f", "{}"), ("weather", '{"a": 1}')]),
    ("llama3_json", (
        '{"name": "f", "parameters": {}}\n<|python_tag|> {"name": "f", "parameters": {}} '
        ';\n'
    ), None, [("f", "{}"), ("f", "{}")]),
    ("llama3_json", (
        'Sure: <|python_tag|>{"name": "nobody", "parameters": '
        '{}}'
    ), "Sure:", [("nobody", "{}")]),
    ("llama3_json", '{"name": "f", "parameters": {}} ; and more', "; and more", [("f", "{}")]),
    ("llama3_json", '<|python_tag|>print("{}")', '<|python_tag|>print("{}")', []),
    # an answer in JSON is no call
    ("llama3_json", '{"name": "Ada", "parameters": {}}', '{"name": "Ada", "parameters": {}}', []),
    ("llama3_json", '{"name": "f", "age": 3}', '{"name": "f", "age": 3}', []),
    ("llama3_json", '{"name": "f"}', '{"name": "f"}', []),
    ("llama3_json", ' {"answer": [1, 2]}\n', ' {"answer": [1, 2]}\n', []),
    ("llama3_json", '[{"name": "f", "parameters": {}}]', '[{"name": "f", "parameters": {}}]', []),
    ("llama3_json", (
        'See {"name": "f", "parameters": '
        '{}}'
    ), 'See {"name": "f", "parameters": {}}', []),
    ("required", f'[{{"name": "f", "parameters": {ARGUMENTS}}}]', None, [("f", ARGUMENTS)]),
    ("required", ' [ {"name":"f","parameters":{}} ,\n{"name":"weather","parameters":{"a":[1]}} ] ',
     None, [("f", "{}"), ("weather", '{"a":[1]}')]),
    ("required", '[{"name": "f", "par', '[{"name": "f", "par', []),
    ("required", (
        '[{"name": "f", "parameters": {}}, {"name": '
        '"weat'
    ), '{"name": "weat', [("f", "{}")]),
    ("required", '[{"name": "f", "parameters": {"a": "b', None, [("f", '{"a": "b')]),
    ("required", "Sorry.", "Sorry.", []),
    ("named", ARGUMENTS, None, [("f", ARGUMENTS)]),
    ("named", '{"a', None, [("f", '{"a')]),
    ("named", "", "", []),
]  # fmt: skip


@pytest.mark.parametrize("kind, text, content, calls", ANSWERS)
def test_an_answer_is_content_and_calls(kind, text, content, calls):
    assert read(kind, text) == (content, calls)


@pytest.mark.parametrize("kind, text, content, calls", ANSWERS)
def test_one_character_at_a_time_makes_the_same_answer(kind, text, content, calls):
    assert read(kind, *text) == (content, calls)


# Any text in any pieces

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
keys = st.text(max_size=5)
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | texts
    | st.just("</tool_call>;{[<"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
objects = st.dictionaries(texts, values, max_size=3)


@st.composite
def written_calls(draw, kind):
    """One call as a model may write it, its name and the text of its arguments."""
    name = draw(st.sampled_from(NAMES))
    indent, ascii_only = draw(st.sampled_from([None, 2])), draw(st.booleans())
    arguments = json.dumps(draw(objects), indent=indent, ensure_ascii=ascii_only)
    key = "arguments" if kind == "hermes" else "parameters"
    space = draw(st.sampled_from(["", " "]))
    parts = [f'"name": "{name}"', f'"{key}":{space}{arguments}']
    text = "{" + ", ".join(draw(st.permutations(parts))) + "}"
    if kind == "hermes":
        text = f"<tool_call>\n{text}\n</tool_call>"
    return text, (name, arguments)


@st.composite
def answers(draw, kind):
    calls = draw(st.lists(written_calls(kind), max_size=3))
    joined = {
        "hermes": "\n",
        "llama3_json": draw(st.sampled_from([";", "; ", "\n", "\n;\n"])),
        "required": ", ",
    }[kind].join(text for text, _ in calls)
    return f"[{joined}]" if kind == "required" else joined, [call for _, call in calls]


PIECES = (
    *(
        "<tool_call>",
        "</tool_call>",
        "<|python_tag|>",
        '{"name": "f", ',
        '"parameters": {',
        '"arguments":',
        '"type"',
        '"name"',
        '"f"',
        "{}",
        "null",
    ),
    *'{}[]"\\:,; \n<f1é',
)
debris = st.lists(st.sampled_from(PIECES), max_size=25).map("".join)


def cut(data, text):
    places = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    return [text[start:end] for start, end in zip([0, *places], [*places, len(text)], strict=True)]


@pytest.mark.parametrize("kind", [*STYLES, "required"])
@given(data=st.data())
def test_valid_calls_come_out_word_for_word_in_any_pieces(kind, data):
    text, calls = data.draw(answers(kind))
    content, found = read(kind, *cut(data, text))
    assert found == calls
    assert content == (None if calls else text)
    assert all(isinstance(json.loads(arguments), dict) for _, arguments in found)


@pytest.mark.parametrize("kind", [*STYLES, "required", "named"])
@given(data=st.data())
def test_no_pieces_change_what_a_text_means_and_no_text_raises(kind, data):
    text = data.draw(debris)
    whole = read(kind, text)
    assert read(kind, *cut(data, text)) == whole == read(kind, *text)
    if not whole[1]:
        assert whole[0] == text  # nothing is lost, nothing is there twice


@pytest.mark.parametrize("kind", [*STYLES, "required"])
@given(data=st.data())
def test_an_answer_cut_off_anywhere_keeps_its_whole_calls(kind, data):
    text, calls = data.draw(answers(kind))
    text = text[: data.draw(st.integers(0, len(text)))]
    content, found = read(kind, *cut(data, text))
    assert len(found) <= len(calls)
    assert found[:-1] == calls[: len(found)][:-1]
    if found:
        (name, arguments), (whole_name, whole_arguments) = found[-1], calls[len(found) - 1]
        assert name == whole_name
        assert whole_arguments.startswith(arguments)
    else:
        assert content == text


@given(data=st.data(), text=texts)
@pytest.mark.parametrize("style", STYLES)
def test_text_without_calls_comes_out_as_it_is(style, data, text):
    assert read(style, *cut(data, text)) == (text, [])


# Streaming


def test_content_is_given_out_at_once_and_a_marker_never():
    parser = make_parser("hermes", CALLABLE)
    given_out = [
        parser.push(piece).content for piece in ("Hi", " there", " <tool", "_call", ">", "\n{", "x")
    ]
    assert given_out == ["Hi", " there", "", "", "", "", " <tool_call>\n{x"]


def test_arguments_are_streamed_while_they_are_written():
    deltas, _ = deltas_of(
        "hermes",
        [
            "<tool_call>\n",
            '{"name": "f", "argu',
            'ments": {"a"',
            ": [1",
            ', "}"',
            "]",
            "}",
            "}\n</tool_",
            "call>",
        ],
    )
    pieces = [[(call.index, call.name, call.arguments) for call in delta.calls] for delta in deltas]
    assert pieces == [
        [],
        [],
        [(0, "f", '{"a"')],
        [(0, None, ": [1")],
        [(0, None, ', "}"')],
        [(0, None, "]")],
        [(0, None, "}")],
        [],
        [],
        [],
    ]
    assert [call.id is not None for delta in deltas for call in delta.calls] == [
        True,
        False,
        False,
        False,
        False,
    ]


def test_arguments_written_before_the_name_come_with_it():
    deltas, _ = deltas_of(
        "hermes", ['<tool_call>{"arguments": {"a"', ": 1}, ", '"name": "f"', "}</tool_call>"]
    )
    assert [[(call.name, call.arguments) for call in delta.calls] for delta in deltas] == [
        [],
        [],
        [("f", '{"a": 1}')],
        [],
        [],
    ]


def test_an_answer_in_json_is_not_kept_back_to_its_end():
    parser = make_parser("llama3_json", CALLABLE)
    assert parser.push('{"answer": "').content == '{"answer": "'
    assert parser.push("yes").content == "yes"


def test_two_calls_in_one_piece_are_two_deltas():
    parser = RequiredParser()
    delta = parser.push('[{"name": "f", "parameters": {}}, {"name": "g", "parameters": {"a": 1}}]')
    assert [(call.index, call.name, call.arguments) for call in delta.calls] == [
        (0, "f", "{}"),
        (1, "g", '{"a": 1}'),
    ]


@pytest.mark.parametrize(
    "text",
    ["x " * 10_000, "<tool_call>{" * 2_000, "<tool_cal" * 2_400, " " * 20_000, (
        '<tool_call>{"name": "f", "arguments": {"a": '
        '"'
    ) + "x\\n" * 6_600,
     '<tool_call>{"arguments": ' + "[" * 20_000, '{"parameters": {"a": "' + "{" * 20_000,
     '<tool_call>{"name": "' + "f" * 20_000],
)  # fmt: skip
@pytest.mark.parametrize("kind", [*STYLES, "required"])
def test_twenty_thousand_pieces_are_read_as_the_whole(kind, text):
    # a reader that looked at all of it with each piece would take minutes
    assert read(kind, text) == read(kind, *text)


# Styles


def test_flags_of_both_engines_name_a_style():
    assert {name: style_named(name) for name in ("hermes", "qwen25", "llama3", "llama4_json")} == {
        "hermes": "hermes",
        "qwen25": "hermes",
        "llama3": "llama3_json",
        "llama4_json": "llama3_json",
    }
    with pytest.raises(UsageError) as caught:
        style_named("hermess")
    assert caught.value.code == "E_TOOLS"
    assert "hermes" in caught.value.hint


TEMPLATES = {
    'a json object within tags:\\n<tool_call>\\n{\\"name\\": <function-name>, \\"arguments\\": '
    "<args-json-object>}\\n</tool_call>": "hermes",
    """{{- '<tool_call>\n' }}{{- '{"name": <function-name>, "arguments": <args-dict>}\n' }}"""
    "{{- '</tool_call>' }}": "hermes",
    """{{- 'Respond in the format {"name": function name, """
    """"parameters": dictionary of argument name and its value}.' }}""": "llama3_json",
    """{{- '\\n<tool_call>\\n<function=' + tool_call.name + '>\\n<parameter=' }} "arguments" """: (
        "qwen3_coder"
    ),
    """{{ '<tool_call>' + name }}<arg_key>{{ k }}</arg_key><arg_value>{{ "arguments" }}""": "glm45",
    "{% for m in messages %}{{ m.content }}{% endfor %}": None,
    None: None,
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_template_tells_the_style(template):
    assert detect(template) == TEMPLATES[template]


def test_the_bundled_model_knows_no_tools(tiny_model):
    assert detect((tiny_model / "chat_template.jinja").read_text()) is None


# What a request asks for

F, G = (
    tool("f", {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}),
    tool("g"),
)


@pytest.mark.parametrize(
    "tools, tool_choice, mode, names",
    [
        (None, None, "none", ()),
        ([], "auto", "none", ()),
        ([F, G], None, "auto", ("f", "g")),
        ([F, G], "none", "none", ()),
        ([F, G], "required", "required", ("f", "g")),
        ([F, G], named("g"), "named", ("g",)),
        (
            [F, G],
            allowed("auto", named("g")),
            "auto",
            ("g",),
        ),
        (
            [F, G],
            allowed("required", named("g"), named("g")),
            "required",
            ("g",),
        ),
    ],
)
def test_a_choice_says_what_may_be_called(tools, tool_choice, mode, names):
    choice = choose(tools, tool_choice)
    assert (choice.mode, choice.names) == (mode, names)


def test_the_parser_fits_the_choice():
    assert parser_for(choose([F], "auto"), None) is None
    assert parser_for(choose([F], "none"), "hermes") is None
    choices = [choose([F], choice) for choice in ("auto", "required", named("f"))]
    assert [type(parser_for(choice, "hermes")).__name__ for choice in choices] == [
        *("HermesParser", "HermesParser", "HermesParser"),
    ]
    # where the style has no form, a schema is the form
    assert [type(parser_for(choice, "pythonic")).__name__ for choice in choices] == [
        *("PythonicParser", "RequiredParser", "NamedParser"),
    ]
    assert type(parser_for(choose([F], "auto"), "llama3_json")).__name__ == "LlamaParser"
    # the schema says the form, the template need not
    assert parser_for(choose([F], "required"), None) is not None


@pytest.mark.parametrize(
    "tools, tool_choice, says",
    [
        ([F, F], None, "`f` is there twice"),
        ([F], named("ff"), "'ff', which is not among the tools"),
        (None, named("f"), "'f', which is not among"),
        (None, "required", "there are no tools"),
        ([F], allowed("auto", named("g")), "'g'"),
    ],
)
def test_what_cannot_be_called_is_refused(tools, tool_choice, says):
    with pytest.raises(UsageError) as caught:
        choose(tools, tool_choice)
    assert caught.value.code == "E_TOOLS"
    assert says in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize(
    "tools, tool_choice, param, says",
    [
        ([tool_fields("a b")], None, "tools[0].function.name", "pattern"),
        ([tool_fields("f\n")], None, "tools[0].function.name", "pattern"),
        ([F, tool_fields("x" * 65)], None, "tools[1].function.name", "pattern"),
        ([tool_fields("")], None, "tools[0].function.name", "pattern"),
        ([tool_fields(f"f{i}") for i in range(MAX_TOOLS + 1)], None, "tools", "at most 128 items"),
        ([F], "always", "tool_choice", "'none', 'auto' or 'required'"),
        (
            [F],
            {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": []}},
            "tool_choice.allowed_tools.tools",
            "at least 1 item",
        ),
    ],
)
def test_what_no_request_can_hold_is_refused_by_its_field(tools, tool_choice, param, says):
    with pytest.raises(ValidationError) as caught:
        ChatRequest(
            messages=[{"role": "user", "content": "a"}], tools=tools, tool_choice=tool_choice
        )
    detail = describe_invalid_body(caught.value.errors(), ChatRequest)
    assert (detail.param, detail.type) == (param, "invalid_request_error")
    assert param in detail.message
    assert says in detail.message


def test_names_up_to_the_limit_are_taken():
    assert choose([tool("x" * 64), tool("mcp.server-1_do")], None).mode == "auto"
    assert len(choose([tool(f"f{i}") for i in range(MAX_TOOLS)], None).names) == MAX_TOOLS


# Schemas

NODE = {
    "type": "object",
    "properties": {
        "next": {"anyOf": [{"$ref": "#/$defs/Node"}, {"type": "null"}]},
        "v": {"const": {"$ref": "#/$defs/Node"}},
    },
    "required": ["next"],
}
TREE = tool(
    "grow.tree",
    {
        "type": "object",
        "properties": {"$ref": {"$ref": "#/$defs/Node"}},
        "required": ["$ref"],
        "$defs": {"Node": NODE},
    },
    strict=True,
)
LIST = tool(
    "list",
    {
        "type": "object",
        "properties": {"n": {"$ref": "#/definitions/Node"}, "again": {"$ref": "#"}},
        "required": ["n"],
        "definitions": {"Node": {"type": "integer"}},
    },
)
ALL = [F, G, TREE, LIST]
CHOICES = {
    "required": choose(ALL, "required"),
    "f": choose(ALL, named("f")),
    "g": choose(ALL, named("g")),
    "grow.tree": choose(ALL, named("grow.tree")),
}


def test_a_free_answer_has_no_schema():
    assert schema_for(choose(ALL, "auto")) is None
    assert schema_for(choose(ALL, "none")) is None


def test_the_schema_of_a_named_function_is_its_own():
    assert schema_for(CHOICES["f"]) == F.function.parameters
    assert schema_for(CHOICES["g"]) == {"type": "object", "properties": {}}


def test_definitions_of_one_name_in_two_tools_stay_apart_and_data_stays_data():
    before = copy.deepcopy(ALL)
    schema = schema_for(CHOICES["required"])
    assert schema["$defs"]["grow.tree"]["properties"]["$ref"] == {
        "$ref": "#/$defs/grow.tree/$defs/Node"
    }
    assert schema["$defs"]["grow.tree"]["$defs"]["Node"]["properties"]["v"] == {
        "const": {"$ref": "#/$defs/Node"}
    }
    assert schema["$defs"]["list"]["properties"] == {
        "n": {"$ref": "#/$defs/list/definitions/Node"},
        "again": {"$ref": "#/$defs/list"},
    }
    assert before == ALL


def test_a_schema_too_deep_to_copy_is_refused():
    deep = {}
    for _ in range(5000):
        deep = {"items": deep}
    with pytest.raises(UsageError, match="too deeply"):
        schema_for(choose([tool("f", deep)], "required"))


@pytest.fixture(scope="module")
def grammar_of(tiny_model):
    """A function that compiles a schema for the tiny model's tokens."""
    xgrammar = pytest.importorskip("xgrammar")
    from transformers import AutoTokenizer

    tokens = xgrammar.TokenizerInfo.from_huggingface(
        AutoTokenizer.from_pretrained(tiny_model), vocab_size=4096
    )
    compiler = xgrammar.GrammarCompiler(tokens)
    return lambda schema: xgrammar.GrammarMatcher(compiler.compile_json_schema(json.dumps(schema)))


ACCEPTED = [
    ("f", '{"a": 1}', [("f", '{"a": 1}')]),
    ("g", "{}", [("g", "{}")]),
    ("grow.tree", (
        '{"$ref": {"next": {"next": '
        'null}}}'
    ), [("grow.tree", '{"$ref": {"next": {"next": null}}}')]),
    ("required", '[{"name": "f", "parameters": {"a": 1}}]', [("f", '{"a": 1}')]),
    ("required", (
        '[{"name":"g","parameters":{}},{"name": "grow.tree", "parameters": {"$ref": {"next": '
        'null}}}]'
    ),
     [("g", "{}"), ("grow.tree", '{"$ref": {"next": null}}')]),
    ("required", (
        '[\n {"name": "list", "parameters": {"n": 3, "again": {"n": '
        '4}}}\n]'
    ), [("list", '{"n": 3, "again": {"n": 4}}')]),
]  # fmt: skip


@pytest.mark.parametrize("choice, text, calls", ACCEPTED)
def test_what_the_grammar_accepts_is_read_back_as_the_call(grammar_of, choice, text, calls):
    matcher = grammar_of(schema_for(CHOICES[choice]))
    assert matcher.accept_string(text)
    assert matcher.is_completed()
    parser = parser_for(CHOICES[choice], None)
    answer = fold([*map(parser.push, text), parser.finish()])
    content, found = answer.content, answer.calls
    assert content is None
    assert [(call.function.name, call.function.arguments) for call in found] == calls


@pytest.mark.parametrize(
    "text",
    [
        *("[]", "{}", '[{"name": "h"', '[{"name": "f", "parameters": {}'),
        *(
            '[{"name": "f", "parameters": {"a": "1"',
            '[{"name": "f", "parameters": {"a": 1}, "x"',
            '[{"name": "list", "parameters": {"n": {"next"',
        ),
    ],
)
def test_the_grammar_accepts_nothing_but_calls(grammar_of, text):
    assert not grammar_of(schema_for(CHOICES["required"])).accept_string(text)


def test_without_parallel_calls_there_is_one(grammar_of):
    matcher = grammar_of(schema_for(CHOICES["required"], parallel=False))
    assert matcher.accept_string('[{"name": "f", "parameters": {"a": 1}}')
    assert not matcher.accept_string(",")
    assert matcher.accept_string("]")
    assert matcher.is_completed()


# Messages for templates


def test_messages_come_as_templates_expect_them_and_the_request_stays():
    call = {
        "id": "call_1",
        "type": "function",
        "function": {"name": "f", "arguments": '{"a": [1, "é"]}'},
    }
    messages = [
        {
            "role": "system",
            "content": [{"type": "text", "text": "Be"}, {"type": "text", "text": "kind."}],
            "name": None,
        },
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
        {"role": "assistant", "tool_calls": []},
        {
            "role": "assistant",
            "content": [{"type": "refusal", "refusal": "No."}],
            "tool_calls": None,
        },
    ]
    before = copy.deepcopy(messages)
    turns = [Message.model_validate(message) for message in messages]
    assert [template_message(turn) for turn in turns] == [
        {"role": "system", "content": "Be\nkind."},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{**call, "function": {"name": "f", "arguments": {"a": [1, "é"]}}}],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
        {"role": "assistant", "content": ""},
        {"role": "assistant", "content": "No."},
    ]
    assert messages == before


@pytest.mark.parametrize(
    "arguments", ["", "{", "[1]", "3", "null", '"{}"', None, "1" * 5000, "[" * 20_000]
)
def test_arguments_that_are_no_object_become_an_empty_one(arguments):
    message = {
        "role": "assistant",
        "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": arguments}}],
    }
    turn = template_message(Message.model_validate(message))
    assert turn["tool_calls"][0]["function"]["arguments"] == {}
