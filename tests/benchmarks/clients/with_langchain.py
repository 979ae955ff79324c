"""langchain-openai: invoke, stream, bound tools and structured output."""

import os
from typing import Literal

from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel


class Weather(BaseModel):
    """The weather."""

    city: Literal["Oslo", "Rome"]
    rain: bool


@tool
def weather(city: Literal["Oslo", "Rome"]) -> str:
    """Tell the weather of a city."""
    return f"rain in {city}"


model = ChatOpenAI(
    model="tiny", base_url=os.environ["SERVER"] + "/v1", api_key="none", max_tokens=400
)
assert model.invoke("def main():").content
assert "".join(piece.content for piece in model.stream("def main():"))
asked = [HumanMessage("How is the weather?")]
called = model.bind_tools([weather], tool_choice="any").invoke(asked)
[call] = called.tool_calls[:1]
result = ToolMessage(weather.invoke(call["args"]), tool_call_id=call["id"])
model.bind_tools([weather]).invoke([*asked, called, result])
for method in ("json_schema", "function_calling"):
    found = model.with_structured_output(Weather, method=method).invoke("How is the weather?")
    assert isinstance(found, Weather), found
responses = ChatOpenAI(
    model="tiny",
    base_url=os.environ["SERVER"] + "/v1",
    api_key="none",
    use_responses_api=True,
    max_tokens=16,
)
assert responses.invoke("def main():").text
