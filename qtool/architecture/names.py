"""The name map of a checkpoint, as transformers loads it.

The class that the config names is built without data; every tensor of the checkpoint goes through
the conversion mapping with which transformers loads it; a pass without data shows which layers are
called.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call

from qtool.architecture.meta import build_model
from qtool.checkpoint import Checkpoint
from qtool.checkpoint.model import TensorInfo
from qtool.modules import NOT_TEXT, is_mtp_layer
from qtool.name_map import GATED, LinearWeight, NameMap

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.core_model_loading import WeightConverter

STACKS = ("gate_up_proj", "up_proj", "down_proj")
STACKING = (["MergeModulelist"], ["MergeModulelist", "Concatenate"])
MTP = "multi-token prediction"


def names_from_model(checkpoint: Checkpoint) -> NameMap:
    """Return the name map of ``checkpoint``.

    Raises: CheckpointRefused, when transformers cannot build the model.
    """
    mapper = _Mapper(checkpoint, build_model(checkpoint))
    for tensor in checkpoint.tensors.values():
        mapper.place(tensor)
    return NameMap(mapper.linears, mapper.unused, mapper.not_linear, mapper.renamed)


class _Mapper:
    """Finds the place of one tensor after another."""

    def __init__(self, checkpoint: Checkpoint, model: PreTrainedModel) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        self.linears: dict[str, LinearWeight] = {}
        self.unused: dict[str, str] = {}
        self.not_linear: dict[str, str] = {}
        self.renamed: dict[str, str] = {}
        self._checkpoint = checkpoint
        self._model = model
        self._modules = dict(model.named_modules())
        self._parameters = model.state_dict()
        mapping = get_model_conversion_mapping(model)
        self._renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        self._text = _text_part(model)
        self._uncalled = _uncalled(model)

    def place(self, tensor: TensorInfo) -> None:
        """Find what the model does with ``tensor``."""
        renamed = self._renamed(tensor.name)
        parameter, converter = self._target(tensor.name, renamed)
        if parameter not in self._parameters:
            self.unused[tensor.name] = self._why_unused(tensor.name)
        elif converter is None:
            self._place_as_it_is(tensor, parameter)
        else:
            self._place_converted(tensor, renamed, parameter, converter)

    def _renamed(self, name: str) -> str:
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

    def _place_as_it_is(self, tensor: TensorInfo, parameter: str) -> None:
        if parameter != tensor.name:
            self.renamed[parameter] = tensor.name
        module, _, last = parameter.rpartition(".")
        holder = self._modules[module]
        if isinstance(holder, nn.Linear) and last == "weight":
            self._add(tensor, module)
        elif len(tensor.shape) == 3 and last in STACKS:
            self._add_stack(tensor, module, last)
        elif len(tensor.shape) > 1 and not isinstance(holder, nn.Embedding):
            self.not_linear[tensor.name] = f"{type(holder).__name__}, not Linear"

    def _place_converted(
        self, tensor: TensorInfo, renamed: str, parameter: str, converter: WeightConverter
    ) -> None:
        """Place a tensor that transformers changes: one expert of a stack, or all of them."""
        operations = [type(operation).__name__ for operation in converter.operations]
        holder, _, attribute = parameter.rpartition(".")
        if operations in STACKING and len(tensor.shape) == 2:
            part, expert = _expert_of(renamed, converter.source_patterns)
            name = _layer_name(tensor.name)
            self.linears[name] = LinearWeight(
                name,
                (tensor.shape[0], tensor.shape[1]),
                tensor.name,
                holder,
                attribute,
                expert=expert,
                part=part,
                parts=len(converter.source_patterns),
            )
        elif operations == ["Transpose"] and len(tensor.shape) == 3 and attribute in STACKS:
            self._add_stack(tensor, holder, attribute)
        elif len(tensor.shape) > 1:
            self.not_linear[tensor.name] = f"transformers converts it by {', '.join(operations)}"

    def _add(self, tensor: TensorInfo, module: str) -> None:
        name = _layer_name(tensor.name)
        rows, columns = tensor.shape
        reason = ""
        if module in self._uncalled:
            reason = "its module multiplies with the weight by itself"
        elif self._is_tower(module):
            reason = NOT_TEXT
        self.linears[name] = LinearWeight(name, (rows, columns), tensor.name, module, reason=reason)

    def _is_tower(self, module: str) -> bool:
        is_text = not self._text or module.startswith(f"{self._text}.")
        return not is_text and self._modules[module] is not self._model.get_output_embeddings()

    def _add_stack(self, tensor: TensorInfo, module: str, parameter: str) -> None:
        """Add every expert of a stack, as the layers that libraries and engines make of it."""
        holder = self._modules[module]
        stacked = holder.get_parameter(parameter).shape
        transposed = self._is_transposed(holder, parameter) ^ (tuple(stacked) != tensor.shape)
        experts, first, second = tensor.shape
        rows, columns = (second, first) if transposed else (first, second)
        kinds = GATED if parameter == "gate_up_proj" else (parameter,)
        stem = _layer_name(tensor.name).rpartition(".")[0]
        for expert in range(experts):
            for part, kind in enumerate(kinds):
                name = f"{stem}.{expert}.{kind}"
                self.linears[name] = LinearWeight(
                    name,
                    (rows // len(kinds), columns),
                    tensor.name,
                    module,
                    parameter,
                    expert=expert,
                    part=part,
                    parts=len(kinds),
                    is_stacked=True,
                    is_transposed=transposed,
                    is_interleaved=len(kinds) > 1 and not getattr(holder, "is_concatenated", True),
                )

    def _is_transposed(self, holder: nn.Module, parameter: str) -> bool:
        """Whether the model stacks [E, inputs, outputs]: its class says so, or the shape does."""
        said = getattr(holder, "is_transposed", None)
        if isinstance(said, bool):
            return said
        hidden = self._model.config.get_text_config().hidden_size
        _, rows, columns = holder.get_parameter(parameter).shape
        if parameter == "down_proj":
            rows, columns = columns, rows
        return bool(rows == hidden != columns)


def _layer_name(tensor: str) -> str:
    return tensor.removesuffix(".weight")


def _expert_of(renamed: str, patterns: Sequence[str]) -> tuple[int, int]:
    """Return which of ``patterns`` the name ``renamed`` matches, and the number of its expert."""
    for part, pattern in enumerate(patterns):
        found = re.search(pattern.replace("*", r"(\d+)"), renamed)
        if found and found.groups():
            return part, int(found[1])
    raise AssertionError(f"{renamed} matches none of {patterns}")


def _text_part(model: PreTrainedModel) -> str:
    """Return the name of the language model in a model with other towers; empty if it is alone."""
    if model.config.get_text_config() is model.config:
        return ""
    decoder = model.get_decoder()
    return next((name for name, module in model.named_modules() if module is decoder), "")


def _uncalled(model: PreTrainedModel) -> set[str]:
    """Return the linear layers that a pass does not call, though it calls others beside them.

    Their parent reads their weight and multiplies by itself, as Mamba does with ``dt_proj``. Empty
    for a model that cannot run without data.
    """
    called: set[str] = set()
    linears = [name for name, each in model.named_modules() if isinstance(each, nn.Linear)]
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda *_, name=name, **__: called.add(name), with_kwargs=True
        )
        for name in linears
    ]
    experts = getattr(model.config, "_experts_implementation", None)
    try:
        model.config._experts_implementation = "batched_mm"  # the one that does not look at data
        with torch.no_grad(), FakeTensorMode():
            # on the CPU: on the meta device transformers looks for data in its masks
            state = {
                name: torch.empty(tensor.shape, dtype=tensor.dtype)
                for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers())
            }
            tokens = torch.zeros(1, 2, dtype=torch.long)
            functional_call(model, state, (), {"input_ids": tokens, "use_cache": False})
    except Exception:  # a model that looks at data, or takes more than tokens
        return set()
    finally:
        model.config._experts_implementation = experts
        for handle in handles:
            handle.remove()
    beside = {name.rpartition(".")[0] for name in called}
    return {name for name in linears if name not in called and name.rpartition(".")[0] in beside}
