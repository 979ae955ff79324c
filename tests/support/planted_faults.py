"""Copies of a quantized checkpoint with one fault each, as real tools have made them."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

FILE = "model.safetensors"
State = dict[str, torch.Tensor]


def scales_doubled(state: State, _folder: Path) -> None:
    """All weight scales of one decoder layer are twice what they should be."""
    for name in _of_layer(state, 1):
        if name.endswith("weight_scale"):
            state[name] = state[name] * 2


def layers_swapped(state: State, _folder: Path) -> None:
    """Two decoder layers have each other's weights."""
    for name in _of_layer(state, 1):
        other = name.replace("layers.1.", "layers.2.")
        if other in state and state[name].shape == state[other].shape:
            state[name], state[other] = state[other], state[name]


def layer_of_zeros(state: State, _folder: Path) -> None:
    """The projection of one decoder layer's attention is zero."""
    for name in _of_layer(state, 2):
        if re.search(r"o_proj\.weight$", name):
            state[name] = torch.zeros_like(state[name])


def router_rounded(state: State, _folder: Path) -> None:
    """All routers were rounded to 8 bits with a scale for each row."""
    for name in state:
        if re.search(r"mlp\.(gate|router)\.weight$", name):
            weight = state[name].float()
            scale = weight.abs().amax(-1, keepdim=True) / 127
            state[name] = ((weight / scale).round() * scale).to(state[name].dtype)


def other_tokenizer(_state: State, folder: Path) -> None:
    """The tokenizer has the right size, and gives some pieces of text each other's numbers."""
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    pieces = sorted(vocabulary, key=vocabulary.__getitem__)[300:900]
    numbers = [vocabulary[piece] for piece in pieces]
    vocabulary.update(zip(pieces, numbers[::-1], strict=True))
    file.write_text(json.dumps(tokenizer))


FAULTS: dict[str, Callable[[State, Path], None]] = {
    each.__name__: each
    for each in (scales_doubled, layers_swapped, layer_of_zeros, router_rounded, other_tokenizer)
}


def plant(checkpoint: Path, fault: str, output: Path) -> Path:
    """Write ``checkpoint``, of one file, with ``fault`` to ``output``, and return that."""
    shutil.copytree(checkpoint, output)
    (output / "qtool-manifest.json").unlink(missing_ok=True)
    state = load_file(output / FILE)
    FAULTS[fault](state, output)
    save_file(
        {name: each.contiguous() for name, each in state.items()}, output / FILE, {"format": "pt"}
    )
    return output


def _of_layer(state: State, number: int) -> list[str]:
    return [name for name in state if f".layers.{number}." in name]
