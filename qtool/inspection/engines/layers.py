"""The linear layers of a checkpoint as engines hold them: fused, and cut for tensor parallelism."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cache

from qtool.checkpoint import Checkpoint
from qtool.formats import Layout, QuantizedModule
from qtool.inspection.engines.rule_inputs import Axis, Role, Stored
from qtool.inspection.engines.rules import Strict, read_yaml
from qtool.modules import (
    expert_stack,
    is_embedding,
    is_head,
    is_linear,
    is_router,
    last_part,
    tower_of,
)


@dataclass(frozen=True)
class Linear:
    """One linear layer on disk."""

    name: str
    role: Role
    shape: tuple[int, int]
    """Outputs and inputs; of one expert where experts are stacked."""
    module: QuantizedModule | None
    """None when it is in 16 bits."""
    runs_in: str
    """The layer that an engine merges it into, or its own name."""

    @property
    def kind(self) -> str:
        """The last part of its name."""
        return last_part(self.name)

    @property
    def stored(self) -> Stored:
        """How its tensors are stored."""
        return "quantized" if self.module else "plain"


@dataclass(frozen=True)
class Fused:
    """Layers that an engine runs as one."""

    kind: str
    """The last part of ``name``."""
    name: str
    """The layer that the engine runs."""
    shards: tuple[Linear, ...]
    """In the engine's order."""


@dataclass(frozen=True)
class Partition:
    """What one rank holds of a layer."""

    rows: int
    columns: int
    split: Axis | None
    """What is cut."""
    uneven: bool
    """Whether it cannot be cut evenly."""


class LayerTable(Strict):
    """What layers.yaml holds."""

    fused: Mapping[str, tuple[str, ...]]
    row: tuple[str, ...]
    column: tuple[tuple[str, ...], ...]
    cache: tuple[str, ...]


def linear_layers(checkpoint: Checkpoint, layout: Layout) -> tuple[list[Linear], list[Fused]]:
    """Return every linear layer of the checkpoint, and what engines run as one of them."""
    shapes = _shapes(checkpoint, layout)
    groups = _groups(shapes)
    # The group of all experts comes last: an expert is in it and in a pair of its own.
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
    """Return what one rank holds of ``linear``.

    Where there are fewer key-value heads than ranks, heads are repeated.
    """
    rows, columns = linear.shape
    axis = _axes().get(linear.kind) if linear.role in ("linear", "expert") else None
    if axis is None or ranks == 1:
        return Partition(rows, columns, axis, False)
    if axis == "columns":
        return Partition(rows, columns // ranks, axis, columns % ranks != 0)
    has_cache_heads = cache_heads > 0 and linear.kind in _table().cache
    parts = min(ranks, cache_heads) if has_cache_heads else ranks
    return Partition(rows // parts, columns, axis, rows % parts != 0)


def _shapes(checkpoint: Checkpoint, layout: Layout) -> dict[str, tuple[int, int]]:
    shapes = {
        name: (module.shape[0] // module.experts, module.shape[1])
        for name, module in layout.modules.items()
    }
    for name, tensor in checkpoint.tensors.items():
        owner = name.removesuffix(".weight")
        if owner not in shapes and is_linear(tensor):
            shapes[owner] = (tensor.shape[0], tensor.shape[1])
    return shapes


def _groups(names: Collection[str]) -> dict[str, tuple[str, list[str]]]:
    """Return the fused layers, name -> (kind, shards).

    Those are the layers whose shards are all there, and all experts of a layer.
    """
    by_first = {shards[0]: (whole, shards) for whole, shards in _table().fused.items()}
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
def _table() -> LayerTable:
    return read_yaml("layers", LayerTable)


@cache
def _axes() -> Mapping[str, Axis]:
    axes: dict[str, Axis] = {kind: "rows" for kinds in _table().column for kind in kinds}
    return axes | dict.fromkeys(_table().row, "columns")


def _role(name: str) -> Role:
    if is_head(name):
        return "head"
    if is_embedding(name):
        return "embedding"
    if is_router(name):
        return "router"
    if tower_of(name):
        return "tower"
    return "expert" if "experts" in name.split(".") else "linear"
