"""`Skeleton`: a model of transformers without data, which knows where each tensor goes."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from qtool.architecture.meta import (
    building,
    check_report,
    quiet_imports,
    quiet_loading,
    read_config,
)
from qtool.checkpoint import Checkpoint
from qtool.errors import CheckpointRefused
from qtool.runtime.causal_lm import CausalLM, ModelConfig

OTHER_MODEL = "config.json and the weights may be of different models: take both from one place"


@dataclass(frozen=True)
class Place:
    """Where a linear layer of a checkpoint goes in the model."""

    module: str
    """A linear layer; for experts that the model stacks in one tensor, the holder of the tensor."""
    parameter: str = ""
    """The name of the stack of experts in its module."""
    expert: int | None = None
    """The number of the expert; None for all experts together."""
    part: int = 0
    """The position among the layers of an expert whose outputs lie side by side (gate, up)."""
    parts: int = 1
    """How many such layers an expert has."""


class Skeleton:
    """The transformers model of a checkpoint, without data."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
        with quiet_imports():
            from transformers import AutoModelForCausalLM
            from transformers.conversion_mapping import get_model_conversion_mapping
            from transformers.core_model_loading import WeightConverter, WeightRenaming

        self.checkpoint, self.dtype = checkpoint, dtype
        # and not the meta device, on whose masks transformers would look for data
        self._no_data = FakeTensorMode()
        with building(checkpoint):
            config = read_config(checkpoint)
            with self._no_data:
                model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        self.config: ModelConfig = config
        self.model: CausalLM = model
        self.modules: Mapping[str, nn.Module] = dict(self.model.named_modules())
        self._parameters = self.model.state_dict()
        mapping = get_model_conversion_mapping(self.model)
        self._renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]

    def place(self, name: str) -> Place:
        """Return where the linear layer that the checkpoint calls ``name`` goes.

        Raises: CheckpointRefused, when the model has no place for it.
        """
        from transformers.core_model_loading import rename_source_key

        found, pattern = rename_source_key(
            f"{name}.weight",
            self._renamings,
            self._converters,
            self.model.base_model_prefix,
            self._parameters,
        )
        if f"{name}.weight" in self._parameters and found not in self._parameters:
            found, pattern = f"{name}.weight", None
        if pattern is not None:
            return self._place_expert(name, found, pattern)
        module = found.removesuffix(".weight")
        if isinstance(self.modules.get(module), nn.Linear):
            return Place(module)
        holder, _, parameter = module.rpartition(".")
        if module in self._parameters and self._parameters[module].dim() == 3:
            return Place(holder, parameter)
        what = type(self.modules[module]).__name__ if module in self.modules else "nothing"
        raise CheckpointRefused(
            "E_NO_LINEAR",
            f"{self.checkpoint.path}: `{name}` is quantized, but the model has {what} in its "
            "place instead of a linear layer",
            hint=OTHER_MODEL,
        )

    def _place_expert(self, name: str, parameter: str, pattern: str) -> Place:
        """Return the place of one expert of a stack that transformers makes of ``pattern``."""
        converter = next(entry for entry in self._converters if pattern in entry.source_patterns)
        operations = [type(operation).__name__ for operation in converter.operations]
        expert = re.search(
            re.escape(pattern.removesuffix(".weight")).replace(r"\*", r"(\d+)") + "$", name
        )
        if (
            operations not in (["MergeModulelist"], ["MergeModulelist", "Concatenate"])
            or expert is None
        ):
            message = (
                f"{self.checkpoint.path}: transformers converts `{name}` to `{parameter}` by "
                f"{', '.join(operations)}, which qtool does not support"
            )
            raise CheckpointRefused(
                "E_NO_LINEAR", message, hint="open an issue that names the model"
            )
        holder, _, attribute = parameter.rpartition(".")
        self._expert_count(parameter)
        return Place(
            module=holder,
            parameter=attribute,
            expert=int(expert[1]),
            part=converter.source_patterns.index(pattern),
            parts=len(converter.source_patterns),
        )

    def _expert_count(self, parameter: str) -> int:
        if parameter not in self._parameters:
            raise CheckpointRefused(
                "E_NO_LINEAR",
                f"{self.checkpoint.path} has experts for `{parameter}`, which the model lacks",
                hint=OTHER_MODEL,
            )
        return int(self._parameters[parameter].shape[0])

    def missing_experts(self, places: Collection[Place]) -> list[str]:
        """Return which experts, or parts of them, the stacks at ``places`` still lack."""
        present: dict[tuple[str, str, int], set[tuple[int | None, int]]] = {}
        for place in places:
            if place.parameter:
                stack = (place.module, place.parameter, place.parts)
                present.setdefault(stack, set()).add((place.expert, place.part))
        missing = []
        for (module, parameter, parts), found in sorted(present.items()):
            if found == {(None, 0)}:  # all of them together
                continue
            count = self._expert_count(f"{module}.{parameter}")
            wanted = set(itertools.product(range(count), range(parts)))
            missing += [
                f"{module}.{parameter}, expert {expert}, part {part}"
                for expert, part in sorted(wanted - found)
            ]
        return missing

    def trace(self) -> tuple[set[str], list[list[str]]]:
        """Run the model without data, to see which linear layers are called, and with what.

        Returns: the names of the layers that are called, and lists of those that share an input,
            in order of use. A layer that is not called has its weight read by its parent.
        Raises: whatever the model does when it needs data.
        """
        calls = _Calls()
        handles = [
            module.register_forward_pre_hook(calls.hook(name), with_kwargs=True)
            for name, module in self.modules.items()
            if isinstance(module, nn.Linear)
        ]
        experts = self.config._experts_implementation
        # the only one that does not look at data
        self.config._experts_implementation = "batched_mm"
        try:
            with torch.no_grad(), self._no_data:
                self.model(input_ids=torch.zeros(1, 2, dtype=torch.long), use_cache=False)
        finally:
            self.config._experts_implementation = experts
            for handle in handles:
                handle.remove()
        names = list(calls.names.values())
        return set(itertools.chain.from_iterable(names)), [
            each for each in names if _is_shared(each)
        ]

    def materialize(
        self, removed: Collection[Place], state: dict[str, Tensor], device: torch.device
    ) -> CausalLM:
        """Return the model on ``device`` with its unquantized weights.

        Args:
            removed: the layers that the caller will put in; they are left out.
            state: all other weights of the model.
            device: where the model goes.
        Raises: CheckpointRefused, when ``state`` does not fit the model.
        """
        from transformers import GenerationConfig

        head = self.model.get_output_embeddings()
        if any(self.modules[place.module] is head for place in removed):
            self._untie_head()
        if any(place.parameter for place in removed):
            # one expert after another, through `linear`
            self.config._experts_implementation = "eager"
        model_class = type(self.model)
        # a subclass for as long as loading takes: transformers then never asks for the weights of
        # the layers that are left out
        without = _class_without(model_class, removed)
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
        check_report(self.checkpoint, report)
        if (self.checkpoint.path / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(self.checkpoint.path)
        loaded: CausalLM = model
        return loaded.requires_grad_(False).eval()

    def _untie_head(self) -> None:
        """Give the model an output head of its own, whatever the config says."""
        self.config.tie_word_embeddings = False
        self.config.get_text_config().tie_word_embeddings = False


class _Calls:
    """Notes the linear layers that are called, by parent and input."""

    def __init__(self) -> None:
        self.names: dict[tuple[str, int], list[str]] = {}
        self._alive: list[Tensor] = []  # so that no two inputs get the same id

    def hook(self, name: str) -> Callable[..., None]:
        """Return a forward pre-hook for the layer ``name``."""

        def note(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            x = args[0] if args else kwargs["input"]
            self._alive.append(x)
            self.names.setdefault((name.rpartition(".")[0], id(x)), []).append(name)

        return note


def _is_shared(names: Sequence[str]) -> bool:
    """Whether several layers, each called once, have one input."""
    return 1 < len(names) == len(set(names))


def _class_without(model_class: type, removed: Collection[Place]) -> Any:
    """Return a subclass of ``model_class`` whose models lack the layers at ``removed``."""

    def initialize(model: nn.Module, config: ModelConfig) -> None:
        model_class.__init__(model, config)  # type: ignore[misc]
        for place in removed:
            _remove(model, place)

    members = {
        "__init__": initialize,
        "__module__": model_class.__module__,
        "__qualname__": model_class.__qualname__,
    }
    return type(model_class.__name__, (model_class,), members)


def _remove(model: nn.Module, place: Place) -> None:
    """Take the layer at ``place`` out of ``model``, and keep transformers from initializing it."""
    if place.parameter:
        holder = model.get_submodule(place.module)
        holder._parameters.pop(place.parameter, None)
    else:
        model.set_submodule(place.module, nn.Identity())
        holder = model.get_submodule(place.module.rpartition(".")[0])
    # or transformers would look for the parameter, to give it random numbers
    holder._is_hf_initialized = True  # type: ignore[assignment]
