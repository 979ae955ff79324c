"""instructor: a model of pydantic, by a schema and by a tool."""

import os
from typing import Literal

import instructor
from openai import OpenAI
from pydantic import BaseModel


class Weather(BaseModel):
    """The weather."""

    city: Literal["Oslo", "Rome"]
    rain: bool


for mode in (instructor.Mode.JSON_SCHEMA, instructor.Mode.TOOLS):
    client = instructor.from_openai(
        OpenAI(base_url=os.environ["SERVER"] + "/v1", api_key="none"), mode=mode
    )
    found = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "How is the weather?"}],
        response_model=Weather,
        max_tokens=400,
    )
    assert isinstance(found, Weather)
