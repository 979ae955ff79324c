"""anthropic: messages, streams, tools and counted tokens."""

import os

import anthropic

client = anthropic.Anthropic(base_url=os.environ["SERVER"], api_key="none")
ASK = [{"role": "user", "content": "def main():"}]
TOOL = {
    "name": "weather",
    "description": "Tells the weather.",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"enum": ["Oslo", "Rome"]}},
        "required": ["city"],
    },
}
answer = client.messages.create(model="tiny", max_tokens=8, messages=ASK, system="Be brief.")
assert answer.content[0].text and answer.usage.output_tokens <= 8
with client.messages.stream(model="tiny", max_tokens=8, messages=ASK) as stream:
    assert "".join(stream.text_stream)
called = client.messages.create(
    model="tiny",
    max_tokens=400,
    messages=ASK,
    tools=[TOOL],
    tool_choice={"type": "any", "disable_parallel_tool_use": True},
)
[call] = [block for block in called.content if block.type == "tool_use"]
assert called.stop_reason == "tool_use" and call.input["city"] in ("Oslo", "Rome")
result = {"type": "tool_result", "tool_use_id": call.id, "content": "rain"}
client.messages.create(
    model="tiny",
    max_tokens=8,
    tools=[TOOL],
    messages=[
        *ASK,
        {"role": "assistant", "content": called.content},
        {"role": "user", "content": [result]},
    ],
)
assert client.messages.count_tokens(model="tiny", messages=ASK).input_tokens > 3
try:
    client.messages.create(model="tiny", max_tokens=8, messages=[])
except anthropic.BadRequestError as error:
    assert "messages" in str(error)
else:
    raise AssertionError("no messages passed")
