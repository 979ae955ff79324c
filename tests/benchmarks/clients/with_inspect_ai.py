"""inspect-ai: a small evaluation."""

import os
import tempfile

from inspect_ai import Task, eval
from inspect_ai.dataset import Sample
from inspect_ai.scorer import includes
from inspect_ai.solver import generate

os.environ["QTOOL_API_KEY"] = "none"
os.environ["QTOOL_BASE_URL"] = os.environ["SERVER"] + "/v1"
[log] = eval(
    Task(
        dataset=[Sample(input=f"def f{number}():", target="return") for number in range(3)],
        solver=generate(max_tokens=16),
        scorer=includes(),
    ),
    model="openai-api/qtool/tiny",
    log_dir=tempfile.mkdtemp(),
    display="plain",
)
assert log.status == "success", log.error
