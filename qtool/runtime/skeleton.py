"""`Skeleton`: the transformers model of a checkpoint without data, and where its layers go."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from qtool.architecture.meta import build_model, check_report, quiet_loading
from qtool.architecture.mtp import moved_name
from qtool.architecture.names import names_in, towers
from qtool.architecture.trace import Trace, trace_linears
from qtool.checkpoint import Checkpoint
from qtool.errors import CheckpointRefused
from qtool.formats import Layout
from qtool.name_map import LinearWeight
from qtool.runtime.causal_lm import CausalLM, ModelConfig

OTHER_MODEL = "config.json and the weights may be of different models: take both from one place"


class Skeleton:
    """The transformers model of a checkpoint, without data.

    Args:
        checkpoint: the checkpoint.
        layout: what `formats.detect` returned.
        dtype: what unquantized layers compute in.
        moved: the name of a module in the checkpoint, and the one that transformers gets for it.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        layout: Layout | None,
        dtype: torch.dtype,
        moved: tuple[str, str] | None = None,
    ) -> None:
        self.checkpoint = checkpoint
        self.dtype = dtype
        self._moved = moved
        model = build_model(checkpoint)
        self.model: CausalLM = model
        self.config: ModelConfig = model.config
        self.names = names_in(model, checkpoint, layout, moved=moved)
        self.towers = towers(model)
        """Modules beside the language model, which are not loaded."""
        self._modules: Mapping[str, nn.Module] = dict(model.named_modules())

    def target(self, name: str) -> LinearWeight:
        """Return where the layer that the checkpoint calls ``name`` goes, a linear one or one of
        embeddings; a stack of experts counts as one layer.

        Raises: CheckpointRefused, when the model has no place for it.
        """
        if name in self.names.linears:
            return self.names.linears[name]
        if name in self.names.stacks:
            first = self.names.stacks[name][0]
            # the outputs of an expert are all in one matrix, in the model's order
            return replace(first, expert=None, part=0, parts=1, is_interleaved=False)
        if name in self.names.embeddings:
            return self.names.embeddings[name]
        found = self.names.not_linear.get(name) or self.names.not_linear.get(f"{name}.weight")
        raise CheckpointRefused(
            "E_NO_LINEAR",
            f"{self.checkpoint.source}: `{name}` is quantized, but the model has "
            f"{found or 'nothing'} in its place instead of a linear layer",
            hint=OTHER_MODEL,
        )

    def module(self, name: str) -> nn.Module:
        """Return the module ``name`` of the model, without data."""
        return self._modules[name]

    def is_loaded(self, tensor: str) -> bool:
        """Whether the language model loads ``tensor``; layers for multi-token prediction and other
        towers are left out.
        """
        return tensor not in self.names.unused and tensor not in self.names.towers

    def missing_experts(self, targets: Iterable[LinearWeight]) -> list[str]:
        """Return which experts, or parts of them, the stacks of ``targets`` still lack."""
        present: dict[tuple[str, str, int], set[tuple[int | None, int]]] = {}
        for target in targets:
            if target.parameter and not target.is_stacked:
                stack = (target.module, target.parameter, target.parts)
                present.setdefault(stack, set()).add((target.expert, target.part))
        missing = []
        for (module, parameter, parts), found in sorted(present.items()):
            count = self._modules[module].get_parameter(parameter).shape[0]
            wanted = set(itertools.product(range(count), range(parts)))
            missing += [
                f"{module}.{parameter}, expert {expert}, part {part}"
                for expert, part in sorted(wanted - found)
            ]
        return missing

    def trace(self) -> Trace:
        """Run the model without data, as `trace_linears` does."""
        return trace_linears(self.model)

    def materialize(
        self, removed: Collection[LinearWeight], state: dict[str, Tensor], device: torch.device
    ) -> CausalLM:
        """Return the model on ``device`` with its unquantized weights.

        Args:
            removed: the layers that the caller will put in; they are left out.
            state: all other weights of the language model.
            device: where the model goes.
        Raises: CheckpointRefused, when ``state`` does not fit the model.
        """
        from transformers import GenerationConfig

        state = {moved_name(name, self._moved): tensor for name, tensor in state.items()}
        head = self.model.get_output_embeddings()
        if any(self._modules[target.module] is head for target in removed):
            self._untie_head()
        if any(target.parameter for target in removed):
            # one expert after another, through `linear`
            self.config._experts_implementation = "eager"
        model_class = type(self.model)
        # a subclass for as long as loading takes: transformers then never asks for the weights of
        # the layers that are left out
        without = _class_without(model_class, removed, self.towers)
        with quiet_loading():
            model, report = without.from_pretrained(
                None,
                config=self.config,
                state_dict=state,
                dtype=self.dtype,
                device_map={"": device},
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
        model.__class__ = model_class
        for tower in self.towers:  # some models ask for the device of theirs
            model.get_submodule(tower).device = device
        check_report(self.checkpoint, report)
        if (self.checkpoint.path / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(self.checkpoint.path)
        loaded: CausalLM = model
        return loaded.requires_grad_(False).eval()

    def _untie_head(self) -> None:
        """Give the model an output head of its own, whatever the config says."""
        self.config.tie_word_embeddings = False
        self.config.get_text_config().tie_word_embeddings = False


def _class_without(
    model_class: type, removed: Collection[LinearWeight], towers: Collection[str]
) -> Any:
    """Return a subclass of ``model_class`` whose models lack the layers at ``removed`` and
    ``towers``.
    """

    def initialize(model: nn.Module, config: ModelConfig) -> None:
        model_class.__init__(model, config)  # type: ignore[misc]
        for tower in towers:
            _replace(model, tower)
        for target in removed:
            _remove(model, target)

    members = {
        "__init__": initialize,
        "__module__": model_class.__module__,
        "__qualname__": model_class.__qualname__,
    }
    return type(model_class.__name__, (model_class,), members)


def _remove(model: nn.Module, target: LinearWeight) -> None:
    """Take the layer ``target`` out of ``model``, and keep transformers from initializing it."""
    if target.parameter:
        holder = model.get_submodule(target.module)
        holder._parameters.pop(target.parameter, None)
        # or transformers would look for the parameter, to give it random numbers
        holder._is_hf_initialized = True  # type: ignore[assignment]
    else:
        _replace(model, target.module)


def _replace(model: nn.Module, name: str) -> None:
    """Take the module ``name`` out of ``model``."""
    model.set_submodule(name, nn.Identity())
    holder = model.get_submodule(name.rpartition(".")[0])
    holder._is_hf_initialized = True  # type: ignore[assignment]
