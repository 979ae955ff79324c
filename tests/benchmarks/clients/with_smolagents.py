"""smolagents: its model class, and an agent whose model writes no sense."""

import os

from smolagents import CodeAgent, OpenAIServerModel, ToolCallingAgent, tool


@tool
def weather(city: str) -> str:
    """Tell the weather.

    Args:
        city: the city.
    """
    return f"rain in {city}"


model = OpenAIServerModel(
    model_id="tiny", api_base=os.environ["SERVER"] + "/v1", api_key="none", max_tokens=400
)
assert model.generate([{"role": "user", "content": "def main():"}]).content
assert list(model.generate_stream([{"role": "user", "content": "def main():"}]))
called = model.generate([{"role": "user", "content": "Weather?"}], tools_to_call_from=[weather])
assert called.tool_calls
for agent in (CodeAgent, ToolCallingAgent):
    agent(tools=[weather], model=model, max_steps=1, verbosity_level=0).run("How is the weather?")
