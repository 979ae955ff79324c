from __future__ import annotations

import asyncio
import json
import os
import time

import psutil
import pytest
from transformers import AutoTokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from qtool.errors import CheckpointRefused, UsageError
from qtool.serve.prompts.templates import (
    MAX_TEMPLATE_BYTES,
    ChatTemplate,
    Templates,
    find_special_tokens,
    find_template,
)

# Templates in the ways of well-known models, each with what is peculiar to it.
LIKE = {
    "chatml": "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "llama 2": """
{%- if messages[0].role == 'system' -%}
  {%- set system = '<<SYS>>\\n' ~ messages[0].content ~ '\\n<</SYS>>\\n\\n' -%}{%- set turns = messages[1:] -%}
{%- else -%}
  {%- set system = '' -%}{%- set turns = messages -%}
{%- endif -%}
{%- for turn in turns -%}
  {%- if (turn.role == 'user') != (loop.index0 % 2 == 0) -%}{{ raise_exception('roles must alternate user/assistant/user/...') }}{%- endif -%}
  {%- if turn.role == 'user' -%}
    {{ bos_token ~ '[INST] ' ~ (system if loop.first else '') ~ turn.content.strip() ~ ' [/INST]' }}
  {%- else -%}
    {{ ' ' ~ turn.content.strip() ~ ' ' ~ eos_token }}
  {%- endif -%}
{%- endfor -%}""",
    "llama 3.1": """
{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}{%- set date_string = strftime_now('%d %b %Y') %}{%- else %}{%- set date_string = '26 Jul 2024' %}{%- endif %}
{%- endif %}
{%- set system = '' %}
{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content'] | trim %}{%- set messages = messages[1:] %}{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' }}
{%- if tools is not none %}{{- 'Environment: ipython\\n' }}{%- endif %}
{{- 'Today Date: ' + date_string + '\\n\\n' + system + '<|eot_id|>' }}
{%- if tools is not none and tools_in_user_message | default(true) %}
    {{- '<|start_header_id|>user<|end_header_id|>\\n\\nAnswer with JSON for a function call.\\n\\n' }}
    {%- for tool in tools %}{{- tool | tojson(indent=4) + '\\n\\n' }}{%- endfor %}
{%- endif %}
{%- for message in messages %}
    {%- if message.tool_calls is defined and message.tool_calls %}
        {%- if message.tool_calls | length != 1 %}{{- raise_exception('This model takes one tool call at a time') }}{%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n{"name": "' + call.name + '", "parameters": ' + (call.arguments | tojson) + '}' }}
    {%- elif message.role in ['tool', 'ipython'] %}
        {{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' + (message.content if message.content is string else message.content | tojson) }}
    {%- else %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim }}
    {%- endif %}
    {{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}
""",
    "qwen 2.5": """
{%- if tools %}
    {{- '<|im_start|>system\\n' + (messages[0].content if messages[0].role == 'system' else 'You are helpful.') }}
    {{- '\\n\\n# Tools\\n\\nFunctions are within <tools></tools> tags:\\n<tools>' }}
    {%- for tool in tools %}{{- '\\n' + tool | tojson }}{%- endfor %}
    {{- '\\n</tools>\\nReturn calls within <tool_call></tool_call> tags.<|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) or (message.role == 'assistant' and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|im_start|>assistant' + ('\\n' + message.content if message.content else '') }}
        {%- for call in message.tool_calls %}
            {%- set call = call.function if call.function is defined else call %}
            {{- '\\n<tool_call>\\n{"name": "' ~ call.name ~ '", "arguments": ' ~ (call.arguments | tojson) ~ '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}
        {%- if loop.index0 == 0 or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
""",
    "qwen 3": """
{%- set ns = namespace(last=messages | length - 1) %}
{%- for message in messages[::-1] if message.role == 'user' %}
    {%- if loop.first %}{%- set ns.last = messages.index(message) %}{%- endif %}{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content or '' %}
    {%- if message.role == 'assistant' and '</think>' in content and loop.index0 < ns.last %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}
""",
    "mistral": """
{%- set rest = messages %}
{%- if messages[0].role == 'system' %}{%- set system = messages[0].content %}{%- set rest = messages[1:] %}{%- endif %}
{%- set users = rest | selectattr('role', 'equalto', 'user') | list %}
{{- bos_token }}
{%- set ns = namespace(index=0) %}
{%- for message in rest if message.role in ('user', 'assistant') and not message.tool_calls %}
    {%- if (message.role == 'user') != (ns.index % 2 == 0) %}{{- raise_exception('after the system message, roles must alternate') }}{%- endif %}
    {%- set ns.index = ns.index + 1 %}
{%- endfor %}
{%- for message in rest %}
    {%- if message.role == 'user' %}
        {%- if tools and message == users[-1] %}
            {{- '[AVAILABLE_TOOLS] ' + tools | map(attribute='function') | list | tojson + '[/AVAILABLE_TOOLS]' }}{%- endif %}
        {{- '[INST] ' + (system + '\\n\\n' if loop.last and system is defined else '') + message.content + '[/INST]' }}
    {%- elif message.tool_calls %}
        {{- '[TOOL_CALLS] ' + message.tool_calls | map(attribute='function') | list | tojson + eos_token }}
    {%- elif message.role == 'assistant' %}
        {{- ' ' + message.content + eos_token }}
    {%- elif message.role == 'tool' %}
        {{- '[TOOL_RESULTS] ' + {'content': message.content} | tojson + '[/TOOL_RESULTS]' }}
    {%- else %}
        {{- raise_exception('Only user, assistant and tool roles are supported') }}
    {%- endif %}
{%- endfor %}""",
    "gemma": """
{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{% for message in messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must alternate') }}{% endif %}
{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}
{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}
{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}""",
    "gemma 3": """
{{- bos_token -}}
{%- for message in messages -%}
    {{- '<start_of_turn>' ~ ('model' if message.role == 'assistant' else message.role) ~ '\\n' -}}
    {%- if message.content is string -%}{{- message.content | trim -}}
    {%- elif message.content is iterable -%}
        {%- for item in message.content -%}{%- if item.type == 'text' -%}{{- item.text | trim -}}{%- endif -%}{%- endfor -%}
    {%- else -%}{{- raise_exception('Invalid content type') -}}{%- endif -%}
    {{- '<end_of_turn>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<start_of_turn>model\\n' -}}{%- endif -%}""",
    "phi 3": "{% for message in messages %}{{'<|' + message['role'] + '|>' + '\\n' + message['content'] + '<|end|>\\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}",
    "deepseek": """
{%- macro turn(role, content) -%}{{ '<｜' ~ role ~ '｜>' ~ content }}{%- endmacro -%}
{%- set ns = namespace(system='') -%}
{%- for m in messages if m.role == 'system' -%}{%- set ns.system = ns.system ~ ('\\n\\n' if ns.system else '') ~ m.content -%}{%- endfor -%}
{{- bos_token ~ ns.system -}}
{%- for m in messages -%}
    {%- if m.role == 'system' -%}{%- continue -%}{%- endif -%}
    {%- if m.role not in ('user', 'assistant') -%}{%- break -%}{%- endif -%}
    {{- turn(m.role | capitalize, m.content) -}}{{- eos_token if m.role == 'assistant' -}}
{%- endfor -%}
{{- '<｜Assistant｜>' if add_generation_prompt -}}""",
    "command r": """
{{- bos_token }}
{%- if documents %}
{{ '<|SYSTEM|>' }}{% for document in documents %}Document: {{ loop.index0 }}
{% for key, value in document.items() | sort %}{{ key }}: {{ value }}
{% endfor %}{% endfor %}
{%- endif %}
{%- for message in messages %}{{ '<|' ~ message.role | upper ~ '|>' ~ message.content }}{%- endfor %}
{%- if add_generation_prompt %}{{ '<|CHATBOT|>' }}{%- endif %}
""",
    "training mask": "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ m.role }}: {{ m.content }}\n{% endif %}{% endfor %}",
}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Né <à> & 'où'?",
        "parameters": {"type": "object", "properties": {}},
    },
}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {
            "id": "1",
            "type": "function",
            "function": {"name": "weather", "arguments": {"at": "Zürich"}},
        }
    ],
}
USER, SYSTEM, ANSWER = (
    {"role": "user", "content": " Hello, 世界 🙂 "},
    {"role": "system", "content": "Be brief."},
    {"role": "assistant", "content": "Hi\n"},
)
CASES = {
    "one": ([USER], {}),
    "system": ([SYSTEM, USER, ANSWER, USER], {}),
    "no prompt": ([USER, ANSWER], {"add_generation_prompt": False}),
    "continued": ([USER, ANSWER], {"add_generation_prompt": False, "continue_final_message": True}),
    "tools": (
        [USER, CALL, {"role": "tool", "tool_call_id": "1", "content": "18 °C"}],
        {"tools": [TOOL, TOOL]},
    ),
    "parts": (
        [
            {
                "role": "user",
                "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
            }
        ],
        {},
    ),
    "wrong order": ([ANSWER, USER], {}),
    "unknown role": ([USER, {"role": "critic", "content": "no"}], {}),
    "no content": ([{"role": "user"}], {}),
    "documents": ([USER], {"documents": [{"title": "A", "text": "b"}]}),
    "variables": (
        [USER],
        {"enable_thinking": False, "date_string": "1 Jan 1970", "bos_token": "<another>"},
    ),
}
OWN = ("tools", "documents", "add_generation_prompt", "continue_final_message")


@pytest.fixture(autouse=True)
def children():
    """A function that returns the processes that the test has started; none is left at its end."""
    before = set(psutil.Process().children(recursive=True))
    yield lambda: set(psutil.Process().children(recursive=True)) - before
    assert set(psutil.Process().children(recursive=True)) <= before


@pytest.fixture(scope="module")
def run():
    with asyncio.Runner() as runner:
        yield runner.run


@pytest.fixture(scope="module")
def with_template(run, tiny_model):
    """A function: the text of a template, or what `find_template` found, to `Templates` of the tiny
    model. They share processes, which take a second to start.
    """
    own = run(Templates.open(tiny_model))

    def make(template, tokens_of=tiny_model):
        if isinstance(template, str):
            template = ChatTemplate(template, template, tiny_model)
        return Templates(template, find_special_tokens(tokens_of), own._pool)

    yield make
    run(own.close())


@pytest.fixture
def open_templates(run, tiny_model, tmp_path):
    """A function that opens the tiny model with a template of its own, closed when the test
    ends.
    """
    opened = []

    def open_them(text, **options):
        file = tmp_path / "template.jinja"
        file.write_text(text)
        opened.append(run(Templates.open(tiny_model, file, **options)))
        return opened[-1]

    yield open_them
    for templates in opened:
        run(templates.close())


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return AutoTokenizer.from_pretrained(tiny_model)


def outcome(render):
    try:
        return render()
    except UsageError as error:
        return f"refused: {error.message.partition(': ')[2]}"
    except Exception as error:
        name = "" if type(error).__name__ == "TemplateError" else f"{type(error).__name__}: "
        return f"refused: {name}{' '.join(str(error).split())}"


@pytest.mark.parametrize(
    "name", [name for name in LIKE if name not in ("chatml", "llama 2", "gemma", "phi 3")]
)
def test_prompts_are_those_of_transformers(name, run, with_template, tokenizer):
    templates = with_template(LIKE[name])
    for case, (messages, options) in CASES.items():
        own = {key: value for key, value in options.items() if key in OWN}
        kwargs = {key: value for key, value in options.items() if key not in OWN}
        expected = outcome(
            lambda messages=messages, options=options: tokenizer.apply_chat_template(
                messages,
                chat_template=LIKE[name],
                tokenize=False,
                **{"add_generation_prompt": True, **options},
            )
        )
        found = outcome(
            lambda messages=messages, own=own, kwargs=kwargs: run(
                templates.render(messages, **own, kwargs=kwargs)
            )
        )
        assert found[:200] == expected[:200], case
        assert found.startswith("refused: ") or found == expected, case
    assert not outcome(lambda: run(templates.render([USER]))).startswith("refused")


def test_each_template_renders_what_it_is_for(run, with_template):
    renders = {
        name: with_template(LIKE[name]).render for name in ("llama 3.1", "qwen 2.5", "mistral")
    }
    for name, mark in (
        ("llama 3.1", "Environment: ipython"),
        ("qwen 2.5", "<tool_call>"),
        ("mistral", "[AVAILABLE_TOOLS]"),
    ):
        assert mark in run(renders[name](*CASES["tools"][:1], [TOOL]))
        assert "Zürich" in run(renders[name](CASES["tools"][0]))


def test_the_tiny_models_own_template_renders_as_its_tokenizer_does(run, tiny_model, tokenizer):
    templates = run(Templates.open(tiny_model))
    try:
        assert templates.text == tokenizer.chat_template
        expected = tokenizer.apply_chat_template(
            [SYSTEM, USER], tokenize=False, add_generation_prompt=True
        )
        assert run(templates.render([SYSTEM, USER])) == expected
    finally:
        run(templates.close())


def test_what_a_template_raises_is_told_in_its_words(run, with_template):
    with pytest.raises(
        UsageError, match="refuses these messages: System role not supported"
    ) as caught:
        run(with_template(LIKE["gemma"]).render([SYSTEM, USER]))
    assert caught.value.code == "E_CHAT_TEMPLATE_REFUSED"
    with pytest.raises(UsageError) as caught:
        run(
            with_template("{{ raise_exception(messages[0].content * 100000) }}").render(
                [{"role": "user", "content": "no\nway "}]
            )
        )
    assert len(caught.value.message) < 400 and "\n" not in caught.value.message


SLOW = (
    "{% for i in range(99999) %}{% for j in range(99999) %}{% set x = i * j %}{% endfor %}{% "
    "endfor %}"
)
COSTLY = {  # what it does -> a template that does it when a user says so, and what comes of it
    "loops": (SLOW, "more than 1 s"),
    "one slow instruction": ("{{ (9 ** messages | length) ** (9 ** 9) }}", "more than 1 s"),
    "a long text": ("{{ messages[0].content * 10**10 }}", "memory"),
    "doubling": (
        "{% set ns = namespace(s='x') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% "
        "endfor %}{{ ns.s }}",
        "memory",
    ),
    "long output": ("{{ messages[0].content * 5000000 }}", "result is too long"),
}
FORBIDDEN = {
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    "padding": ("{{ '%099999999999d' % messages | length }}", "memory"),
    "classes": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "SecurityError"),
    "globals": ("{{ raise_exception.__globals__['json'] }}", "SecurityError"),
    "attributes by name": ("{{ ('' | attr('__class__')).mro() }}", "Error"),
    "format strings": ("{{ '{0.__class__.__mro__}'.format('') }}", "SecurityError"),
    "include": ("{% include '/etc/passwd' %}", "TypeError"),
    "import": ("{% import 'os' as os %}", "TypeError"),
    "changes": ("{{ messages.append(messages) }}", "SecurityError"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", COSTLY)
def test_a_hostile_template_fails_within_the_limits_and_the_next_call_works(
    name, run, open_templates
):
    template, message = COSTLY[name]
    templates = open_templates(
        "{% if evil %}" + template + "{% else %}good{% endif %}", timeout_s=1
    )
    messages = [{"role": "user", "content": "four"}]
    started = time.monotonic()
    with pytest.raises(UsageError, match=message) as caught:
        run(templates.render(messages, kwargs={"evil": True}))
    assert caught.value.code in ("E_CHAT_TEMPLATE_LIMIT", "E_CHAT_TEMPLATE_REFUSED")
    assert time.monotonic() - started < 15
    assert run(templates.render(messages)) == "good"


@pytest.mark.slow
def test_a_template_that_reaches_for_more_is_refused_and_the_next_call_works(run, open_templates):
    branches = "".join(
        f"{{% elif evil == '{name}' %}}{template}" for name, (template, _) in FORBIDDEN.items()
    )
    templates = open_templates("{% if not evil %}good" + branches + "{% endif %}")
    for name, (_, message) in FORBIDDEN.items():
        with pytest.raises(UsageError, match=message) as caught:
            run(templates.render([USER], kwargs={"evil": name}))
        assert caught.value.code in ("E_CHAT_TEMPLATE_LIMIT", "E_CHAT_TEMPLATE_REFUSED")
        assert run(templates.render([USER])) == "good"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{% for m in messages %}", "TemplateSyntaxError"),
        ("{{ 'x' | no_such_filter }}", "TemplateAssertionError"),
        ("(" * 100_000 + "{{" + "(" * 100_000 + "}}", "RecursionError|Syntax|memory"),
        ("{{ 9 ** (9 ** 9) }}", "more than 1 s"),  # jinja computes constants when it compiles
        ("{{ 'x' * 10**8 }}", "memory"),
    ],
)
def test_a_template_that_does_not_compile_is_refused_when_it_is_opened(
    text, message, open_templates
):
    with pytest.raises(CheckpointRefused, match=message) as caught:
        open_templates(text, timeout_s=1)
    assert caught.value.code == "E_CHAT_TEMPLATE"
    assert "template.jinja" in caught.value.message


def test_what_a_request_may_not_say(run, with_template):
    templates = with_template(LIKE["chatml"])
    for messages, options, code in (
        ([], {}, "E_MESSAGES"),
        ([USER], {"continue_final_message": True}, "E_MESSAGES"),
        ([USER], {"kwargs": {"chat_template": "{{ 1 }}"}}, "E_CHAT_TEMPLATE_KWARGS"),
        ([USER], {"kwargs": {"return_assistant_tokens_mask": True}}, "E_CHAT_TEMPLATE_KWARGS"),
        ([USER], {"kwargs": {"self": 1}}, "E_CHAT_TEMPLATE_KWARGS"),
    ):
        with pytest.raises(UsageError) as caught:
            run(templates.render(messages, **options))
        assert caught.value.code == code


def test_every_reserved_name_would_be_taken_by_transformers():
    for name in ("conversations", "tools", "chat_template", "messages", "self"):
        with pytest.raises(TypeError, match="multiple values"):
            render_jinja_template([[USER]], None, None, "", **{name: 1})


def test_a_model_without_a_template_says_so_and_needs_no_process(run, tiny_copy, children):
    (tiny_copy / "chat_template.jinja").unlink()
    templates = run(Templates.open(tiny_copy))
    assert templates.template is None and templates.text is None
    assert not children()
    with pytest.raises(UsageError, match="no chat template"):
        run(templates.render([USER]))
    run(templates.close())


def write_config(folder, **changes):
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


NAMED = [
    {"name": "default", "template": "plain"},
    {"name": "tool_use", "template": "{{ tools | length }}"},
    {"name": "rag", "template": "docs"},
]


def remove(folder):
    (folder / "chat_template.jinja").unlink()


def only_config(folder):
    remove(folder)
    write_config(folder, chat_template="from the config")


def named_in_config(folder):
    remove(folder)
    write_config(folder, chat_template=NAMED)


def named_files(folder):
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("for tools")
    write_config(folder, chat_template="from the config")


def files_only_in_the_folder(folder):
    remove(folder)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "default.jinja").write_text("the default")


def windows_lines(folder):
    (folder / "chat_template.jinja").write_bytes(b"a\r\n{{ bos_token }}\r\nb\r\n")


def empty(folder):
    (folder / "chat_template.jinja").write_text("")


@pytest.mark.parametrize(
    "prepare",
    [
        only_config,
        named_in_config,
        named_files,
        files_only_in_the_folder,
        windows_lines,
        empty,
    ],
    ids=lambda f: f.__name__,
)
def test_the_template_is_the_one_that_transformers_takes(prepare, run, with_template, tiny_copy):
    prepare(tiny_copy)
    tokenizer = AutoTokenizer.from_pretrained(tiny_copy)
    templates = with_template(find_template(tiny_copy), tokens_of=tiny_copy)
    for tools in (None, [TOOL]):
        options = {"tools": tools, "tokenize": False, "add_generation_prompt": True}
        assert run(templates.render([USER], tools)) == tokenizer.apply_chat_template(
            [USER], **options
        )


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (7, "of type int"),
        ([1], "of type list"),
        ([{"name": "default"}], "of type NoneType"),
        ({"default": ["x"]}, "of type list"),
        ([{"name": "rag", "template": "x"}], "none is the default"),
        ("x" * (MAX_TEMPLATE_BYTES + 1), "more than 1,048,576 bytes"),
    ],
)
def test_a_config_with_something_else_is_refused(template, reason, tiny_copy):
    remove(tiny_copy)
    write_config(tiny_copy, chat_template=template)
    with pytest.raises(CheckpointRefused, match=reason) as caught:
        find_template(tiny_copy)
    assert "tokenizer_config.json" in caught.value.message and len(caught.value.message) < 1000


def test_a_file_that_cannot_be_a_template_is_refused(tiny_copy):
    file = tiny_copy / "chat_template.jinja"
    for data, reason in ((b"x" * (MAX_TEMPLATE_BYTES + 1), "more than"), (b"\xff\xfe", "UTF-8")):
        file.write_bytes(data)
        with pytest.raises(CheckpointRefused, match=reason):
            find_template(tiny_copy)
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(CheckpointRefused, match="not a regular file"):
        find_template(tiny_copy)
    with pytest.raises(UsageError, match="no such file"):
        find_template(tiny_copy, "chatml")


def test_only_a_template_that_mentions_tools_accepts_them(tiny_copy):
    accepts = {}
    for name, text in LIKE.items():
        (tiny_copy / "chat_template.jinja").write_text(text)
        accepts[name] = find_template(tiny_copy).accepts_tools
    assert {name for name, does in accepts.items() if does} == {"llama 3.1", "qwen 2.5", "mistral"}


@pytest.mark.parametrize(
    ("config", "legacy"),
    [
        ({}, None),
        ({"eos_token": None, "image_token": "<img>", "add_bos_token": True}, None),
        ({"bos_token": {"__type": "AddedToken", "content": "<s>", "lstrip": False}}, None),
        ({"extra_special_tokens": {"boi": "<boi>", "eoi_token": "<eoi>"}}, None),
        ({"extra_special_tokens": ["<a>"], "additional_special_tokens": ["<b>"]}, None),
        (
            {},
            {
                "bos_token": {"content": "<legacy>", "lstrip": False},
                "sep_token": "<sep>",
                "additional_special_tokens": ["<c>"],
            },
        ),
        (
            {"added_tokens_decoder": {"0": {"content": "<|endoftext|>", "special": True}}},
            {"bos_token": "<ignored>"},
        ),
    ],
)
def test_special_tokens_are_those_of_the_tokenizer(config, legacy, tiny_copy):
    write_config(tiny_copy, **config)
    if legacy is not None:
        (tiny_copy / "special_tokens_map.json").write_text(json.dumps(legacy))
    assert (
        find_special_tokens(tiny_copy)
        == AutoTokenizer.from_pretrained(tiny_copy).special_tokens_map
    )
