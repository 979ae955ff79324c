"""Which decoder layers launch the same kernels. Passes that only compile or load kernels run one
layer of each kind, and skip those that repeat it.
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
NUMBER = "layer_idx"  # the attribute that differs in every layer, and changes no kernel


def kind_of(layer: nn.Module) -> Hashable:
    """Return a key that is equal for layers that launch the same kernels: the modules in ``layer``,
    the shapes and dtypes of their tensors, and their settings.

    Layers whose settings differ get different keys, even where the setting changes no kernel.
    """
    return tuple((name, _describe_module(module)) for name, module in layer.named_modules())


def repeats(layers: Sequence[nn.Module]) -> dict[int, int]:
    """Return the layers that repeat an earlier one, as number of the layer -> number of the first
    such layer.

    A layer repeats another if both have the same kind, and the layers before them, whose outputs
    they read, have the same kind too. Empty if `torch.compile` runs one of the layers.
    """
    found: dict[int, int] = {}
    firsts: dict[tuple[Hashable, Hashable], int] = {}
    before: Hashable = None
    if any(layer._compiled_call_impl is not None for layer in layers):
        return found  # `torch.compile` would compile again for the changed `forward`
    for number, layer in enumerate(layers):
        kind = kind_of(layer)
        first = firsts.setdefault((before, kind), number)
        if first != number:
            found[number] = first
        before = kind
    return found


@contextmanager
def skipping(repeated: Mapping[int, int], layers: Sequence[nn.Module]) -> Iterator[None]:
    """Skip the ``repeated`` ones of ``layers`` within the context: each returns the last output of
    the layer that it repeats.

    Args:
        repeated: from `repeats`.
        layers: the decoder layers, by number.
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
            # shadows the method only: the layer stays in the model, with its attributes, which
            # the code of the model may read
            vars(layers[number])["forward"] = partial(_return_kept, outputs, first)
        yield
    finally:
        for number in repeated:
            vars(layers[number]).pop("forward", None)
        for handle in handles:
            handle.remove()


def run_without_repeats(layers: Sequence[nn.Module], run: Callable[[], object]) -> None:
    """Call ``run`` while ``layers`` that repeat others are skipped; with all layers if that fails,
    as the code of the model may need each of them.
    """
    try:
        with skipping(repeats(layers), layers):
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
    """Return a number, a string, or a tuple or dataclass of them; the type of any other value."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, tuple):
        return type(value), *map(_describe, value)
    if is_dataclass(value) and type(value).__module__.startswith("qtool."):
        named = ((each.name, getattr(value, each.name)) for each in fields(value))
        return type(value), *((name, _describe(own)) for name, own in named if name != NUMBER)
    return type(value).__qualname__
