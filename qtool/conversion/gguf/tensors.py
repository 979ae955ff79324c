"""The tensors of a GGUF file, and which rows of a checkpoint's tensors each is made of."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qtool.checkpoint import Checkpoint, TensorInfo
from qtool.checkpoint.gguf_names import GATE_UP, SINKS, Architecture, stem_of
from qtool.conversion.gguf.config import ModelConfig
from qtool.conversion.gguf.holding import rows_of
from qtool.conversion.gguf.names import Target, targets_of
from qtool.errors import CheckpointRefused
from qtool.formats import Layout, QuantizedModule
from qtool.formats.stored_layer import Source, Value
from qtool.modules import is_cache_tensor
from qtool.weight import QuantizedWeight

COMPUTED = (".rotary_emb.inv_freq", ".attention.masked_bias")  # from the config
STACKS = (f".experts.{GATE_UP}", ".experts.down_proj")


@dataclass(frozen=True, eq=False)
class Unit:
    """A tensor or a quantized layer of the checkpoint, as a matrix of R rows and K columns; of
    experts in a stack, one below the other. A vector is a matrix of one column.
    """

    source: Source
    targets: tuple[Target, ...]
    rows: int
    columns: int
    experts: int = 1
    """How many of them are stacked in it."""
    is_transposed: bool = False
    """Whether each expert lies as inputs by outputs."""

    @property
    def name(self) -> str:
        """Of the layer, or of the tensor."""
        return self.source.name

    @property
    def is_blocks(self) -> bool:
        """Whether the source holds blocks of GGUF."""
        stored = self.source.tensors.get("weight")
        return stored is not None and stored.is_blocks

    def take(self, value: Value, rows: Tensor) -> Value:
        """Return the ``rows``, int64 [R'], of ``value``, what the source holds."""
        if isinstance(value, QuantizedWeight):
            return rows_of(value, rows)
        if not self.is_transposed:
            return value.reshape(self.rows, self.columns)[rows]
        height = self.rows // self.experts
        return value[rows // height, :, rows % height]


@dataclass(frozen=True, eq=False)
class Piece:
    """Rows of a unit that stand one after another in a tensor of the file."""

    unit: Unit
    order: Tensor | None
    """Which rows, int64; None for all of them in their order."""

    @property
    def count(self) -> int:
        """How many rows."""
        return self.unit.rows if self.order is None else self.order.numel()

    def chunks(self, weights: int) -> Iterator[Tensor]:
        """Yield the rows, int64, of about ``weights`` numbers at a time."""
        step = max(1, weights // max(1, self.unit.columns))
        for start in range(0, self.count, step):
            stop = min(start + step, self.count)
            yield torch.arange(start, stop) if self.order is None else self.order[start:stop]


@dataclass(frozen=True, eq=False)
class Assembly:
    """A tensor of the file before its type is known."""

    name: str
    shape: tuple[int, ...]
    """As transformers has it: outputs before inputs."""
    pieces: tuple[Piece, ...]

    @property
    def columns(self) -> int:
        """Numbers of one row, as blocks divide it."""
        return self.shape[-1]

    @property
    def row_width(self) -> int:
        """Numbers of one row of a piece; of a vector 1."""
        return self.pieces[0].unit.columns

    @property
    def row_count(self) -> int:
        """Rows of all pieces."""
        return sum(piece.count for piece in self.pieces)

    @property
    def count(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Assemblies:
    """All tensors of the file that are made of tensors of the checkpoint."""

    tensors: tuple[Assembly, ...]
    left_out: Mapping[str, int]
    """Why tensors of the checkpoint are left out -> how many."""


def assemble(checkpoint: Checkpoint, layout: Layout | None, config: ModelConfig) -> Assemblies:
    """Return what the file is made of.

    Raises: CheckpointRefused, when a tensor has no place in it, or an expert is missing.
    """
    architecture = config.architecture
    parts: dict[str, list[tuple[Target, Unit]]] = {}
    left_out: dict[str, int] = {}
    for item in _items(checkpoint, layout):
        reason = _reason_left_out(checkpoint, item.name)
        if reason:
            left_out[reason] = left_out.get(reason, 0) + 1
            continue
        unit = _unit(checkpoint, architecture, item)
        if not unit.targets:
            raise CheckpointRefused(
                "E_GGUF_TENSOR",
                f"`{item.name}` has no place in a GGUF file of `{architecture.name}`",
                hint="llama.cpp would leave it out; convert to another format",
            )
        for target in unit.targets:
            parts.setdefault(target.name, []).append((target, unit))
    tensors = tuple(_assembly(config, name, found) for name, found in parts.items())
    return Assemblies(tensors, left_out)


def _items(checkpoint: Checkpoint, layout: Layout | None) -> Iterator[QuantizedModule | TensorInfo]:
    """Yield the quantized layers and all other tensors, in the order of the files."""
    by_tensor = _modules_by_tensor(layout) if layout else {}
    begun: set[str] = set()
    for name, tensor in checkpoint.tensors.items():
        module = by_tensor.get(name)
        if module is None:
            yield tensor
        elif module.name not in begun:
            begun.add(module.name)
            yield module


def _modules_by_tensor(layout: Layout) -> dict[str, QuantizedModule]:
    """Return the layer of each tensor but biases, by the tensor's name."""
    return {
        tensor.name: module
        for module in layout.modules.values()
        for suffix, tensor in module.tensors.items()
        if suffix != "bias"
    }


def _reason_left_out(checkpoint: Checkpoint, name: str) -> str:
    if is_cache_tensor(name):
        return "scales of the KV cache, which GGUF has no place for"
    if name.endswith(COMPUTED):
        return "computed from the config"
    if checkpoint.tied_embeddings and name in ("lm_head", "lm_head.weight"):
        return "the output head, which is tied to the embeddings"
    return ""


def _unit(
    checkpoint: Checkpoint, architecture: Architecture, item: QuantizedModule | TensorInfo
) -> Unit:
    if isinstance(item, QuantizedModule):
        rows, columns = item.shape
        targets = targets_of(architecture, item.name, "weight")
        return Unit(Source.of(checkpoint, item), targets, rows, columns, item.experts)
    return _tensor_unit(architecture, item, Source.of(checkpoint, item))


def _tensor_unit(architecture: Architecture, item: TensorInfo, source: Source) -> Unit:
    name, suffix = _split(item.name)
    targets = targets_of(architecture, name, suffix)
    is_stack = name.endswith(STACKS)
    shape = item.shape
    if is_stack and suffix == "bias":
        return Unit(source, targets, item.count, 1, shape[0])
    if is_stack and len(shape) == 3:
        is_transposed = architecture.experts == "stacked"
        height, columns = shape[:0:-1] if is_transposed else shape[1:]
        return Unit(source, targets, shape[0] * height, columns, shape[0], is_transposed)
    if len(shape) > 1:
        return Unit(source, targets, item.count // shape[-1], shape[-1])
    return Unit(source, targets, item.count, 1)


def _split(name: str) -> tuple[str, str]:
    """Return the module and the suffix of a tensor's name."""
    if name.endswith((SINKS, *STACKS)):
        return name, "weight"
    stack = name.removesuffix("_bias")
    if stack.endswith(STACKS):
        return stack, "bias"
    module, _, suffix = name.rpartition(".")
    return module, suffix


def _assembly(config: ModelConfig, name: str, found: Sequence[tuple[Target, Unit]]) -> Assembly:
    pieces = {target.expert: _piece(config, target, unit) for target, unit in found}
    if None not in pieces:
        return _experts_assembly(config, name, pieces, len(found))
    unit = found[0][1]
    if len(found) > 1:
        raise _damaged(f"`{name}` would be made of `{unit.name}` and of `{found[1][1].name}`")
    piece = pieces[None]
    is_stack = unit.experts > 1 or unit.name.endswith(STACKS)
    rows = (unit.experts, piece.count // unit.experts) if is_stack else (piece.count,)
    return Assembly(name, _with_columns(rows, unit), (piece,))


def _experts_assembly(
    config: ModelConfig, name: str, pieces: Mapping[int | None, Piece], count: int
) -> Assembly:
    """Return the tensor that stacks ``pieces``, one for each expert.

    Args:
        config: of the model.
        name: of the tensor.
        pieces: the number of each expert -> its rows.
        count: how many were found, those of the same number included.
    Raises: CheckpointRefused, when one is missing, given twice, or of another shape.
    """
    experts = config.experts
    if sorted(expert for expert in pieces if expert is not None) != list(range(experts)):
        raise _damaged(f"`{name}` needs {experts} experts, and there are {len(pieces)}")
    ordered = tuple(pieces[expert] for expert in range(experts))
    sizes = {(piece.count, piece.unit.columns) for piece in ordered}
    if len(sizes) > 1 or count > experts:
        raise _damaged(f"the experts of `{name}` differ in shape, or one is given twice")
    first = ordered[0]
    return Assembly(name, _with_columns((experts, first.count), first.unit), ordered)


def _with_columns(rows: tuple[int, ...], unit: Unit) -> tuple[int, ...]:
    """Return the shape of a tensor of ``rows``, each as wide as those of ``unit``."""
    is_vector = unit.columns == 1
    return rows if is_vector else (*rows, unit.columns)


def _piece(config: ModelConfig, target: Target, unit: Unit) -> Piece:
    architecture = config.architecture
    if target.parts > 1:
        rows = torch.arange(unit.rows)
        if architecture.experts == "stacked":
            return Piece(unit, rows[target.part :: target.parts])
        parted = rows.view(unit.experts, target.parts, -1)
        return Piece(unit, parted[:, target.part].reshape(-1))
    if field := architecture.permuted_heads(stem_of(target.name)):
        heads = config.values.get(field) or config.heads
        # the two halves of a head alternate in ggml's rotary embedding
        halves = torch.arange(unit.rows).view(heads, 2, -1)
        return Piece(unit, halves.transpose(1, 2).reshape(-1))
    return Piece(unit, None)


def _damaged(message: str) -> CheckpointRefused:
    return CheckpointRefused(
        "E_GGUF_EXPERTS", message, hint="compare the files with what was published"
    )
