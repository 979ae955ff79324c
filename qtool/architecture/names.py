"""The name map of a checkpoint, as transformers loads it.

The class that the config names is built without data; every tensor of the checkpoint goes through
the conversion mapping with which transformers loads it; a pass without data shows which layers are
called.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import nn

from qtool.architecture.meta import build_model
from qtool.architecture.mtp import moved_name
from qtool.architecture.standard import Shape, model_tensors
from qtool.architecture.trace import trace_linears
from qtool.checkpoint import Checkpoint
from qtool.checkpoint.expert_stacks import GATED
from qtool.formats import Layout
from qtool.modules import NOT_TEXT, is_mtp_layer
from qtool.name_map import LinearWeight, NameMap

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.core_model_loading import WeightConverter

STACKS = ("gate_up_proj", "up_proj", "down_proj")
STACKING = (["MergeModulelist"], ["MergeModulelist", "Concatenate"])
MTP = "multi-token prediction"
ONE_EXPERT = re.compile(r"(.*)\.(\d+)\.(gate_proj|up_proj|down_proj)\.(weight|bias)")


def names_from_model(checkpoint: Checkpoint, layout: Layout | None) -> NameMap:
    """Return the name map of ``checkpoint``.

    Raises: CheckpointRefused, when transformers cannot build the model.
    """
    model = build_model(checkpoint)
    # only plans ask why a layer stays in 16 bits, and they are of unquantized checkpoints
    uncalled = _uncalled(model) if layout is None else ()
    return names_in(model, checkpoint, layout, uncalled=uncalled)


def names_in(
    model: PreTrainedModel,
    checkpoint: Checkpoint,
    layout: Layout | None,
    *,
    uncalled: Collection[str] = (),
    moved: tuple[str, str] | None = None,
) -> NameMap:
    """Return the name map of ``checkpoint`` for ``model``, which was built from its config.

    Args:
        model: without data.
        checkpoint: the checkpoint; quantized layers count as the matrices they stand for.
        layout: what `formats.detect` returned.
        uncalled: linear layers of the model whose parent multiplies with the weight by itself.
        moved: the name of a module in the checkpoint, and the one that transformers gets for it.
    """
    mapper = _Mapper(checkpoint, model, uncalled, moved)
    for name, shape in model_tensors(checkpoint, layout).items():
        mapper.map(name, shape)
    return NameMap(
        linears=mapper.linears,
        unused=mapper.unused,
        not_linear=mapper.not_linear,
        renamed=mapper.renamed,
        embeddings=mapper.embeddings,
        towers=frozenset(mapper.towers),
    )


class _Mapper:
    """Finds what one tensor after another becomes in the model."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        model: PreTrainedModel,
        uncalled: Collection[str],
        moved: tuple[str, str] | None,
    ) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        self.linears: dict[str, LinearWeight] = {}
        self.embeddings: dict[str, LinearWeight] = {}
        self.unused: dict[str, str] = {}
        self.not_linear: dict[str, str] = {}
        self.renamed: dict[str, str] = {}
        self.towers: set[str] = set()
        self._checkpoint = checkpoint
        self._model = model
        self._modules = dict(model.named_modules())
        self._parameters = model.state_dict()
        mapping = get_model_conversion_mapping(model)
        self._renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        self._towers = tuple(f"{name}." for name in towers(model))
        self._uncalled = uncalled
        self._moved = moved

    def map(self, name: str, shape: Shape) -> None:
        """Find what the model does with the tensor ``name``."""
        renamed = self._renamed(name)
        parameter, converter = self._target(name, renamed)
        if parameter.startswith(self._towers):
            self.towers.add(name)
        if parameter in self._parameters and converter is None:
            self._map_as_it_is(name, shape, parameter)
        elif parameter in self._parameters and converter:
            self._map_converted(name, shape, renamed, parameter, converter)
        elif not self._map_split(name, shape, parameter):
            self.unused[name] = self._why_unused(name)

    def _renamed(self, name: str) -> str:
        name = moved_name(name, self._moved)
        for renaming in self._renamings:
            name, _ = renaming.rename_source_key(name)
        return name

    def _target(self, name: str, renamed: str) -> tuple[str, WeightConverter | None]:
        """Return the parameter that the tensor ``name`` goes to, and what converts it."""
        from transformers.core_model_loading import rename_source_key

        if name in self._parameters and renamed not in self._parameters:
            renamed = name
        found, pattern = rename_source_key(
            renamed, [], self._converters, self._model.base_model_prefix, self._parameters
        )
        if pattern is None:
            return found, None
        return found, next(each for each in self._converters if pattern in each.source_patterns)

    def _why_unused(self, name: str) -> str:
        if is_mtp_layer(self._checkpoint, name) or "mtp" in name.split("."):
            return MTP
        return f"{type(self._model).__name__} does not load it"

    def _map_as_it_is(self, name: str, shape: Shape, parameter: str) -> None:
        if parameter != name:
            self.renamed[parameter] = name
        module, _, last = parameter.rpartition(".")
        holder = self._modules[module]
        if isinstance(holder, nn.Linear) and last == "weight":
            self._add(name, shape, module)
        elif len(shape) == 3 and last in STACKS:
            self._add_stack(name, shape, module, last)
        elif isinstance(holder, nn.Embedding) and len(shape) == 2:
            layer = _layer_name(name)
            self.embeddings[layer] = LinearWeight(layer, (shape[0], shape[1]), name, module)
        elif len(shape) > 1 and not isinstance(holder, nn.Embedding):
            self.not_linear[name] = f"{type(holder).__name__}, not Linear"

    def _map_split(self, name: str, shape: Shape, parameter: str) -> bool:
        """Map a tensor of one expert that the model has in stacks alone; return whether it is."""
        found = ONE_EXPERT.fullmatch(parameter)
        if not found:
            return False
        holder, expert, kind, last = found[1], int(found[2]), found[3], found[4]
        for stack, kinds in (("gate_up_proj", GATED), (kind, (kind,))):
            if kind in kinds and f"{holder}.{stack}" in self._parameters:
                break
        else:
            return False
        if last == "weight" and len(shape) == 2:
            one = self._one_expert(name, shape, f"{holder}.{stack}", expert, kinds.index(kind))
            self.linears[one.name] = replace(
                one,
                parts=len(kinds),
                is_split=True,
                is_interleaved=self._is_interleaved(holder, kinds),
            )
        return True

    def _one_expert(
        self, tensor: str, shape: Shape, parameter: str, expert: int, part: int
    ) -> LinearWeight:
        """Return a layer of one expert, whose matrix lies apart in the checkpoint."""
        module, _, stack = parameter.rpartition(".")
        rows, columns = shape
        return LinearWeight(
            _layer_name(tensor), (rows, columns), tensor, module, stack, expert=expert, part=part
        )

    def _is_interleaved(self, holder: str, kinds: Sequence[str]) -> bool:
        return len(kinds) > 1 and not getattr(self._modules[holder], "is_concatenated", True)

    def _map_converted(
        self,
        name: str,
        shape: Shape,
        renamed: str,
        parameter: str,
        converter: WeightConverter,
    ) -> None:
        """Map a tensor that transformers changes: one expert of a stack, or all of them."""
        operations = [type(operation).__name__ for operation in converter.operations]
        holder, _, attribute = parameter.rpartition(".")
        if operations in STACKING and len(shape) == 2:
            part, expert = _expert_of(renamed, converter.source_patterns)
            one = self._one_expert(name, shape, parameter, expert, part)
            self.linears[one.name] = replace(one, parts=len(converter.source_patterns))
        elif operations == ["Transpose"] and len(shape) == 3 and attribute in STACKS:
            self._add_stack(name, shape, holder, attribute)
        elif len(shape) > 1:
            self.not_linear[name] = f"transformers converts it by {', '.join(operations)}"

    def _add(self, tensor: str, shape: Shape, module: str) -> None:
        name = _layer_name(tensor)
        reason = ""
        if module in self._uncalled:
            reason = "its module multiplies with the weight by itself"
        elif tensor in self.towers:
            reason = NOT_TEXT
        self.linears[name] = LinearWeight(name, (shape[0], shape[1]), tensor, module, reason=reason)

    def _add_stack(self, tensor: str, shape: Shape, module: str, parameter: str) -> None:
        """Add every expert of a stack, as the layers that libraries and engines make of it."""
        stacked = self._modules[module].get_parameter(parameter).shape
        transposed = self._is_transposed(module, parameter) ^ (tuple(stacked) != shape)
        experts, first, second = shape
        rows, columns = (second, first) if transposed else (first, second)
        kinds = GATED if parameter == "gate_up_proj" else (parameter,)
        stem = _layer_name(tensor).rpartition(".")[0]
        if not stem.endswith("experts"):  # as engines call them
            stem += ".experts"
        for expert in range(experts):
            for part, kind in enumerate(kinds):
                name = f"{stem}.{expert}.{kind}"
                self.linears[name] = LinearWeight(
                    name,
                    (rows // len(kinds), columns),
                    tensor,
                    module,
                    parameter,
                    expert=expert,
                    part=part,
                    parts=len(kinds),
                    is_stacked=True,
                    is_transposed=transposed,
                    is_interleaved=self._is_interleaved(module, kinds),
                )

    def _is_transposed(self, module: str, parameter: str) -> bool:
        """Whether the model stacks [E, inputs, outputs]: its class says so, or the shapes of its
        stacks do, the one in question first.
        """
        holder = self._modules[module]
        said = getattr(holder, "is_transposed", None)
        if isinstance(said, bool):
            return said
        hidden = self._model.config.get_text_config().hidden_size
        for stack in (parameter, *STACKS):
            if f"{module}.{stack}" not in self._parameters:
                continue
            _, rows, columns = holder.get_parameter(stack).shape
            side = columns if stack == "down_proj" else rows
            if rows != columns and hidden in (rows, columns):
                return bool(side == hidden)
        return False


def _layer_name(tensor: str) -> str:
    return tensor.removesuffix(".weight")


def _expert_of(renamed: str, patterns: Sequence[str]) -> tuple[int, int]:
    """Return which of ``patterns`` the name ``renamed`` matches, and the number of its expert."""
    for part, pattern in enumerate(patterns):
        found = re.search(pattern.replace("*", r"(\d+)"), renamed)
        if found and found.groups():
            return part, int(found[1])
    raise AssertionError(f"{renamed} matches none of {patterns}")


def towers(model: PreTrainedModel) -> list[str]:
    """Return the modules of ``model`` that are no part of its language model: encoders of images
    and sound, and what connects them.
    """
    if model.config.get_text_config() is model.config:
        return []
    decoder = model.get_decoder()
    path = next((name for name, module in model.named_modules() if module is decoder), "")
    kept = {model.get_output_embeddings(), model.get_input_embeddings()}
    found = []
    parts = path.split(".") if path else []
    for depth, part in enumerate(parts):
        above = ".".join(parts[:depth])
        for name, module in model.get_submodule(above).named_children():
            if name != part and module not in kept:
                found.append(f"{above}.{name}".lstrip("."))
    return found


def _uncalled(model: PreTrainedModel) -> set[str]:
    """Return the linear layers that a pass does not call, though it calls others beside them.

    Their parent reads their weight and multiplies by itself, as Mamba does with ``dt_proj``. Empty
    for a model that cannot run without data.
    """
    try:
        called = trace_linears(model).called
    except Exception:  # a model that looks at data, or takes more than tokens
        return set()
    beside = {name.rpartition(".")[0] for name in called}
    linears = [name for name, each in model.named_modules() if isinstance(each, nn.Linear)]
    return {name for name in linears if name not in called and name.rpartition(".")[0] in beside}
