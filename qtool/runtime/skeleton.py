"""What transformers knows of a model: where each tensor of the checkpoint goes, which layers share
an input, and how the plain weights are loaded.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from qtool.checkpoint import Checkpoint
from qtool.errors import CheckpointRefused, one_line
from qtool.modules import decoder_layer_number


@dataclass(frozen=True)
class Place:
    """Where a linear layer of a checkpoint goes: a module of the model.

    Of experts that the model stacks in one tensor, ``module`` is what holds the tensor,
    ``parameter`` its name there, ``expert`` the number of the expert, None for all of them
    together, and ``part`` the position among the ``parts`` layers whose outputs lie side by side
    (gate, up).
    """

    module: str
    parameter: str = ""
    expert: int | None = None
    part: int = 0
    parts: int = 1


@contextlib.contextmanager
def quiet_imports() -> Iterator[None]:
    """Keep torchao, which comes with transformers, from telling which of its libraries do not fit
    this machine.
    """
    loggers = [logging.getLogger(name) for name in ("torchao", "torch.utils._pytree")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


class Skeleton:
    """The transformers model of a checkpoint, without data."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
        with quiet_imports():
            from transformers import AutoConfig, AutoModelForCausalLM
            from transformers.conversion_mapping import get_model_conversion_mapping
            from transformers.core_model_loading import WeightConverter, WeightRenaming

        self.checkpoint, self.dtype = checkpoint, dtype
        # and not the meta device, on whose masks transformers would look for data
        self._no_data = FakeTensorMode()
        try:
            self.config = AutoConfig.from_pretrained(checkpoint.path, trust_remote_code=False)
            if hasattr(self.config, "quantization_config"):
                del self.config.quantization_config
            with quiet_imports(), self._no_data:
                self.model = AutoModelForCausalLM.from_config(self.config, dtype=dtype).eval()
        except (
            Exception
        ) as error:  # a config comes from outside, and transformers finds many ways to fail on one
            message = (
                f"{checkpoint.path}: transformers makes no language model of its config "
                f"({one_line(error)})"
            )
            raise CheckpointRefused(
                "E_ARCHITECTURE",
                message,
                hint="qtool runs the causal language models of transformers",
            ) from error
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
            return self._among_experts(name, found, pattern)
        module = found.removesuffix(".weight")
        if isinstance(self.modules.get(module), nn.Linear):
            return Place(module)
        holder, _, parameter = module.rpartition(".")
        if module in self._parameters and self._parameters[module].dim() == 3:
            return Place(holder, parameter)
        what = type(self.modules[module]).__name__ if module in self.modules else "nothing"
        raise CheckpointRefused(
            "E_NO_LINEAR",
            f"{self.checkpoint.path}: `{name}` is quantized, and the model has {what} in its "
            "place, no linear layer",
        )

    def _among_experts(self, name: str, parameter: str, pattern: str) -> Place:
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
                f"{self.checkpoint.path}: transformers makes `{parameter}` of `{name}` by "
                f"{', '.join(operations)}, which qtool does not do"
            )
            raise CheckpointRefused(
                "E_NO_LINEAR", message, hint="open an issue that names the model"
            )
        holder, _, attribute = parameter.rpartition(".")
        self._experts_of(parameter)
        return Place(
            holder,
            attribute,
            int(expert[1]),
            converter.source_patterns.index(pattern),
            len(converter.source_patterns),
        )

    def _experts_of(self, parameter: str) -> int:
        if parameter not in self._parameters:
            raise CheckpointRefused(
                "E_NO_LINEAR",
                f"{self.checkpoint.path} has experts for `{parameter}`, which the model does not "
                "have",
            )
        return int(self._parameters[parameter].shape[0])

    def missing_experts(self, places: Collection[Place]) -> list[str]:
        """Return which experts, or parts of them, of the stacks at ``places`` are not among
        these.
        """
        missing = []
        for module, parameter, parts in sorted(
            {(place.module, place.parameter, place.parts) for place in places if place.parameter}
        ):
            there = {
                (place.expert, place.part)
                for place in places
                if (place.module, place.parameter) == (module, parameter)
            }
            if there != {(None, 0)}:
                wanted = {
                    (expert, part)
                    for expert in range(self._experts_of(f"{module}.{parameter}"))
                    for part in range(parts)
                }
                missing += [
                    f"{module}.{parameter}, expert {expert}, part {part}"
                    for expert, part in sorted(wanted - there)
                ]
        return missing

    def beyond(self, name: str) -> bool:
        """Whether the tensor or layer ``name`` belongs to a decoder layer after the last, for
        multi-token prediction.
        """
        layer = decoder_layer_number(name)
        count = self.checkpoint.text_config.get("num_hidden_layers")
        return layer is not None and isinstance(count, int) and layer >= count

    def trace(self) -> tuple[set[str], list[list[str]]]:
        """Run the model without data. Return the names of the linear layers that are called, and of
        those that multiply one input, in order of use.

        A layer that is not called has its weight read by its parent. Raises: whatever the model
        does when it needs data.
        """
        inputs: dict[tuple[str, int], list[str]] = {}
        alive: list[Tensor] = []  # so that no two inputs get the same id

        def note(name: str) -> Callable[..., None]:
            def hook(
                module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]
            ) -> None:
                alive.append(args[0] if args else kwargs["input"])
                inputs.setdefault((name.rpartition(".")[0], id(alive[-1])), []).append(name)

            return hook

        linears = {
            name: module for name, module in self.modules.items() if isinstance(module, nn.Linear)
        }
        handles = [
            module.register_forward_pre_hook(note(name), with_kwargs=True)
            for name, module in linears.items()
        ]
        experts = self.config._experts_implementation
        self.config._experts_implementation = (
            "batched_mm"  # the only one that does not look at data
        )
        try:
            with torch.no_grad(), self._no_data:
                self.model(input_ids=torch.zeros(1, 2, dtype=torch.long), use_cache=False)
        finally:
            self.config._experts_implementation = experts
            for handle in handles:
                handle.remove()
        called = {name for names in inputs.values() for name in names}
        return called, [
            names for names in inputs.values() if len(names) > 1 and len(set(names)) == len(names)
        ]

    def materialize(
        self, removed: Collection[Place], state: dict[str, Tensor], device: torch.device
    ) -> Any:
        """Return the model with its plain weights, ``state``, on ``device``; the layers at
        ``removed`` are left out for the caller to put in.

        Raises: CheckpointRefused, when ``state`` is not what the rest of the model needs.
        """
        from transformers import GenerationConfig
        from transformers.utils import logging as said

        model_class = type(self.model)

        def initialize(model: Any, config: Any) -> None:
            model_class.__init__(model, config)
            for place in removed:
                if place.parameter:
                    experts = model.get_submodule(place.module)
                    experts._parameters.pop(place.parameter, None)
                    # or transformers would look for the parameter, to give it random numbers
                    experts._is_hf_initialized = True
                else:
                    model.set_submodule(place.module, nn.Identity())
                    model.get_submodule(
                        place.module.rpartition(".")[0]
                    )._is_hf_initialized = True  # the same

        # a subclass for as long as loading takes: transformers then never asks for the weights of
        # the layers that are left out
        names = {
            "__init__": initialize,
            "__module__": model_class.__module__,
            "__qualname__": model_class.__qualname__,
        }
        without: Any = type(model_class.__name__, (model_class,), names)
        head = self.model.get_output_embeddings()
        # a head of its own, whatever the config says
        if any(self.modules[place.module] is head for place in removed):
            self.config.tie_word_embeddings = self.config.get_text_config().tie_word_embeddings = (
                False
            )
        if any(place.parameter for place in removed):
            self.config._experts_implementation = (
                "eager"  # one expert after another, through `linear`
            )
        bars, level = said.is_progress_bar_enabled(), said.get_verbosity()
        said.disable_progress_bar()  # its bar ignores whether there is a terminal
        said.set_verbosity_error()
        try:
            options = {
                "device_map": {"": device},
                "ignore_mismatched_sizes": True,
                "output_loading_info": True,
            }
            model, report = without.from_pretrained(
                None, config=self.config, state_dict=state, dtype=self.dtype, **options
            )
        finally:
            said.set_verbosity(level)
            if bars:
                said.enable_progress_bar()
        model.__class__ = model_class
        for kind, what in (
            ("missing_keys", "lacks"),
            ("unexpected_keys", "has what the model does not:"),
            ("mismatched_keys", "has in another shape"),
        ):
            if found := sorted(
                str(name[0] if isinstance(name, tuple) else name) for name in report.get(kind) or ()
            ):
                message = (
                    f"{self.checkpoint.path} {what} {len(found)} tensors, e.g. "
                    f"{', '.join(f'`{name}`' for name in found[:3])}"
                )
                raise CheckpointRefused(
                    "E_TENSORS",
                    message,
                    hint=(
                        "config.json and weights are not of one model: download or export it again"
                    ),
                )
        if (self.checkpoint.path / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(self.checkpoint.path)
        return model.requires_grad_(False).eval()
