"""What the parsers of thoughts and tool calls cost: CPU microseconds a token of a stream, by style,
in content, in thoughts and inside of calls.

    python tests/benchmarks/parsers.py [STYLE ...]

Texts are what the published templates write, as `tests/serve/test_serve_tool_styles.py` has them,
cut into pieces like a tokenizer's.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[level]) for level in (1, 2)]
sys.path[:0] = [str(Path(__file__).resolve().parents[1] / "serve")]

from test_serve_tool_styles import NAMES, TEMPLATES, form_of, written  # noqa: E402

from qtool.serve.api.answer_reader import AnswerReader  # noqa: E402

PIECE = re.compile(r"\s?\w{1,6}|\s+|[^\w\s]{1,2}")
PROSE = "The sum of both lists is <b>small</b>, so I add them (x < 3), then print it.\nThat works. "
CODE = 'def add(a, b):\n    """Add."""\n    return [a + b, {"k": "v"}]\n'
WORDS = 120  # repeats
ROUNDS = 15


def cost(form: Callable[[], AnswerReader], before: str, text: str) -> float:
    """The microseconds a piece of ``text`` takes, pushed after ``before``; the best of some runs,
    for the machine does other things too.
    """
    pieces = PIECE.findall(text)
    best = float("inf")
    for _ in range(ROUNDS):
        reader = form()
        reader.push(before)
        began = time.process_time()
        for piece in pieces:
            reader.push(piece)
        best = min(best, time.process_time() - began)
        reader.finish()
    return best / len(pieces) * 1e6


def costs(name: str) -> tuple[float, float | None, float]:
    """The costs in content, in thoughts and in a call of a style."""

    def reader() -> AnswerReader:
        return AnswerReader(form_of(name))

    mark = "MARK"
    thoughts = None
    if TEMPLATES[name][1]:
        opened = written(name, [(NAMES[0], {})], mark, "c").partition(mark)[0]
        thoughts = cost(reader, opened, PROSE * WORDS)
    content = written(name, [(NAMES[0], {})], "", mark).partition(mark)[0]
    call, _, rest = written(name, [(NAMES[0], {"text": mark, "count": 1})]).partition(mark)
    body = written(name, [(NAMES[0], {"text": CODE * WORDS, "count": 1})])
    inside = body[len(call) : len(body) - len(rest)]
    return cost(reader, content, PROSE * WORDS), thoughts, cost(reader, call, inside)


def main(names: Sequence[str]) -> None:
    print("| style | content | thoughts | calls |\n|---|---|---|---|")
    for name in names or TEMPLATES:
        content, thoughts, call = costs(name)
        shown = "" if thoughts is None else f"{thoughts:.2f}"
        print(f"| {name} | {content:.2f} | {shown} | {call:.2f} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
