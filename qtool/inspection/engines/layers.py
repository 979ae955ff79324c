"""The linear layers of a checkpoint as engines hold them: merged into fused layers, and cut over
the ranks of tensor parallelism.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Literal

from qtool.checkpoint import Checkpoint
from qtool.formats import Layout, QuantizedModule
from qtool.inspection.engines.rule_inputs import Stored
from qtool.inspection.engines.rules import read_yaml
from qtool.modules import expert_stack, is_head, is_linear, is_router, tower_of

Role = Literal["linear", "expert", "router", "head", "tower"]


@dataclass(frozen=True)
class Linear:
    """One linear layer on disk; where experts are stacked, its shape is that of one.

    ``runs_in`` is the layer an engine merges it into, or its own name; ``module`` is None when it
    is in 16 bits.
    """

    name: str
    role: Role
    shape: tuple[int, int]
    module: QuantizedModule | None
    runs_in: str

    @property
    def kind(self) -> str:
        """The last part of its name."""
        return self.name.rpartition(".")[2]

    @property
    def stored(self) -> Stored:
        """How its tensors are stored."""
        return "quantized" if self.module else "plain"


@dataclass(frozen=True)
class Fused:
    """Layers that an engine runs as one: by which ``kind`` of layer, the ``name`` of that, and its
    shards in order.
    """

    kind: str
    name: str
    shards: tuple[Linear, ...]


@dataclass(frozen=True)
class Partition:
    """What one of ``ranks`` ranks holds of a layer; ``split`` says what is cut, ``uneven`` that it
    cannot be.
    """

    rows: int
    columns: int
    split: Literal["rows", "columns"] | None
    uneven: bool


def linear_layers(checkpoint: Checkpoint, layout: Layout) -> tuple[list[Linear], list[Fused]]:
    """Return every linear layer of the checkpoint, and what engines run as one of them."""
    shapes = {
        name: (module.shape[0] // module.experts, module.shape[1])
        for name, module in layout.modules.items()
    }
    for name, tensor in checkpoint.tensors.items():
        owner = name.removesuffix(".weight")
        if owner not in shapes and is_linear(tensor):
            shapes[owner] = (tensor.shape[0], tensor.shape[1])
    groups = _groups(shapes)
    # experts come last: each is of a pair and of its layer
    runs_in = {shard: name for name, (_, shards) in groups.items() for shard in shards}
    linears = {
        name: Linear(name, _role(name), shape, layout.modules.get(name), runs_in.get(name, name))
        for name, shape in shapes.items()
    }
    fused = [
        Fused(kind, name, tuple(linears[shard] for shard in shards))
        for name, (kind, shards) in groups.items()
    ]
    return list(linears.values()), fused


def partition(linear: Linear, ranks: int, cache_heads: int) -> Partition:
    """Return what one rank holds of ``linear``; key-value heads are repeated where there are fewer
    of them than ranks.
    """
    rows, columns = linear.shape
    axis = _axes().get(linear.kind) if linear.role in ("linear", "expert") else None
    if axis is None or ranks == 1:
        return Partition(rows, columns, axis, False)
    if axis == "columns":
        return Partition(rows, columns // ranks, axis, columns % ranks != 0)
    parts = (
        min(ranks, cache_heads)
        if cache_heads and linear.kind in read_yaml("layers")["cache"]
        else ranks
    )
    return Partition(rows // parts, columns, axis, rows % parts != 0)


def _groups(names: Collection[str]) -> dict[str, tuple[str, list[str]]]:
    """Return the fused layers, name -> (kind, shards): those whose shards are all there, and all
    experts of a layer.
    """
    wholes: Mapping[str, list[str]] = read_yaml("layers")["fused"]
    by_first = {shards[0]: (whole, shards) for whole, shards in wholes.items()}
    fused: dict[str, tuple[str, list[str]]] = {}
    experts: dict[str, tuple[str, list[str]]] = {}
    for name in names:
        if stack := expert_stack(name):
            experts.setdefault(stack, ("experts", []))[1].append(name)
        parent, dot, kind = name.rpartition(".")
        if kind in by_first:
            whole, kinds = by_first[kind]
            shards = [f"{parent}{dot}{shard}" for shard in kinds]
            if all(shard in names for shard in shards):
                fused[f"{parent}{dot}{whole}"] = whole, shards
    return fused | experts


@cache
def _axes() -> Mapping[str, Literal["rows", "columns"]]:
    data = read_yaml("layers")
    rows: dict[str, Literal["rows", "columns"]] = {
        kind: "rows" for kinds in data["column"] for kind in kinds
    }
    return rows | dict.fromkeys(data["row"], "columns")


def _role(name: str) -> Role:
    if is_head(name):
        return "head"
    if is_router(name):
        return "router"
    if tower_of(name):
        return "tower"
    return "expert" if "experts" in name.split(".") else "linear"
