"""The two `curl` commands of SGLang's documentation against `qtool serve`, for checkpoints of any
format: a line for each.

    python tests/benchmarks/serve_formats.py FOLDER[=QUANTIZATION] ... [--online PLAIN_MODEL]
    [--write TABLE]

``QUANTIZATION`` is what the documentation's line for such a checkpoint says after
``--quantization``. ``--online``: also the plain model, quantized as it loads to fp8 and to each of
torchao's names. `chat` and `generate` say whether the answer has its form, `same` whether greedy
tokens are
those of `qtool.Engine` in this process. The server starts as the documentation has it: on all
addresses, with no other flag but the port.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[level]) for level in (1, 2)]
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "serve"))

from support.server import Server, start_server  # noqa: E402
from test_serve_formats import CHAT, GENERATE, shell  # noqa: E402

import qtool  # noqa: E402
from qtool.runtime.online import TORCHAO  # noqa: E402

NAME = "qwen/qwen2.5-0.5b-instruct"  # the model's in the commands


@dataclass(frozen=True)
class Case:
    """A model to serve, the documentation's flags for it, and what an Engine is told for
    the same.
    """

    folder: Path
    flags: tuple[str, ...] = ()
    quantization: str | None = None


@dataclass(frozen=True)
class Line:
    """What came of a case."""

    model: str
    flags: str
    served_as: str
    start_s: float
    generate: bool
    chat: bool
    same: bool
    reply: str


def main() -> None:
    """Serve one after the other and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="*")
    parser.add_argument("--online", type=Path)
    parser.add_argument("--write", type=Path)
    arguments = parser.parse_args()
    destination = arguments.write and arguments.write.resolve()
    rows = [tuple(field.name for field in fields(Line))]
    with tempfile.TemporaryDirectory() as scratch:
        for case in list(cases(arguments.folders, arguments.online)):
            rows.append(tuple(map(shown, astuple(measure(case, Path(scratch))))))
            print(" | ".join(rows[-1]), flush=True)
            if destination:
                destination.write_text(table(rows))


def cases(folders: list[str], plain: Path | None) -> Iterator[Case]:
    """Yield what the command line asks for."""
    for given in folders:
        folder, _, name = given.partition("=")
        yield Case(Path(folder).resolve(), ("--quantization", name) if name else (), name or None)
    if plain is not None:
        yield Case(plain.resolve(), ("--quantization", "fp8"), "fp8")
        for name in TORCHAO:  # without CUDA graphs where the documentation says so
            yield Case(
                plain.resolve(),
                ("--torchao-config", name, *(["--disable-cuda-graph"] if name == "int8dq" else [])),
                name,
            )


def measure(case: Case, scratch: Path) -> Line:
    """Serve ``case`` by the documentation's command lines, as a person who has the model under the
    name that they say.
    """
    link = scratch / NAME
    link.parent.mkdir(exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(case.folder)
    os.chdir(scratch)
    began = time.monotonic()
    try:
        server = start_server(scratch, NAME, *case.flags, "--host", "0.0.0.0")
    except RuntimeError as error:
        return Line(
            case.folder.name,
            " ".join(case.flags),
            "did not start",
            0.0,
            False,
            False,
            False,
            str(error).splitlines()[-1],
        )
    took = time.monotonic() - began
    try:
        generated, chatted = answer(GENERATE, server), answer(CHAT, server)
        with urllib.request.urlopen(f"{server.url}/get_server_info") as reply:
            info = json.load(reply)
    finally:
        server.end()
    return Line(
        case.folder.name,
        " ".join(case.flags),
        info["quantization"] or info["dtype"],
        round(took, 1),
        said(
            lambda: (
                generated["meta_info"]["completion_tokens"] == 16
                and isinstance(generated["text"], str)
            )
        ),
        said(
            lambda: (
                bool(chatted["choices"][0]["message"]["content"])
                and chatted["choices"][0]["finish_reason"] in ("stop", "length")
            )
        ),
        said(lambda: generated["output_ids"] == own_tokens(case)),
        json.dumps(generated.get("text", generated))[:60],
    )


def answer(command: str, server: Server) -> dict[str, Any]:
    """Return what the command prints, or what went wrong."""
    try:
        reply: dict[str, Any] = shell(command, server)
    except (AssertionError, ValueError) as error:
        return {"error": str(error)}
    return reply


def said(right: Callable[[], bool]) -> bool:
    """Whether an answer has what ``right`` looks for."""
    try:
        return right()
    except (KeyError, IndexError, TypeError):
        return False


def own_tokens(case: Case) -> list[int]:
    """Return the greedy tokens of an Engine in this process."""
    with qtool.Engine(case.folder, quantization=case.quantization) as engine:
        tokens: list[int] = engine.generate(
            "Once upon a time,", {"max_new_tokens": 16, "temperature": 0}
        )["output_ids"]
    return tokens


def shown(value: object) -> str:
    """Return a cell of the table."""
    return ("yes" if value else "NO") if isinstance(value, bool) else str(value).replace("|", "\\|")


def table(rows: list[tuple[str, ...]]) -> str:
    """Return the rows under one another, the first as a head, in Markdown."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    return (
        "\n".join(
            [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]
        )
        + "\n"
    )


if __name__ == "__main__":
    main()
