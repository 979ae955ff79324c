"""Each style of tool calls: what the assistant part of its published template writes is read back
as thoughts, content and calls, whole and cut at every character; structural tags hold it.
"""

from __future__ import annotations

import dataclasses
import json
import re
import time

import jinja2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from qtool.engine.grammar import Compiler
from qtool.serve.api.answer_reader import AnswerForm, AnswerReader
from qtool.serve.api.protocol import NamedTool, Tool
from qtool.serve.api.reasoning import styles as reasoning
from qtool.serve.api.tools import styles as tool_styles
from qtool.serve.api.tools.choice import choose
from qtool.serve.api.tools.deltas import fold
from qtool.serve.api.tools.parsers import call_tag

PARAMETERS = {
    "type": "object",
    "properties": {
        "text": {"type": "string"},
        "count": {"type": "integer"},
        "half": {"anyOf": [{"type": "number"}, {"type": "null"}]},
        "sure": {"type": "boolean"},
        "list": {"type": "array", "items": {"type": "string"}},
        "map": {"$ref": "#/$defs/Map"},
    },
    "$defs": {"Map": {"type": "object"}},
}
TOOLS = [
    Tool.model_validate({"type": "function", "function": {"name": name, "parameters": PARAMETERS}})
    for name in ("write_file", "f.g-1")
]
NAMES = [tool.function.name for tool in TOOLS]

CALLS = "{% for call in calls %}"
END = "{% endfor %}"
JSON_CALL = '{"name": "{{ call.name }}", "arguments": {{ call.arguments | tojson }}}'
ARRAY = f"[{CALLS}{JSON_CALL}{{% if not loop.last %}}, {{% endif %}}{END}]"
ITEMS = "{% for key, value in call.arguments.items() %}"
RAW = "{{ value if value is string else value | tojson }}"
THINK = "{% if thoughts %}<think>\n{{ thoughts }}\n</think>\n\n{% endif %}{{ content }}"
GEMMA = """{% macro show(value) %}{% if value is string %}Q{{ value }}Q{% elif value is mapping
 %}{ {%- for key, one in value.items() %}{{ key }}:{{ show(one) }}{% if not loop.last %},{% endif
 %}{% endfor -%} }{% elif value is sequence %}[{% for one in value %}{{ show(one) }}{% if not
 loop.last %},{% endif %}{% endfor %}]{% else %}{{ value | tojson }}{% endif %}{% endmacro
 %}{{ content }}{% for call in calls %}BEGINcall:{{ call.name }}{{ show(call.arguments) }}END{%
 endfor %}"""
# The assistant parts of published templates: style of calls, style of thoughts, template.
TEMPLATES = {
    "Qwen3": ("hermes", "qwen3", (
        THINK + CALLS + "\n<tool_call>\n" + JSON_CALL + "\n</tool_call>" + END
    )),
    "Qwen3-Coder": ("qwen3_coder", "qwen3", (
        THINK + CALLS + "\n<tool_call>\n<function={{ call.name }}>\n" + ITEMS
        + "<parameter={{ key }}>\n" + RAW + "\n</parameter>\n" + END
        + "</function>\n</tool_call>" + END
    )),
    "Seed-OSS": ("seed_oss", "seed_oss", (
        "{% if thoughts %}\n<seed:think>{{ thoughts }}</seed:think>{% endif %}"
        "{% if content %}\n{{ content }}\n{% endif %}" + CALLS
        + "\n<seed:tool_call>\n<function={{ call.name }}>\n" + ITEMS
        + "<parameter={{ key }}>" + RAW + "</parameter>\n" + END
        + "</function>\n</seed:tool_call>" + END
    )),
    "GLM-4.6": ("glm45", "glm45", (
        "{% if thoughts %}\n<think>{{ thoughts }}</think>\n{% endif %}{{ content }}" + CALLS
        + "\n<tool_call>{{ call.name }}\n" + ITEMS + "<arg_key>{{ key }}</arg_key>\n<arg_value>"
        + RAW + "</arg_value>\n" + END + "</tool_call>" + END
    )),
    "GLM-4.7": ("glm47", "glm45", (
        "{% if thoughts %}<think>{{ thoughts }}</think>{% endif %}{{ content }}" + CALLS
        + "<tool_call>{{ call.name }}" + ITEMS + "<arg_key>{{ key }}</arg_key><arg_value>" + RAW
        + "</arg_value>" + END + "</tool_call>" + END
    )),
    "MiniMax-M2": ("minimax_m2", "minimax_m2", (
        "{{ thoughts }}\n</think>\n\n{{ content }}\n<minimax:tool_call>\n" + CALLS
        + '<invoke name="{{ call.name }}">\n' + ITEMS + '<parameter name="{{ key }}">' + RAW
        + "</parameter>\n" + END + "</invoke>\n" + END + "</minimax:tool_call>"
    )),
    "Llama-3.1": ("llama3_json", None, (
        '{{ content }}{% for call in calls %}<|python_tag|>{"name": "{{ call.name }}", '
        '"parameters": {{ call.arguments | tojson }}}' + END
    )),
    "Gemma-3": ("pythonic", None, (
        "[" + CALLS + "{{ call.name }}(" + ITEMS
        + "{{ key }}={{ value | tojson }}{% if not loop.last %}, {% endif %}" + END
        + "){% if not loop.last %}, {% endif %}" + END + "]"
    )),
    "OLMo-3": ("olmo3", "olmo3", (
        "{{ thoughts }}</think>{{ content }}<function_calls>" + CALLS + "{{ call.name }}(" + ITEMS
        + "{{ key }}={{ value | tojson }}{% if not loop.last %}, {% endif %}" + END + ")\n" + END
        + "</function_calls>"
    )),
    "Mistral-7B-v0.3": ("mistral", None, "{{ content }}[TOOL_CALLS] " + ARRAY),
    "Mistral-Small-3.1": ("mistral_v11", None, (
        "{{ content }}" + CALLS
        + "[TOOL_CALLS]{{ call.name }}[CALL_ID]123456789[ARGS]{{ call.arguments | tojson }}" + END
    )),
    "Magistral": ("mistral_v11", "mistral", (
        "{% if thoughts %}[THINK]{{ thoughts }}[/THINK]{% endif %}{{ content }}" + CALLS
        + "[TOOL_CALLS]{{ call.name }}[ARGS]{{ call.arguments | tojson }}" + END
    )),
    "DeepSeek-V3-0324": ("deepseekv3", None, (
        "{{ content }}<｜tool▁calls▁begin｜>" + CALLS
        + "{% if not loop.first %}\n{% endif %}<｜tool▁call▁begin｜>function<｜tool▁sep｜>"
        "{{ call.name }}\n```json\n{{ call.arguments | tojson }}\n```<｜tool▁call▁end｜>" + END
        + "<｜tool▁calls▁end｜>"
    )),
    "DeepSeek-V3.1": ("deepseekv31", "deepseek_r1", (
        "{{ thoughts }}</think>{{ content }}<｜tool▁calls▁begin｜>" + CALLS
        + "<｜tool▁call▁begin｜>{{ call.name }}<｜tool▁sep｜>{{ call.arguments | tojson }}"
        "<｜tool▁call▁end｜>" + END + "<｜tool▁calls▁end｜>"
    )),
    "DeepSeek-V3.2": ("deepseekv32", "deepseek_r1", (
        "{{ thoughts }}</think>{{ content }}\n\n<｜DSML｜function_calls>" + CALLS
        + '\n<｜DSML｜invoke name="{{ call.name }}">\n' + ITEMS
        + "{% if not loop.first %}\n{% endif %}<｜DSML｜parameter name=\"{{ key }}\" string=\""
        "{{ 'true' if value is string else 'false' }}\">" + RAW + "</｜DSML｜parameter>" + END
        + "\n</｜DSML｜invoke>" + END + "\n</｜DSML｜function_calls>"
    )),
    "Kimi-K2-Thinking": ("kimi_k2", "kimi_k2", (
        "<think>{{ thoughts }}</think>{{ content }}<|tool_calls_section_begin|>" + CALLS
        + "<|tool_call_begin|>functions.{{ call.name }}:{{ loop.index0 }}"
        "<|tool_call_argument_begin|>{{ call.arguments | tojson }}<|tool_call_end|>" + END
        + "<|tool_calls_section_end|>"
    )),
    "gpt-oss": ("gpt-oss", "gpt-oss", (
        "{% if thoughts %}<|channel|>analysis<|message|>{{ thoughts }}<|end|><|start|>assistant"
        "{% endif %}{% if content %}<|channel|>commentary<|message|>{{ content }}<|end|><|start|>"
        "assistant{% endif %}" + CALLS
        + "{% if not loop.first %}<|start|>assistant{% endif %}<|channel|>commentary to=functions."
        "{{ call.name }} <|constrain|>json<|message|>{{ call.arguments | tojson }}<|call|>" + END
    )),
    "Granite-3.3": ("granite", "granite", (
        "{% if thoughts %}Here is my thought process:\n{{ thoughts }}\n\nHere is my response:\n"
        "{% endif %}{{ content }}<|tool_call|>" + ARRAY
    )),
    "Phi-4-mini": ("phi4_mini_json", None, "{{ content }}<|tool_call|>" + ARRAY + "<|/tool_call|>"),
    "Phi-4-mini, vLLM": ("phi4_mini_json", None, "{{ content }}functools" + ARRAY),
    "FunctionGemma": ("functiongemma", None, (
        GEMMA.replace("Q", "<escape>").replace("BEGIN", "<start_function_call>")
        .replace("END", "<end_function_call>")
    )),
    "Gemma-4": ("gemma4", "gemma4", (
        "{% if thoughts %}<|channel>thought\n{{ thoughts }}\n<channel|>{% endif %}"
        + GEMMA.replace("Q", '<|"|>').replace("BEGIN", "<|tool_call>").replace(
            "END", "<tool_call|>")
    )),
    "Command-R7B": ("cohere_command4", "cohere_command3", (
        "{% if thoughts %}<|START_THINKING|>{{ thoughts }}<|END_THINKING|>{% endif %}{{ content }}"
        "<|START_ACTION|>[\n" + CALLS + '    {"tool_call_id": "{{ loop.index0 }}", '
        '"tool_name": "{{ call.name }}", "parameters": {{ call.arguments | tojson }}}'
        "{% if not loop.last %},{% endif %}\n" + END + "]<|END_ACTION|>"
    )),
    "Hunyuan-A13B": ("hunyuan_a13b", None, "{{ content }}<tool_calls>" + ARRAY + "</tool_calls>"),
    "ERNIE-4.5-Thinking": ("ernie45", "deepseek_r1", (
        "{{ thoughts }}\n</think>\n\n{{ content }}" + CALLS + "\n<tool_call>\n" + JSON_CALL
        + "\n</tool_call>\n" + END
    )),
    "xLAM-2": ("xlam", None, ARRAY),
    "Step-3": ("step3", "step3", (
        "{{ thoughts }}</think>{{ content }}<｜tool_calls_begin｜>\n" + CALLS
        + '<｜tool_call_begin｜>function<｜tool_sep｜><steptml:invoke name="{{ call.name }}">\n'
        + ITEMS + '<steptml:parameter name="{{ key }}">' + RAW + "</steptml:parameter>\n" + END
        + "</steptml:invoke><｜tool_call_end｜>\n" + END + "<｜tool_calls_end｜>"
    )),
}  # fmt: skip
ALONE = {"Gemma-3", "xLAM-2"}  # calls are the whole answer
ENVIRONMENT = jinja2.Environment(keep_trailing_newline=True)
ENVIRONMENT.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
COMPILED = {name: ENVIRONMENT.from_string(row[2]) for name, row in TEMPLATES.items()}
ARGUMENTS = {
    "text": 'Zürich "a"\n\\ {b} [c], </d>\n',
    "count": -3,
    "half": None,
    "sure": True,
    "list": ["x", "y z"],
    "map": {"k": {"deep": [1, 2.5]}},
}


def form_of(name, mode="auto"):
    tool_style, thoughts, _ = TEMPLATES[name]
    choice = choose(TOOLS, NamedTool.model_validate(mode) if isinstance(mode, dict) else mode)
    markers = None if thoughts is None else reasoning.STYLES[reasoning.style_named(thoughts)]
    return AnswerForm(
        choice=choice, tool_style=tool_styles.style_named(tool_style), markers=markers
    )


def read(form, pieces):
    """Thoughts, content, calls."""
    reader = AnswerReader(form)
    answer = fold([*map(reader.push, pieces), reader.finish()])
    calls = [(call.function.name, call.function.arguments) for call in answer.calls]
    assert reader.called == bool(calls)
    return answer.reasoning, answer.content, calls


def written(name, calls, thoughts="", content=""):
    calls = [{"name": called, "arguments": arguments} for called, arguments in calls]
    return COMPILED[name].render(calls=calls, thoughts=thoughts, content=content)


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_the_template_writes_is_read_back(name):
    calls = [(NAMES[0], ARGUMENTS), (NAMES[1], {}), (NAMES[1], {"text": ""})]
    thoughts = "I should.\n\nYes <b>." if TEMPLATES[name][1] else ""
    content = "" if name in ALONE else "Let me see <it>."
    text = written(name, calls, thoughts, content)
    whole = read(form_of(name), [text])
    assert whole[:2] == (thoughts or None, content or None)
    assert [(called, json.loads(arguments)) for called, arguments in whole[2]] == calls
    assert read(form_of(name), text) == whole


# as published templates say it where their assistant parts do not
SAID = {
    "Llama-3.1": '{"name": function name, "parameters": dictionary}',
    "Gemma-3": "[func_name1(params_name1=params_value1)]",
    "Granite-3.3": "Here is my thought process:",
    "xLAM-2": "When using tools, make calls in a single JSON array",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_published_template_shows_its_styles(name):
    template = f"{TEMPLATES[name][2]} {SAID.get(name, '')}"
    found = tool_styles.detect(template)
    if TEMPLATES[name][0] == "mistral_v11":
        assert found == "mistral_v11"
    assert tool_styles.STYLES[found].shows(template)
    assert found == tool_styles.style_named(TEMPLATES[name][0])
    thoughts = reasoning.detect(template)
    if TEMPLATES[name][1] is None:
        assert thoughts is None
    else:  # the prompt says whether an answer begins inside of thoughts
        named = reasoning.STYLES[reasoning.style_named(TEMPLATES[name][1])]
        assert reasoning.STYLES[thoughts].end == named.end


def test_calls_have_the_ids_that_templates_ask_for():
    for name, is_right in {
        "Mistral-7B-v0.3": lambda made: len(made) == 9 and made.isalnum(),
        "Mistral-Small-3.1": lambda made: made == "123456789",
        "Kimi-K2-Thinking": lambda made: made == f"functions.{NAMES[0]}:0",
    }.items():
        reader = AnswerReader(form_of(name))
        answer = fold([reader.push(written(name, [(NAMES[0], {})])), reader.finish()])
        assert is_right(answer.calls[0].id)


def test_arguments_of_text_are_streamed_while_they_are_written():
    reader = AnswerReader(form_of("Qwen3-Coder"))
    reader.push(f"<tool_call>\n<function={NAMES[0]}>\n<parameter=text>\nHel")
    assert [call.arguments for call in reader.push("lo").calls] == ["lo"]


WORDS = [
    *("<think>", "</think>", "[THINK]", "[/THINK]", "<tool_call>", "</tool_call>", "<function="),
    *("write_file", "f.g-1", ">", "</function>", "<parameter=", "</parameter>", "text", "count"),
    *("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", '<invoke name="', '">'),
    *("<minimax:tool_call>", "</minimax:tool_call>", "</invoke>", '<parameter name="', "[ARGS]"),
    *("[TOOL_CALLS]", "[CALL_ID]", "<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "function"),
    *("<｜tool▁sep｜>", "\n```json\n", "\n```", "<｜tool▁call▁end｜>", "<｜DSML｜function_calls>"),
    *('<｜DSML｜invoke name="', '<｜DSML｜parameter name="', '" string="false">', "functools"),
    *("</｜DSML｜parameter>", "</｜DSML｜invoke>", "<|tool_calls_section_begin|>"),
    *("<|tool_call_begin|>", "functions.write_file:0", "<|tool_call_argument_begin|>"),
    *("<|channel|>", "analysis", "final", "<|message|>", "<|end|>", "<|start|>", " to=functions.f"),
    *("<tool_calls>", "</tool_calls>", "<|START_ACTION|>", "<|END_ACTION|>", '[{"name": "'),
    *('{"tool_name": "', '", "parameters": {', "<｜tool_calls_begin｜>", "<｜tool_call_begin｜>"),
    *("function<｜tool_sep｜>", '<steptml:invoke name="', '<steptml:parameter name="'),
    *("</steptml:parameter>", "</steptml:invoke>", "<｜tool_call_end｜>", "<|START_THINKING|>"),
    *("<|tool_call|>", "<|tool_call>", "call:write_file", '<|"|>', "<escape>", "<tool_call|>"),
    *('{"name": "f", "arguments": ', "(", ")", "text=", "'", '"', "{", "}", "[", "]", ",", ":"),
    *("\\", "\n", " ", "<", "x", "1", "é", "True"),
]  # fmt: skip


@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=15)
@given(data=st.data())
def test_no_text_makes_a_parser_raise_or_lose_what_is_no_call(name, data):
    text = "".join(data.draw(st.lists(st.sampled_from(WORDS), max_size=20)))
    form = form_of(name)
    whole = read(form, [text])
    assert read(form, text) == whole
    if form.markers is None and not whole[2]:
        assert whole[1] == text


@pytest.mark.parametrize("name", TEMPLATES)
def test_white_space_alone_is_content(name):
    form = dataclasses.replace(form_of(name), markers=None)
    if TEMPLATES[name][0] != "gpt-oss":  # answers consist of messages there
        assert read(form, ["\n ", " "]) == (None, "\n  ", [])


@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=15)
@given(data=st.data())
def test_values_of_any_kind_come_back(name, data):
    words = st.text(st.sampled_from("ab 1\né{}[]:,'\\\""), max_size=8).map(str.strip)
    if TEMPLATES[name][0] in ("functiongemma", "gemma4"):
        words = words.filter(lambda word: word)
    values = {
        "text": words.filter(lambda word: word not in ("1", "11")),
        "count": st.integers(),
        "sure": st.booleans(),
        "list": st.lists(words, max_size=3),
    }
    arguments = {
        key: data.draw(values[key]) for key in data.draw(st.sets(st.sampled_from([*values])))
    }
    _, _, calls = read(form_of(name), [written(name, [(NAMES[0], arguments)], "Hm.")])
    assert [(called, json.loads(given)) for called, given in calls] == [(NAMES[0], arguments)]


@pytest.mark.parametrize("name", TEMPLATES)
def test_work_is_linear_in_the_text(name):
    start = written(name, [(NAMES[0], {"text": "a" * 50})], "t", "c")
    for text in (start[: len(start) // 2] + "x< " * 7_000, start * 100, "<[{" * 7_000):
        began = time.perf_counter()
        read(form_of(name), text)
        assert time.perf_counter() - began < 5


# Forced calls in the style of the model


@pytest.fixture(scope="module")
def matcher_of(tiny_model):
    """A function that compiles a structural tag for the tiny model's tokens."""
    xgrammar = pytest.importorskip("xgrammar")
    tokenizer = Tokenizer.from_file(str(tiny_model / "tokenizer.json"))
    compiler = Compiler(tokenizer, 4096, [0])
    return lambda tag: xgrammar.GrammarMatcher(compiler.compile("structural_tag", json.dumps(tag)))


FORMS = [
    name
    for name, row in TEMPLATES.items()
    if tool_styles.STYLES[tool_styles.style_named(row[0])].form
    and "," not in name  # the other marker is forced
]


AS_HELD = {  # where a tag holds less than the template may write
    "Llama-3.1": (r"}<\|python_tag\|>", "}; "),
    "Mistral-7B-v0.3": (r"\[TOOL_CALLS\] ", "[TOOL_CALLS]"),
    "Mistral-Small-3.1": (r"\[CALL_ID\]123456789", ""),
    "GLM-4.6": ("\n", ""),
    "GLM-4.7": ("\n", ""),
    "Command-R7B": (r'"tool_call_id": "\d", ', ""),
    "ERNIE-4.5-Thinking": ("\n\n", "\n"),
}


@pytest.mark.parametrize("name", FORMS)
def test_a_structural_tag_holds_what_the_template_writes(matcher_of, name):
    form = dataclasses.replace(form_of(name, "required"), state="closed")
    calls = [(NAMES[0], {"text": "a b", "count": 3}), (NAMES[1], {"text": "c"})]
    text = written(name, calls).rpartition("</think>")[2].strip().removeprefix("<|python_tag|>")
    text = re.sub(*AS_HELD.get(name, ("$^", "")), text)
    text = text.replace("</tool_call><tool_call>", "</tool_call>\n<tool_call>")
    tag = call_tag(form.choice, form.tool_style, parallel=True)
    matcher = matcher_of(tag)
    assert matcher.accept_string(text)
    assert matcher.is_completed()
    _, content, found = read(form, [text])
    assert not content
    assert [(called, json.loads(arguments)) for called, arguments in found] == calls
    for other in ("Hello", text.replace(NAMES[0], "other")):
        assert not matcher_of(tag).accept_string(other)


@pytest.mark.parametrize("name", FORMS)
def test_calls_of_strict_tools_are_held_between_text(matcher_of, name):
    form = dataclasses.replace(form_of(name, "required"), state="closed")
    call = written(name, [(NAMES[0], {"text": "a b", "count": 3})])
    call = call.rpartition("</think>")[2].strip().removeprefix("<|python_tag|>")
    call = re.sub(*AS_HELD.get(name, ("$^", "")), call)
    strict = [
        tool.model_copy(update={"function": tool.function.model_copy(update={"strict": True})})
        for tool in form.choice.tools
    ]
    tag = call_tag(choose(strict, "auto"), form.tool_style, parallel=True)
    if tag is None:  # nothing tells a call from text
        assert not any(map(call.startswith, tool_styles.STYLES[form.tool_style].markers))
        return
    for text in ("", "Hello", call, f"Well: {call}"):
        matcher = matcher_of(tag)
        assert matcher.accept_string(text) and matcher.is_completed(), text
    for other in (call.replace(NAMES[0], "other"), call.replace("count", "counted")):
        assert not matcher_of(tag).accept_string(other)


def test_a_named_call_and_one_without_parallel_calls_are_single(matcher_of):
    name = {"type": "function", "function": {"name": NAMES[1]}}
    for mode, parallel in ((name, True), ("required", False)):
        form = form_of("Qwen3", mode)
        one = written("Qwen3", [(NAMES[1], {})]).strip()
        matcher = matcher_of(call_tag(form.choice, form.tool_style, parallel=parallel))
        assert matcher.accept_string(one)
        assert not matcher.accept_string("\n" + one)
    form = form_of("Qwen3", name)
    matcher = matcher_of(call_tag(form.choice, form.tool_style, parallel=True))
    assert not matcher.accept_string(written("Qwen3", [(NAMES[0], {})]).strip())
    assert call_tag(choose(TOOLS, "auto"), "hermes", parallel=True) is None
    assert call_tag(form.choice, "pythonic", parallel=True) is None
