"""openai: chats, streams, tools, structured output and responses."""

import json
import os

from openai import BadRequestError, OpenAI

client = OpenAI(base_url=os.environ["SERVER"] + "/v1", api_key="none")
ASK = [{"role": "user", "content": "def main():"}]
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Oslo", "Rome"]}},
            "required": ["city"],
        },
    },
}
answer = client.chat.completions.create(model="tiny", messages=ASK, max_tokens=8)
assert answer.choices[0].message.content and answer.usage.completion_tokens <= 8
pieces = list(
    client.chat.completions.create(
        model="tiny",
        messages=ASK,
        max_tokens=8,
        stream=True,
        stream_options={"include_usage": True},
    )
)
assert pieces[-1].usage.completion_tokens <= 8
called = client.chat.completions.create(
    model="tiny", messages=ASK, tools=[TOOL], tool_choice="required", parallel_tool_calls=False
).choices[0]
assert called.finish_reason == "tool_calls"
[call] = called.message.tool_calls
assert json.loads(call.function.arguments)["city"] in ("Oslo", "Rome")
result = {"role": "tool", "tool_call_id": call.id, "content": "rain"}
client.chat.completions.create(
    model="tiny", messages=[*ASK, called.message, result], tools=[TOOL], max_tokens=8
)
response = client.responses.create(model="tiny", input="def main():", max_output_tokens=16)
assert response.output_text
with client.responses.stream(model="tiny", input="def f():", max_output_tokens=16) as stream:
    assert [event.type for event in stream][-1] in ("response.completed", "response.incomplete")
try:
    client.chat.completions.create(model="tiny", messages=ASK, temperature=-1)
except BadRequestError as error:
    assert error.param == "temperature"
else:
    raise AssertionError("a negative temperature passed")
