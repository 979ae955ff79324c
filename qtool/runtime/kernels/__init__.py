"""The kernels that multiply with quantized weights: which one takes a layer, and why another does not.

A kernel is a module of this package with the functions of `Kernel`. All are called through one operator, ``torch.ops.qtool.linear``, which
`torch.compile` and CUDA graphs see as a whole.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor

from qtool.scheme import Scheme
from qtool.weight import QuantizedWeight

KERNELS: Mapping[str, tuple[str, ...]] = {  # device type -> modules of this package, the best first; `plain` takes everything
    "cpu": ("int4pack", "onednn", "int8pack", "plain"),
    "cuda": ("scaled_mm", "humming", "triton_weight_only", "triton_w8a8", "plain"),
}


@dataclass(frozen=True)
class Device:
    """Where a layer runs: ``type`` is cpu or cuda; ``capability`` is that of a CUDA device, 90 for sm_90."""

    type: str
    capability: int = 0

    def __str__(self) -> str:
        return f"sm_{self.capability}" if self.type == "cuda" else self.type


@dataclass(frozen=True)
class LinearSpec:
    """A layer as kernels judge it, without data: its scheme, N outputs and K inputs, and the dtype of its input and output.

    ``static_input``: the input's scale (and zero point) was found by calibration and comes with the weight.
    """

    scheme: Scheme
    shape: tuple[int, int]
    dtype: torch.dtype
    static_input: bool = False


class Kernel(Protocol):
    """One way to multiply with weights of some schemes."""

    def objection(self, spec: LinearSpec, device: Device) -> str | None:
        """Return why this kernel does not take such layers on ``device``; None when it does."""

    def pack(self, spec: LinearSpec, weight: QuantizedWeight) -> dict[str, Tensor]:
        """Return what `apply` needs, on the device of ``weight``, which has neither ``perm`` nor ``pre_scale``. May reuse its tensors."""

    def apply(self, spec: LinearSpec, x: Tensor, packed: Mapping[str, Tensor], bias: Tensor | None) -> Tensor:
        """Return ``x`` [M, K] times the weight, plus ``bias`` [N]: [M, N] of the dtype of ``x``, which is contiguous. M is at least 1."""


@dataclass(frozen=True)
class Choice:
    """The kernel that takes a layer, and of those before it, why they do not."""

    kernel: str
    refused: Mapping[str, str]


def choose(spec: LinearSpec, device: Device) -> Choice:
    """Return the first kernel for ``device`` that takes ``spec``, and the objections of those before it."""
    refused: dict[str, str] = {}
    for name in KERNELS[device.type]:
        objection = load_kernel(name).objection(spec, device)
        if objection is None:
            return Choice(name, refused)
        refused[name] = objection
    raise AssertionError("the plain kernel takes everything")


def load_kernel(name: str) -> Kernel:
    """Import and return the kernel ``name``."""
    return cast(Kernel, importlib.import_module(f"{__name__}.{name}"))


def device_of(device: torch.device) -> Device:
    """Describe the torch ``device``."""
    if device.type != "cuda":
        return Device(device.type)
    major, minor = torch.cuda.get_device_capability(device)
    return Device("cuda", major * 10 + minor)


@dataclass(frozen=True)
class Call:
    """What the operator calls for one kind of layer: a kernel, the layer's spec and the names of its tensors."""

    kernel: str
    spec: LinearSpec
    names: tuple[str, ...]


_CALLS: list[Call] = []


def number_of(call: Call) -> int:
    """Return the number by which the operator knows ``call``."""
    if call not in _CALLS:
        _CALLS.append(call)
    return _CALLS.index(call)


_LIBRARY = torch.library.Library("qtool", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define("linear(Tensor x, Tensor[] packed, Tensor? bias, int call) -> Tensor")  # type: ignore[no-untyped-call]


def _linear(x: Tensor, packed: Sequence[Tensor], bias: Tensor | None, call: int) -> Tensor:
    entry = _CALLS[call]
    return load_kernel(entry.kernel).apply(entry.spec, x, dict(zip(entry.names, packed, strict=True)), bias)


def _fake_linear(x: Tensor, packed: Sequence[Tensor], bias: Tensor | None, call: int) -> Tensor:
    return x.new_empty(x.shape[0], _CALLS[call].spec.shape[0])


_LIBRARY.impl("linear", _linear, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
torch.library.register_fake("qtool::linear", _fake_linear)
