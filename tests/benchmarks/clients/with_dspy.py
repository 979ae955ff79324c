"""dspy: a prediction in JSON."""

import os
from typing import Literal

import dspy

model = dspy.LM(
    "hosted_vllm/tiny",
    api_base=os.environ["SERVER"] + "/v1",
    api_key="none",
    max_tokens=600,
    cache=False,
    response_format={"type": "json_object"},  # it asks by itself where it knows the server
)
dspy.configure(lm=model, adapter=dspy.JSONAdapter())
assert model("def main():")


class Weather(dspy.Signature):
    """Tell the weather."""

    question: str = dspy.InputField()
    city: Literal["Oslo", "Rome"] = dspy.OutputField()


try:
    dspy.Predict(Weather)(question="Where does it rain?")
except dspy.utils.exceptions.AdapterParseError as error:
    assert "LM Response: {" in str(error)  # JSON, but not what was asked for
