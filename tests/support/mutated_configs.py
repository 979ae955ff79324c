"""Quantization configs of published layouts, changed key by key."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Json = dict[str, Any]
CONFIG_FILES = (
    "config.json",
    "quantize_config.json",
    "quant_config.json",
    "hf_quant_config.json",
)
QUANTIZATION = ("quantization_config", "compression_config")
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 3, 8, 64, 1 << 40, 0.5, float("nan")),
    *("", "x", "4", "int", "float", "group", "channel", "gptq", "awq", "fp8", "re:(", "re:.*"),
    *([], [1], ["x"], ["re:.*"], [[]], {}, {"x": 1}, {"x": None}),
)
WORDS: dict[str, tuple[Any, ...]] = {  # more values for some keys
    "quant_method": ("gptq", "awq", "fp8", "compressed-tensors", "modelopt", "auto-round", "exl2"),
    "packing_format": ("auto_round:auto_awq", "auto_round:llm_compressor", "auto_round:fp8"),
    "checkpoint_format": ("gptq_v2", "gemm", "marlin"),
    "version": ("gemv", "gemm"),
    "strategy": ("tensor", "block", "token", "tensor_group"),
    "_type": ("IntxWeightOnlyConfig", "Int8WeightOnlyConfig", "FqnToConfig"),
    "quant_algo": ("FP8", "NVFP4", "W4A16_AWQ", "MIXED_PRECISION"),
}


@dataclass(frozen=True)
class Mutation:
    """One change of one file."""

    file: str
    path: tuple[str | int, ...]
    """The keys that lead to what is changed."""
    what: str
    content: Json

    def __str__(self) -> str:
        return f"{self.file}: {'.'.join(map(str, self.path))} {self.what}"


def mutations(folder: Path) -> Iterator[Mutation]:
    """Yield every change of the quantization configs of ``folder``."""
    for name in CONFIG_FILES:
        file = folder / name
        if not file.exists():
            continue
        content = json.loads(file.read_text())
        for path in _paths(content, whole=name != "config.json"):
            yield from _changes(name, content, path)


def _paths(content: Json, *, whole: bool) -> Iterator[tuple[str | int, ...]]:
    if whole:
        yield from _below(content, ())
        return
    for key in QUANTIZATION:
        if key in content:
            yield (key,)
            yield from _below(content[key], (key,))


def _below(value: Any, path: tuple[str | int, ...]) -> Iterator[tuple[str | int, ...]]:
    if isinstance(value, dict):
        items: list[tuple[str | int, Any]] = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value[:2]))
    else:
        return
    for key, each in items:
        yield (*path, key)
        yield from _below(each, (*path, key))


def _changes(file: str, content: Json, path: tuple[str | int, ...]) -> Iterator[Mutation]:
    *parents, last = path
    for what, change in _edits(content, path):
        changed = copy.deepcopy(content)
        holder: Any = changed
        for key in parents:
            holder = holder[key]
        if what == "removed":
            del holder[last]
        elif what == "renamed":
            holder[f"{last}x"] = holder.pop(last)
        else:
            holder[last] = change
        yield Mutation(file, path, what, changed)


def _edits(content: Json, path: tuple[str | int, ...]) -> Iterator[tuple[str, Any]]:
    value: Any = content
    for key in path:
        value = value[key]
    yield "removed", None
    if isinstance(path[-1], str):
        yield "renamed", None
    if isinstance(value, int) and not isinstance(value, bool):
        for other in (value + 1, value - 1, -value, value * 2, value // 2, str(value), [value]):
            yield f"= {other!r}", other
    if isinstance(value, str):
        for other in (value.upper(), f"{value} ", f"x{value}", value[:-1]):
            yield f"= {other!r}", other
    for other in (*VALUES, *WORDS.get(str(path[-1]), ())):
        yield f"= {other!r}"[:60], other
