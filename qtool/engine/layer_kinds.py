"""Which decoder layers launch the same kernels: passes that are there to have kernels compiled or
loaded run one layer of each kind.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from functools import partial

from torch import nn

from qtool.errors import one_line

LOG = logging.getLogger("qtool.engine")
NUMBER = "layer_idx"  # an attribute that differs in all layers, and changes no kernel


def kind_of(layer: nn.Module) -> Hashable:
    """Return what two layers have in common if they launch the same kernels: the modules in them,
    the shapes and dtypes of their tensors, and their settings.

    Layers that differ in a setting of no importance are of two kinds.
    """
    return tuple((name, _describe_module(module)) for name, module in layer.named_modules())


def repeats(layers: Sequence[nn.Module]) -> dict[int, int]:
    """Return, for each layer that launches what an earlier one does, the number of the earlier one:
    both are of one kind, and so are the layers before them, whose outputs they take. None for
    layers that `torch.compile` runs.
    """
    found: dict[int, int] = {}
    firsts: dict[tuple[Hashable, Hashable], int] = {}
    before: Hashable = None
    if any(layer._compiled_call_impl is not None for layer in layers):
        return found  # `torch.compile` would begin anew
    for number, layer in enumerate(layers):
        kind = kind_of(layer)
        first = firsts.setdefault((before, kind), number)
        if first != number:
            found[number] = first
        before = kind
    return found


@contextmanager
def without(repeated: Mapping[int, int], layers: Sequence[nn.Module]) -> Iterator[None]:
    """Let the ``layers`` that are ``repeated`` return what the earlier ones returned last, for as
    long as the context lasts.
    """
    outputs: dict[int, object] = {}

    def keep(number: int, _module: nn.Module, _given: object, output: object) -> None:
        outputs[number] = output

    handles = [
        layers[number].register_forward_hook(partial(keep, number))
        for number in {*repeated.values()}
    ]
    try:
        for number, first in repeated.items():
            # in place of the method: the layer keeps its place and its attributes, which the code
            # of the model may look at
            vars(layers[number])["forward"] = partial(_return_kept, outputs, first)
        yield
    finally:
        for number in repeated:
            vars(layers[number]).pop("forward", None)
        for handle in handles:
            handle.remove()


def run_short(layers: Sequence[nn.Module], run: Callable[[], object]) -> None:
    """Call ``run`` without the layers that repeat others; with all, if the code of the model cannot
    do without.
    """
    try:
        with without(repeats(layers), layers):
            run()
    except Exception as error:  # the code of an architecture may raise anything
        LOG.debug("all layers are warmed up: %s", one_line(error))
        run()


def _return_kept(outputs: dict[int, object], first: int, *_: object, **__: object) -> object:
    return outputs[first]


def _describe_module(module: nn.Module) -> Hashable:
    tensors = tuple(
        (name, None if tensor is None else (tensor.shape, tensor.dtype))
        for name, tensor in (*module._parameters.items(), *module._buffers.items())
    )
    settings = tuple(
        (name, _describe(value))
        for name, value in sorted(vars(module).items())
        if name != NUMBER and not name.startswith("_")
    )
    return type(module), tensors, settings


def _describe(value: object) -> Hashable:
    """Return a setting; of anything else its type."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, tuple):
        return type(value), *map(_describe, value)
    if is_dataclass(value) and type(value).__module__.startswith("qtool."):
        named = ((each.name, getattr(value, each.name)) for each in fields(value))
        return type(value), *((name, _describe(own)) for name, own in named if name != NUMBER)
    return type(value).__qualname__
