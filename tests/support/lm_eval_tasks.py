"""Three small tasks of lm-eval that need no network, one for each kind of request."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NAMES = ("tiny_choice", "tiny_write", "tiny_roll")
QUESTIONS = [
    ("import", [" os", " sys", " banana"], 0),
    ("x = [1, 2]\nfor y", [" in", " while", " 7"], 0),
    ("for i in", [" range", " def", " return"], 0),
    ("try:\n    x = 1\nexcept", [" KeyError:", " def", " 日本"], 0),
    ("return", [" self", " é🎉", " elif"], 0),
]
DATA = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {cache}}}
test_split: test
"""
KINDS = (
    """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
target_delimiter: ""
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["\\n\\n", ")"], max_gen_toks: 10, temperature: 0}
metric_list: [{metric: exact_match}]
""",
    """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}{{choices[answer]}}"
metric_list: [{metric: word_perplexity}]
""",
)


@contextmanager
def task_folder(folder: Path) -> Iterator[Path]:
    """Write the tasks to ``folder``; meanwhile nothing asks the network."""
    data = folder / "questions.jsonl"
    data.write_text(
        "".join(
            json.dumps({"question": question, "choices": choices, "answer": answer}) + "\n"
            for question, choices, answer in QUESTIONS
        )
    )
    for name, kind in zip(NAMES, KINDS, strict=True):
        head = DATA.format(name=name, data=data, cache=folder / "cache")
        (folder / f"{name}.yaml").write_text(head + kind)
    before = {name: os.environ.get(name) for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")}
    os.environ.update(dict.fromkeys(before, "1"))
    try:
        yield folder
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
