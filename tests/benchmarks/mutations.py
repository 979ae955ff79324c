"""Checkpoints with random damage: each must be opened or refused, at once, and none opened that
safetensors refuses.

    python tests/benchmarks/mutations.py COUNT [--seed N]

Prints how many were opened and refused, by code, and the worst single time. Ends with 1 when one
crashed, hung or was wrongly opened, and shows it.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, deserialize

from qtool import formats
from qtool.checkpoint import open_checkpoint
from qtool.errors import CheckpointRefused
from qtool.inspection import inspect, render

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from support.bad_folders import LAYERS, LLAMA, llama, llama_tensors, quantized, true_file

SLOW_S = 2.0
NASTY: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        0,
        -0.0,
        -1,
        1,
        2,
        3,
        7,
        8,
        16,
        1 << 31,
        1 << 62,
        1 << 63,
        1 << 64,
        -(1 << 63),
        10**30,
        10**400,
        10**4000,
        1.0,
        0.5,
        1e308,
    ),
    *(
        float("nan"),
        float("inf"),
        "",
        "a",
        "0",
        "-1",
        "4",
        "4x4",
        "re:(",
        "re:.*",
        "-:.*",
        "Linear",
        "int",
        "float",
        "group",
        "tensor_group",
        "block",
    ),
    *(
        "\ud800",
        "\0",
        "\x1b[31m",
        "\N{GRINNING FACE}",
        "../x",
        "/dev/zero",
        "x" * 5_000,
        "BF16",
        "F4",
        "F6_E2M3",
        "U8",
        "I32",
        "model.safetensors",
    ),
    *(
        [],
        [[]],
        [0],
        [None],
        [[1, 2], 3],
        {},
        {"": {}},
        {"a": [{"b": None}]},
        [1 << 62] * 4,
        [0, 1 << 62, 1 << 62],
        ["a"] * 50,
    ),
    *(
        "gptq",
        "gptq_v2",
        "awq",
        "gemm",
        "compressed-tensors",
        "modelopt",
        "torchao",
        "NVFP4",
        "MIXED_PRECISION",
        "fp8",
        "marlin",
    ),
)


def sharded(folder: Path) -> None:
    """Write the small Llama in two shards with an index."""
    tensors = llama_tensors()
    halves = {
        f"model-{number}.safetensors": dict(list(tensors.items())[number - 1 :: 2])
        for number in (1, 2)
    }
    for name, half in halves.items():
        (folder / name).write_bytes(true_file(half))
    (folder / "config.json").write_text(json.dumps(LLAMA))
    index = {
        "metadata": {"total_size": 1},
        "weight_map": {tensor: name for name, half in halves.items() for tensor in half},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


MODELS: dict[str, Callable[[Path], object]] = {
    "llama": llama(),
    "sharded": sharded,
    **{kind: quantized(kind) for kind in LAYERS},
}


@dataclass
class Outcome:
    """What became of the mutations: codes and counts, the worst time, and what should not have
    happened.
    """

    codes: Counter[str] = field(default_factory=Counter)
    worst_s: float = 0.0
    wrong: list[str] = field(default_factory=list)


def run(count: int, folder: Path, seed: int = 0) -> Outcome:
    """Break ``count`` checkpoints below ``folder``, one after the other, and open each."""
    outcome = Outcome()
    originals = {}
    for name, build in MODELS.items():
        (folder / name).mkdir()
        build(folder / name)
        originals[name] = {file.name: file.read_bytes() for file in (folder / name).iterdir()}
    for number in range(seed * 10_000_000, seed * 10_000_000 + count):
        chance = random.Random(number)
        model = chance.choice(list(MODELS))
        name = chance.choice([*originals[model], "config.json"])
        content = mutated_file(chance, name, originals[model][name])
        (folder / model / name).write_bytes(content)
        start = time.perf_counter()
        try:
            code = opened(folder / model)
        except Exception as error:  # whatever it is: only refusals are right
            code = "CRASH"
            last = error.__traceback__
            while last and last.tb_next:
                last = last.tb_next
            place = (
                f"{Path(last.tb_frame.f_code.co_filename).name}:{last.tb_lineno}" if last else "?"
            )
            outcome.wrong.append(
                f"mutation {number} of {model}/{name}: {type(error).__name__}: {str(error)[:200]} "
                f"at {place}"
            )
        seconds = time.perf_counter() - start
        if not code and (refusal := _refused_by_safetensors(folder / model)):
            outcome.wrong.append(
                f"mutation {number} of {model}/{name}: opened, and safetensors refuses: {refusal}"
            )
        if seconds > SLOW_S:
            outcome.wrong.append(f"mutation {number} of {model}/{name}: took {seconds:.1f} s")
        outcome.worst_s = max(outcome.worst_s, seconds)
        outcome.codes[code or "opened"] += 1
        (folder / model / name).write_bytes(originals[model][name])
    return outcome


def opened(path: Path) -> str:
    """Do all that headers allow with the checkpoint; return the code of its refusal, or nothing."""
    try:
        checkpoint = open_checkpoint(path)
        formats.detect(checkpoint)
        inspection = inspect(checkpoint)
    except CheckpointRefused as error:
        json.dumps(error.to_dict(), ensure_ascii=False).encode("utf-8", "backslashreplace")
        return error.code
    json.dumps(inspection.to_dict())
    render(inspection)
    return ""


def mutated_file(chance: random.Random, name: str, content: bytes) -> bytes:
    """Return ``content`` with one to three random changes to its bytes or to the JSON in it."""
    is_weights = name.endswith(".safetensors")
    length = int.from_bytes(content[:8], "little") if is_weights else 0
    text, data = (content[8 : 8 + length], content[8 + length :]) if is_weights else (content, b"")
    if chance.random() < 0.25:
        changed = bytearray(content if chance.random() < 0.5 else content[: 8 + length or None])
        for _ in range(chance.randint(1, 3)):
            _change_bytes(chance, changed)
        return bytes(changed)
    value = json.loads(text)
    for _ in range(chance.randint(1, 3)):
        value = _changed(chance, value)
    text = json.dumps(value, ensure_ascii=chance.random() < 0.7).encode("utf-8", "surrogatepass")
    for _ in range(chance.choice((0, 0, 0, 1))):
        text = _changed_text(chance, text)
    return len(text).to_bytes(8, "little") + text + data if is_weights else text


def _change_bytes(chance: random.Random, content: bytearray) -> None:
    place = chance.randrange(len(content) + 1)
    kind = chance.randrange(5)
    if kind == 0:
        content[place : place + 1] = bytes([chance.randrange(256)])
    elif kind == 1:
        del content[place : place + chance.choice((1, 2, 8, 1_000_000))]
    elif kind == 2:
        content[place:place] = chance.choice(
            (
                b'"',
                b"{",
                b"}",
                b"[" * 3_000,
                b",",
                b"\0",
                b"-",
                b"9" * 20,
                b"\\u",
                b"\xff",
                b"NaN",
                b"1e999",
            )
        )
    elif kind == 3:
        content[place:place] = content[place : place + chance.randrange(100)]
    elif content:
        content[min(place, len(content) - 1)] ^= 1 << chance.randrange(8)


def _changed(chance: random.Random, value: Any) -> Any:
    """Return ``value`` with one node replaced, removed, renamed, nested or copied; inner nodes are
    as likely as outer ones.
    """
    if isinstance(value, dict) and value and chance.random() < 0.97:
        key = chance.choice(list(value))
        kind = chance.randrange(12)
        if kind == 0:
            return {name: item for name, item in value.items() if name != key}
        if kind == 1:
            return {
                chance.choice(
                    ("", "a", "__metadata__", "weight_map", "\ud800", key + "x", key[:-1])
                )
                if name == key
                else name: item
                for name, item in value.items()
            }
        if kind == 2:
            return {
                **value,
                chance.choice(
                    (
                        "__metadata__",
                        "x",
                        "text_config",
                        "dynamic",
                        "sidecar",
                        "model.layers.9.a.weight",
                    )
                ): chance.choice(NASTY),
            }
        if kind == 3:
            return {**value, key: value[chance.choice(list(value))]}
        return {**value, key: _changed(chance, value[key])}
    if isinstance(value, list) and value and chance.random() < 0.7:
        place = chance.randrange(len(value))
        return [
            *value[:place],
            *chance.choice(
                (
                    [],
                    [_changed(chance, value[place])],
                    [_changed(chance, value[place])],
                    [value[place]] * 2,
                )
            ),
            *value[place + 1 :],
        ]
    if isinstance(value, int) and not isinstance(value, bool) and chance.random() < 0.5:
        return chance.choice(
            (
                value + 1,
                value - 1,
                -value,
                value * 2,
                value // 2,
                float(value % 1000),
                f"{value:x}",
                [value],
                value + (1 << 64),
            )
        )
    return chance.choice(({"a": value}, [value], *NASTY))


def _changed_text(chance: random.Random, text: bytes) -> bytes:
    pairs = (
        (b"0", b"-0"),
        (b'"dtype"', b'"shape":[0],"dtype"'),
        (b"{", b'{"a":1,"a":2,'),
        (b":", b": NaN, "),
        (b"0", b"1e999"),
        (b"{", b"\n{", 1),
        (b"}", b"}\0"),
    )
    old, new, *count = chance.choice(pairs)
    return text.replace(old, new, chance.choice(count or (1, 2)))


def _refused_by_safetensors(path: Path) -> str:
    for file in path.glob("*.safetensors"):
        try:
            deserialize(file.read_bytes())
        except (SafetensorError, ValueError) as error:
            return f"{file.name}: {error}"
    return ""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("count", type=int)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    start = time.perf_counter()
    try:
        outcome = run(options.count, folder, options.seed)
    finally:
        shutil.rmtree(folder)
    print(
        f"{options.count:,} mutations in {time.perf_counter() - start:.0f} s, the worst "
        f"{outcome.worst_s:.2f} s, {len(outcome.wrong):,} wrong"
    )
    print(", ".join(f"{code} {count:,}" for code, count in outcome.codes.most_common()))
    print("\n".join(outcome.wrong[:50]))
    sys.exit(bool(outcome.wrong))


if __name__ == "__main__":
    main()
