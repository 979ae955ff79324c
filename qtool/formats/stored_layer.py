"""What a linear layer of a checkpoint holds: as it is stored, as its outline, or dense."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from qtool.checkpoint import Checkpoint, TensorInfo
from qtool.formats import FORMATS, Layout, QuantizedModule
from qtool.formats.packing import permutation, read_tensor, stored_shape, torch_dtype
from qtool.weight import QuantizedWeight, dequantize

Value = QuantizedWeight | Tensor  # of a layer, quantized or not
GROUP_INDEXES = ("g_idx", "weight_g_idx")


@dataclass(frozen=True, eq=False)
class Source:
    """A linear layer of a checkpoint."""

    name: str
    shape: tuple[int, ...]
    tensors: Mapping[str, TensorInfo]
    """By suffix."""
    module: QuantizedModule | None
    """None when it is not quantized."""
    g_idx: Tensor | None
    """The group of each input where act-order has scattered them, else None.

    Only data can tell, as configs lie; so it is read at once, and never again.
    """

    @classmethod
    def of(cls, checkpoint: Checkpoint, layer: QuantizedModule | TensorInfo) -> Source:
        """Return the source that ``layer`` describes; of its data, only ``g_idx`` is read."""
        if isinstance(layer, TensorInfo):
            return cls(
                name=layer.name.removesuffix(".weight"),
                shape=layer.shape,
                tensors={"weight": layer},
                module=None,
                g_idx=None,
            )
        return cls(
            name=layer.name,
            shape=layer.shape,
            tensors=layer.tensors,
            module=layer,
            g_idx=_scattered_groups(checkpoint, layer),
        )

    @property
    def dedup_key(self) -> Hashable:
        """What is equal for layers that convert alike: all but their names and numbers."""
        tensors = tuple(
            (suffix, tensor.dtype, tensor.shape) for suffix, tensor in self.tensors.items()
        )
        if self.module is None:
            return tensors
        module = self.module
        is_ordered = self.g_idx is None
        return module.scheme, module.shape, module.variant, module.experts, is_ordered, tensors


def _scattered_groups(checkpoint: Checkpoint, module: QuantizedModule) -> Tensor | None:
    """Return ``g_idx`` when it scatters the inputs over the groups."""
    info = next((module.tensors[name] for name in GROUP_INDEXES if name in module.tensors), None)
    if info is None:
        return None
    g_idx = read_tensor(checkpoint, info.name)
    return g_idx if permutation(module, g_idx) is not None else None


def read_value(
    checkpoint: Checkpoint,
    layout: Layout | None,
    source: Source,
    *,
    skipped: Collection[str] = (),
) -> Value:
    """Return what ``source`` holds; the tensors named ``skipped`` are not read and have no data."""

    def read(info: TensorInfo) -> Tensor:
        return _outline(info) if info.name in skipped else read_tensor(checkpoint, info.name)

    return value_of(layout, source, _tensors(source, read))


def outline_value(layout: Layout | None, source: Source) -> Value:
    """Return what ``source`` holds, shapes and dtypes only: on the meta device."""
    return value_of(layout, source, outline_tensors(source))


def outline_tensors(source: Source) -> dict[str, Tensor]:
    """Return all tensors of ``source`` but its bias, by suffix, without data."""
    return _tensors(source, _outline)


def _outline(info: TensorInfo) -> Tensor:
    return torch.empty(stored_shape(info), dtype=torch_dtype(info), device="meta")


def _tensors(source: Source, read: Callable[[TensorInfo], Tensor]) -> dict[str, Tensor]:
    """Return all tensors of ``source`` but its bias, by suffix."""
    tensors: dict[str, Tensor] = {}
    for suffix, info in source.tensors.items():
        if suffix not in GROUP_INDEXES and suffix != "bias":
            tensors[suffix] = read(info)
        elif suffix in GROUP_INDEXES and source.g_idx is not None:
            tensors[suffix] = source.g_idx
    return tensors


def value_of(layout: Layout | None, source: Source, tensors: Mapping[str, Tensor]) -> Value:
    """Return what ``tensors`` of ``source``, by suffix, stand for."""
    if source.module is None:
        return tensors["weight"]
    assert layout is not None
    return FORMATS[layout.format].read(source.module, tensors)


def dense(value: Value, dtype: torch.dtype) -> Tensor:
    """Return the weight [N, K] that ``value`` stands for, the factor of its input multiplied in."""
    if isinstance(value, torch.Tensor):
        return value.to(dtype)
    if value.pre_scale is None:
        return dequantize(value, dtype)
    return (dequantize(value) * value.pre_scale.float()).to(dtype)
