"""pydantic-ai: an agent with a typed result, and a streamed one."""

import asyncio
import os
from typing import Literal

from pydantic import BaseModel
from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider


class Weather(BaseModel):
    """The weather."""

    city: Literal["Oslo", "Rome"]
    rain: bool


provider = OpenAIProvider(base_url=os.environ["SERVER"] + "/v1", api_key="none")
model = OpenAIChatModel("tiny", provider=provider)
result = Agent(model, output_type=Weather).run_sync("How is the weather?")
assert isinstance(result.output, Weather)


async def stream() -> str:
    agent = Agent(model, model_settings={"max_tokens": 8})
    async with agent.run_stream("def main():") as streamed:
        return "".join([piece async for piece in streamed.stream_text(delta=True)])


assert asyncio.run(stream())
