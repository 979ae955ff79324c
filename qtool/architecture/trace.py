"""Which linear layers a model calls (`trace_linears`), and what reads the output of a norm
(`trace_norms`), seen in a pass without data.
"""

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
    try:
        _run_without_data(model, forget=calls.names.clear)
    finally:
        for handle in handles:
            handle.remove()
    names = [tuple(each) for each in calls.names.values()]
    return Trace(frozenset(itertools.chain.from_iterable(names)), tuple(filter(_is_shared, names)))


def trace_norms(model: PreTrainedModel) -> dict[str, list[str]]:
    """Run ``model`` on two tokens without data; return the norms whose output modules with
    parameters read as it is -> these modules, in order of use.

    Raises: whatever the model does when it needs data, or more than tokens.
    """
    outputs: dict[int, str] = {}
    readers: dict[str, list[str]] = {}
    alive: list[Tensor] = []  # so that no two tensors get the same storage

    def note_norm(name: str) -> Callable[..., None]:
        def note(module: nn.Module, args: object, output: Tensor) -> None:
            alive.append(output)
            outputs[output.untyped_storage()._cdata] = name

        return note

    def note_reader(name: str) -> Callable[..., None]:
        def note(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
            first = next(iter((*args, *kwargs.values())), None)
            if isinstance(first, Tensor):
                alive.append(first)
                norm = outputs.get(first.untyped_storage()._cdata)
                if norm is not None:
                    readers.setdefault(norm, []).append(name)

        return note

    handles = []
    for name, module in model.named_modules():
        own = [parameter.dim() for parameter in module.parameters(recurse=False)]
        if own and max(own) == 1 and "norm" in type(module).__name__.lower():
            handles.append(module.register_forward_hook(note_norm(name)))
        elif own:
            handles.append(module.register_forward_pre_hook(note_reader(name), with_kwargs=True))
    try:
        _run_without_data(model, forget=readers.clear)
    finally:
        for handle in handles:
            handle.remove()
    return readers


def _run_without_data(model: PreTrainedModel, *, forget: Callable[[], None]) -> None:
    """Run ``model`` on two tokens, on the meta device, where its weights are. If it does not run
    there, call ``forget`` and run it with fake tensors, which takes ten times as long.

    Args:
        forget: discards what hooks have collected.
    """
    experts = getattr(model.config, "_experts_implementation", None)
    try:
        model.config._experts_implementation = "batched_mm"  # the one that does not look at data
        with torch.no_grad():
            try:
                _run_on_meta(model)
            except Exception:  # the code of any architecture
                forget()
                _run_on_fake_tensors(model)
    finally:
        model.config._experts_implementation = experts


def _run_on_meta(model: PreTrainedModel) -> None:
    with torch.device("meta"):
        tokens = torch.zeros(1, 2, dtype=torch.long)
        # a 4D mask is used as it is; to make one, transformers reads data
        mask = torch.zeros(1, 1, 2, 2)
        model(input_ids=tokens, attention_mask=mask, use_cache=False)


def _run_on_fake_tensors(model: PreTrainedModel) -> None:
    """Run ``model`` with fake tensors on the CPU in place of its weights; transformers knows that
    they have no data.
    """
    with FakeTensorMode():
        state = {
            name: torch.empty(tensor.shape, dtype=tensor.dtype)
            for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers())
        }
        tokens = torch.zeros(1, 2, dtype=torch.long)
        functional_call(model, state, (), {"input_ids": tokens, "use_cache": False})


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
