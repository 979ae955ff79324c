"""What transformers knows of a model: where each tensor of the checkpoint goes, which layers share an input, and how the plain weights are loaded."""

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


@dataclass(frozen=True)
class Place:
    """Where a linear layer of a checkpoint goes: a module of the model.

    Of experts that the model stacks in one tensor, ``module`` is what holds the tensor, ``parameter`` its name there, ``expert`` the number of the
    expert, None for all of them together, and ``part`` the position among the layers whose outputs lie side by side (gate, up).
    """

    module: str
    parameter: str = ""
    expert: int | None = None
    part: int = 0


@contextlib.contextmanager
def _quiet_imports() -> Iterator[None]:
    """Keep torchao, which comes with transformers, from telling which of its libraries do not fit this machine."""
    loggers = [logging.getLogger(name) for name in ("torchao", "torch.utils._pytree")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


class Skeleton:
    """The transformers model of a checkpoint, without data."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
        with _quiet_imports():
            from transformers import AutoConfig, AutoModelForCausalLM
            from transformers.conversion_mapping import get_model_conversion_mapping
            from transformers.core_model_loading import WeightConverter, WeightRenaming

        self.checkpoint, self.dtype = checkpoint, dtype
        self._no_data = FakeTensorMode()  # and not the meta device, on whose masks transformers would look for data
        try:
            self.config = AutoConfig.from_pretrained(checkpoint.path)
            if hasattr(self.config, "quantization_config"):
                del self.config.quantization_config
            with _quiet_imports(), self._no_data:
                self.model = AutoModelForCausalLM.from_config(self.config, dtype=dtype).eval()
        except (ValueError, KeyError, AttributeError, TypeError) as error:  # what transformers says of a config it cannot use
            message = f"{checkpoint.path}: transformers makes no language model of its config ({one_line(error)})"
            raise CheckpointRefused("E_ARCHITECTURE", message, hint="qtool runs the causal language models of transformers") from error
        self.modules: Mapping[str, nn.Module] = dict(self.model.named_modules())
        self._parameters = self.model.state_dict()
        mapping = get_model_conversion_mapping(self.model)
        self._renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]

    def place(self, name: str) -> Place:
        """Return where the linear layer that the checkpoint calls ``name`` goes. Raises: CheckpointRefused, when the model has no place for it."""
        from transformers.core_model_loading import rename_source_key

        found, pattern = rename_source_key(f"{name}.weight", self._renamings, self._converters, self.model.base_model_prefix, self._parameters)
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
            "E_NO_LINEAR", f"{self.checkpoint.path}: `{name}` is quantized, and the model has {what} in its place, no linear layer"
        )

    def _among_experts(self, name: str, parameter: str, pattern: str) -> Place:
        converter = next(entry for entry in self._converters if pattern in entry.source_patterns)
        operations = [type(operation).__name__ for operation in converter.operations]
        expert = re.search(re.escape(pattern.removesuffix(".weight")).replace(r"\*", r"(\d+)") + "$", name)
        if operations not in (["MergeModulelist"], ["MergeModulelist", "Concatenate"]) or expert is None:
            message = f"{self.checkpoint.path}: transformers makes `{parameter}` of `{name}` by {', '.join(operations)}, which qtool does not do"
            raise CheckpointRefused("E_NO_LINEAR", message, hint="open an issue that names the model")
        holder, _, attribute = parameter.rpartition(".")
        return Place(holder, attribute, int(expert[1]), converter.source_patterns.index(pattern))

    def sharing(self) -> list[list[str]]:
        """Return the names of linear layers of one parent that multiply the same input, found by running the model without data; in order of use."""
        inputs: dict[tuple[str, int], list[str]] = {}
        alive: list[Tensor] = []  # so that no two inputs get the same id

        def note(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
                alive.append(args[0])
                inputs.setdefault((name.rpartition(".")[0], id(args[0])), []).append(name)

            return hook

        handles = [module.register_forward_pre_hook(note(name)) for name, module in self.modules.items() if isinstance(module, nn.Linear)]
        self.config._experts_implementation = "batched_mm"  # the only one that does not look at data
        try:
            with torch.no_grad(), self._no_data:
                self.model(input_ids=torch.zeros(1, 2, dtype=torch.long), use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        return [names for names in inputs.values() if len(names) > 1 and len(set(names)) == len(names)]

    def materialize(self, removed: Collection[Place], state: dict[str, Tensor], device: torch.device) -> Any:
        """Return the model with its plain weights, ``state``, on ``device``; the layers at ``removed`` are left out for the caller to put in.

        Raises: CheckpointRefused, when ``state`` is not what the rest of the model needs.
        """
        from transformers.utils import logging as said

        model_class = type(self.model)

        def initialize(model: Any, config: Any) -> None:
            model_class.__init__(model, config)
            for place in removed:
                if place.parameter:
                    experts = model.get_submodule(place.module)
                    experts._parameters.pop(place.parameter, None)
                    experts._is_hf_initialized = True  # or transformers would look for the parameter, to give it random numbers
                else:
                    model.set_submodule(place.module, nn.Identity())

        # a subclass for as long as loading takes: transformers then never asks for the weights of the layers that are left out
        names = {"__init__": initialize, "__module__": model_class.__module__, "__qualname__": model_class.__qualname__}
        without: Any = type(model_class.__name__, (model_class,), names)
        if any(place.parameter for place in removed):
            self.config._experts_implementation = "eager"  # one expert after another, through `linear`
        bars, level = said.is_progress_bar_enabled(), said.get_verbosity()
        said.disable_progress_bar()  # its bar ignores whether there is a terminal
        said.set_verbosity_error()
        try:
            model, report = without.from_pretrained(
                None, config=self.config, state_dict=state, dtype=self.dtype, device_map={"": device}, output_loading_info=True
            )
        finally:
            said.set_verbosity(level)
            if bars:
                said.enable_progress_bar()
        model.__class__ = model_class
        wrong = {kind: sorted(map(str, report[kind]))[:5] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") if report.get(kind)}
        if wrong:
            raise CheckpointRefused("E_TENSORS", f"{self.checkpoint.path} does not fit its own config: {wrong}")
        return model.eval()
