"""litellm: the tool loop of its documentation, and a prompt that is too long."""

import json
import os

import litellm

common = {
    "model": "hosted_vllm/tiny",
    "api_base": os.environ["SERVER"] + "/v1",
    "api_key": "none",
}
tools = [
    {
        "type": "function",
        "function": {
            "name": "get_current_weather",
            "description": "Get the current weather in a given location",
            "parameters": {
                "type": "object",
                "properties": {"location": {"enum": ["Oslo", "Rome"]}},
                "required": ["location"],
            },
        },
    }
]
messages = [{"role": "user", "content": "What's the weather like?"}]
response = litellm.completion(messages=messages, tools=tools, tool_choice="required", **common)
message = response.choices[0].message
messages.append(message)
for call in message.tool_calls:
    location = json.loads(call.function.arguments)["location"]
    messages.append(
        {
            "tool_call_id": call.id,
            "role": "tool",
            "name": call.function.name,
            "content": json.dumps({"location": location, "temperature": "10"}),
        }
    )
second = litellm.completion(messages=messages, max_tokens=8, **common)
assert second.choices[0].message.content is not None
pieces = list(litellm.completion(messages=messages[:1], stream=True, max_tokens=8, **common))
assert any(piece.choices[0].delta.content for piece in pieces)
for provider in ("hosted_vllm", "openai"):
    try:
        litellm.completion(
            messages=[{"role": "user", "content": "long " * 20_000}],
            **{**common, "model": f"{provider}/tiny"},
        )
    except litellm.ContextWindowExceededError:
        pass
    else:
        raise AssertionError("a prompt that is too long passed")
