"""What detection finds: each quantized linear layer as the tensors on disk show it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from qtool.checkpoint import Checkpoint, TensorInfo
from qtool.errors import CheckpointRefused
from qtool.scheme import Scheme, Weights

SCALE_DTYPES = ("F16", "BF16", "F32")
CACHE_SCALES = ("k_scale", "v_scale", "q_scale")
CACHE_SUFFIXES = (*CACHE_SCALES, "k_bias", "v_bias")  # of the KV cache, on modules that hold other things


@dataclass(frozen=True)
class QuantizedModule:
    """One linear layer: its scheme, its logical shape (N outputs, K inputs), and its tensors by suffix, e.g. ``weight_packed``."""

    name: str
    scheme: Scheme
    shape: tuple[int, int]
    tensors: Mapping[str, TensorInfo]

    @property
    def size_bytes(self) -> int:
        """Bytes of all its tensors, the bias included."""
        return sum(tensor.size_bytes for tensor in self.tensors.values())


@dataclass(frozen=True)
class Layout:
    """A quantized checkpoint as its headers and configs show it; ``warnings`` say where the config and the tensors disagree."""

    format: str
    modules: Mapping[str, QuantizedModule]
    kv_cache: str | None
    warnings: tuple[str, ...]
    rotates_inputs: bool = False  # at run time (QuIP, SpinQuant R3/R4): the weights alone are not the model


@dataclass(frozen=True)
class Parts:
    """The tensors of one module by suffix, before anything is known about it."""

    name: str
    tensors: Mapping[str, TensorInfo] = field(default_factory=dict)

    def __contains__(self, suffix: str) -> bool:
        return suffix in self.tensors

    def __getitem__(self, suffix: str) -> TensorInfo:
        """Return the tensor ``suffix``; CheckpointRefused when the module has none."""
        if suffix not in self.tensors:
            found = ", ".join(f"{found} {tensor.dtype}" for found, tensor in sorted(self.tensors.items()))
            message = f"`{self.name}` is quantized and its tensor `{self.name}.{suffix}` is missing (found: {found})"
            raise refused("E_MISSING_TENSOR", message, "download or export the checkpoint again")
        return self.tensors[suffix]

    def matrix(self, suffix: str, *dtypes: str) -> tuple[int, int]:
        """Return the shape of the tensor ``suffix``, which must have two dimensions and one of ``dtypes``."""
        tensor = self[suffix]
        if len(tensor.shape) != 2 or tensor.dtype not in dtypes:
            raise self.misfit(suffix, f"a matrix of {' or '.join(dtypes)}")
        return tensor.shape[0], tensor.shape[1]

    def misfit(self, suffix: str, expected: str) -> CheckpointRefused:
        """Return the error that says that the tensor ``suffix`` is not what was ``expected``."""
        tensor = self[suffix]
        return refused("E_TENSOR_SHAPE", f"`{tensor.name}` is {tensor.dtype} {list(tensor.shape)}; expected {expected}")


def modules_of(checkpoint: Checkpoint) -> Iterator[Parts]:
    """Yield every module that owns tensors, in the order of the headers."""
    modules: dict[str, dict[str, TensorInfo]] = {}
    for name, tensor in checkpoint.tensors.items():
        module, _, suffix = name.rpartition(".")
        modules.setdefault(module, {})[suffix] = tensor
    for module, tensors in modules.items():
        yield Parts(module, tensors)


def group_size(columns: int, groups: int, promised: int | None = None) -> int:
    """Return how many of ``columns`` inputs share one of ``groups`` scales: ``promised`` where it fits, else what divides evenly."""
    if promised and promised > 0 and math.ceil(columns / promised) == groups:
        return promised
    return math.ceil(columns / groups)


def grouped_integers(bits: int, columns: int, groups: int, promised: int | None, *, symmetric: bool) -> Weights:
    """Return integer weights with ``groups`` scales for a row of ``columns``; one scale is a channel's, unless the config promised that group."""
    size = group_size(columns, groups, promised)
    format: Any = f"int{bits}"
    if groups == 1 and promised != size:
        return Weights(format, "channel", symmetric=symmetric)
    return Weights(format, "group", size, symmetric=symmetric)


def block_size(size: int, blocks: int) -> int:
    """Return the length of blocks that cut ``size`` into ``blocks``; the last may be short, so a power of two is preferred."""
    candidates = [128, *(2**bits for bits in range(size.bit_length() + 1))]
    return next((length for length in candidates if math.ceil(size / length) == blocks), math.ceil(size / blocks))


def refused(code: str, message: str, hint: str = "") -> CheckpointRefused:
    """Return the error for a checkpoint whose parts do not fit together."""
    return CheckpointRefused(code, message, hint=hint)
