"""Checkpoints of a few small layers, and what the terminal shows of an inspection."""

from __future__ import annotations

import io
import json
from pathlib import Path

import torch
from rich.console import Console
from safetensors.torch import save_file

from qtool.checkpoint import open_checkpoint
from qtool.formats import WRITABLE, QuantizedModule
from qtool.inspection import inspect, render
from qtool.scheme import Scheme
from qtool.weight import QuantizedWeight

NAME = "model.layers.0.mlp.up_proj"
ROWS, COLUMNS = 32, 128


def stored(
    folder: Path, layers: dict[str, tuple[QuantizedWeight, Scheme]], **plain: torch.Tensor
) -> Path:
    """Write a compressed-tensors checkpoint of some layers and plain tensors."""
    folder.mkdir()
    modules = [
        QuantizedModule(name, scheme, weight.shape, {}) for name, (weight, scheme) in layers.items()
    ]
    written = {
        module.name: WRITABLE["compressed-tensors"].write(module, layers[module.name][0])
        for module in modules
    }
    tensors = {
        f"{name}.{suffix}": tensor.clone()
        for name, parts in written.items()
        for suffix, tensor in parts.items()
    }
    save_file(
        tensors | {name: tensor.clone() for name, tensor in plain.items()},
        folder / "model.safetensors",
    )
    own = (
        WRITABLE["compressed-tensors"].quantization_config(modules, [], None)["config.json"]
        if modules
        else {}
    )
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **own}))
    return folder


def plain_model(folder: Path, **weights: torch.Tensor) -> Path:
    return stored(
        folder,
        {},
        **{f"model.layers.0.mlp.{kind}_proj.weight": weight for kind, weight in weights.items()},
    )


def random_weight(rows=ROWS, columns=COLUMNS, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).bfloat16()


def printed(found, **options):
    text = io.StringIO()
    Console(file=text, width=140).print(render(found, **options))
    return text.getvalue()


def against(folder, base):
    return inspect(open_checkpoint(folder), against=open_checkpoint(base)).against
