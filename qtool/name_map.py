"""`NameMap`: which matrix of a checkpoint each linear layer of the model multiplies with.

`architecture` makes it; plans, backends and the check of the output use it, so that a name means
the same layer in all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from qtool.checkpoint.expert_stacks import GATED
from qtool.checkpoint.model import Checkpoint
from qtool.modules import is_linear


@dataclass(frozen=True)
class LinearWeight:
    """The matrix of one linear layer: where it lies, and where it is used."""

    name: str
    """The layer in the names of the checkpoint.

    Each expert of a stack is a layer of its own, e.g. ``model.layers.0.mlp.experts.3.gate_proj``.
    """
    shape: tuple[int, int]
    """Outputs N and inputs K."""
    tensor: str
    """The tensor that holds it."""
    module: str
    """The layer of the model; for experts in one parameter, the module that holds them."""
    parameter: str = ""
    """The parameter of ``module`` that stacks all experts; empty for a linear layer."""
    expert: int | None = None
    """The number of the expert in the stack."""
    part: int = 0
    """The position among ``parts``."""
    parts: int = 1
    """How many layers of an expert have their outputs in one matrix: gate and up."""
    is_stacked: bool = False
    """Whether ``tensor`` stacks all experts, as the model does."""
    is_split: bool = False
    """Whether the checkpoint has experts apart that transformers loads in stacks alone: quantizers
    write them, and engines read them.
    """
    is_transposed: bool = False
    """Whether the matrix lies as inputs by outputs in ``tensor``."""
    is_interleaved: bool = False
    """Whether the outputs of the parts alternate, instead of lying one part after another."""
    reason: str = ""
    """Why it stays in 16 bits, if the model says so."""

    @property
    def layer(self) -> str:
        """The layer in the names of the loaded model, where libraries take stacks of experts apart:
        e.g. ``model.layers.0.mlp.experts.3.gate_proj``.
        """
        if not self.parameter:
            return self.module
        kind = GATED[self.part] if self.parameter == "gate_up_proj" else self.parameter
        return f"{self.module}.{self.expert}.{kind}"


@dataclass(frozen=True)
class NameMap:
    """How the tensors of a checkpoint and the modules of its model correspond."""

    linears: Mapping[str, LinearWeight]
    """The linear layers, by name."""
    unused: Mapping[str, str]
    """The tensors that the model does not load -> why."""
    not_linear: Mapping[str, str]
    """Other tensors of two or more dimensions, which no linear layer multiplies with -> why."""
    renamed: Mapping[str, str]
    """Parameters of the model -> the tensors that go there as they are, where the names differ."""
    embeddings: Mapping[str, LinearWeight] = field(default_factory=dict)
    """The tables whose rows the model looks up, by name."""
    towers: frozenset[str] = frozenset()
    """The tensors of other towers than the language model, e.g. of a vision encoder."""

    @cached_property
    def stacks(self) -> Mapping[str, tuple[LinearWeight, ...]]:
        """The tensors that stack experts -> the layers in them."""
        stacks: dict[str, list[LinearWeight]] = {}
        for linear in self.linears.values():
            if linear.is_stacked:
                stacks.setdefault(linear.tensor, []).append(linear)
        return {name: tuple(linears) for name, linears in stacks.items()}


def names_from_headers(checkpoint: Checkpoint) -> NameMap:
    """Return the name map of a checkpoint whose names are those of the model's layers."""
    linears = {}
    for tensor in checkpoint.tensors.values():
        if is_linear(tensor):
            name = tensor.name.removesuffix(".weight")
            rows, columns = tensor.shape
            linears[name] = LinearWeight(name, (rows, columns), tensor.name, name)
    return NameMap(linears, unused={}, not_linear={}, renamed={})
