"""`trace_linears`: which linear layers a model calls, seen in a pass without data."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Trace:
    """What a pass showed."""

    called: frozenset[str]
    """The linear layers that are called and multiply with the whole of their weight. The weights
    of others are read by their parents, or in parts.
    """
    sharing: tuple[tuple[str, ...], ...]
    """Lists of layers with one parent and one input, in order of use."""


def trace_linears(model: PreTrainedModel) -> Trace:
    """Run ``model``, which has no data, on two tokens.

    Raises: whatever the model does when it needs data, or more than tokens.
    """
    calls = _Calls()
    handles = [
        module.register_forward_hook(calls.hook(name), with_kwargs=True)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
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
    finally:
        model.config._experts_implementation = experts
        for handle in handles:
            handle.remove()
    names = [tuple(each) for each in calls.names.values()]
    return Trace(frozenset(itertools.chain.from_iterable(names)), tuple(filter(_is_shared, names)))


class _Calls:
    """Notes the linear layers that are called, by parent and input."""

    def __init__(self) -> None:
        self.names: dict[tuple[str, int], list[str]] = {}
        self._alive: list[Tensor] = []  # so that no two inputs get the same id

    def hook(self, name: str) -> Callable[..., None]:
        """Return a forward hook for the layer ``name``."""

        def note(
            module: nn.Linear, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], y: object
        ) -> None:
            if isinstance(y, Tensor) and y.shape[-1] != module.weight.shape[0]:
                return  # each group of inputs has outputs of its own, as in DeepSeek-V4
            x = args[0] if args else kwargs["input"]
            self._alive.append(x)
            self.names.setdefault((name.rpartition(".")[0], id(x)), []).append(name)

        return note


def _is_shared(names: Sequence[str]) -> bool:
    """Whether several layers, each called once, have one input."""
    return 1 < len(names) == len(set(names))
