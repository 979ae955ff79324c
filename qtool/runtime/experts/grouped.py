"""`GroupedExperts`: all experts of a layer, packed for a kernel that multiplies every choice of a
step at once. It replaces the modules that transformers calls through its experts interface.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from qtool.runtime.experts.gates import Gate
from qtool.runtime.experts.routing import SharedExpert, add_shared
from qtool.runtime.kernels import Device, LinearSpec, current, no_offset
from qtool.runtime.packed import PackedModule
from qtool.scheme import Scheme
from qtool.weight import QuantizedWeight

# device type -> modules of this package, the fastest first
KERNELS: Mapping[str, tuple[str, ...]] = {
    "cpu": ("native_experts",),
    "cuda": ("triton_experts",),
}


@dataclass(frozen=True)
class ExpertsSpec:
    """What a kernel is chosen by: a layer of experts without its data."""

    count: int
    """Of experts."""
    up: LinearSpec
    """The first product of an expert: gate and up, in the model's order."""
    down: LinearSpec
    """The second."""
    gate: Gate
    """What is done between them."""


@dataclass
class ExpertWeights:
    """The data of a layer of experts; a kernel takes the lists apart while it packs them."""

    up: list[QuantizedWeight]
    """Of each expert: gate and up, in the model's order; their inputs are used as they come."""
    down: list[QuantizedWeight]
    """Of each expert."""
    up_bias: Tensor | None = None
    """[experts, N], in the model's order."""
    down_bias: Tensor | None = None
    """[experts, N]"""


class ExpertsKernel(Protocol):
    """One way to multiply with all experts of a layer."""

    def unsupported_reason(self, spec: ExpertsSpec, device: Device) -> str | None:
        """Return why this kernel does not support such layers on ``device``; None when it does."""

    def pack(self, spec: ExpertsSpec, weights: ExpertWeights) -> dict[str, Tensor]:
        """Return the tensors that `apply` needs, on the device of ``weights``."""

    def apply(
        self,
        spec: ExpertsSpec,
        x: Tensor,
        experts: Tensor,
        weights: Tensor,
        packed: Mapping[str, Tensor],
        shared: SharedExpert | None = None,
    ) -> Tensor:
        """Return for each token the sum of what its experts make of it, times their weights.

        Args:
            spec: the layer.
            x: the input, [T, K] of the dtype of ``spec.up``, contiguous; T is at least 1.
            experts: of each token, [T, top_k], contiguous.
            weights: of these, [T, top_k], contiguous.
            packed: from `pack`.
            shared: the results of a shared expert, which are added; None without one.
        Returns: [T, N].
        """


def choose_experts(spec: ExpertsSpec, device: Device) -> tuple[str | None, str]:
    """Return the first kernel that supports ``spec``, or None; and why others do not."""
    reasons: list[str] = []
    for name in KERNELS[device.type]:
        try:
            reason = no_offset(name, spec.up) or no_offset(name, spec.down)
            reason = reason or load_experts_kernel(name).unsupported_reason(spec, device)
        except ModuleNotFoundError as error:
            reason = f"needs the package `{error.name}`"
        if reason is None:
            return name, "; ".join(reasons)
        reasons.append(f"{name}: {reason}")
    return None, "; ".join(reasons)


def load_experts_kernel(name: str) -> ExpertsKernel:
    """Import and return the kernel ``name``."""
    return cast(ExpertsKernel, importlib.import_module(f"qtool.runtime.experts.{name}"))


class GroupedExperts(PackedModule):
    """The experts of a layer, packed for ``kernel``."""

    def __init__(self, spec: ExpertsSpec, kernel: str, weights: ExpertWeights) -> None:
        super().__init__()
        self.spec = spec
        self.kernel = kernel
        packed = load_experts_kernel(kernel).pack(spec, weights)
        self._names = tuple(packed)
        for name, tensor in packed.items():
            self.register_packed(name, tensor)
        self._call = len(_CALLS)
        _CALLS.append(_Call(spec, kernel, self._names))

    @property
    def schemes(self) -> tuple[Scheme, ...]:
        """The scheme of each matrix, two of each expert."""
        return (self.spec.up.scheme, self.spec.down.scheme) * self.spec.count

    def forward(
        self,
        hidden_states: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
        shared: SharedExpert | None = None,
    ) -> Tensor:
        """Return the sum of the experts of each token, [T, N], from inputs [T, K], the experts
        [T, top_k] of each token, and their weights; ``shared`` is added to it.
        """
        if not hidden_states.shape[0]:
            return hidden_states.new_empty(0, self.spec.down.shape[0])
        x = hidden_states.to(self.spec.up.dtype).contiguous()
        y: Tensor = torch.ops.qtool.experts(
            x,
            top_k_index.contiguous(),
            top_k_weights.contiguous(),
            [self._buffers[name] for name in self._names],
            self._call,
            *(shared or ()),
        )
        return y.to(hidden_states.dtype)

    def extra_repr(self) -> str:
        """Show number, shapes, schemes and kernel in the printed model."""
        up, down = self.spec.up, self.spec.down
        schemes = " and ".join(sorted({scheme.name for scheme in self.schemes}))
        sizes = f"{up.shape[1]} -> {down.shape[1]}"
        return f"{self.spec.count} x ({sizes}), {schemes}, {self.kernel}"


class ExpertsStandIn(nn.Module):
    """Takes the place of packed experts while a decoder layer is compared: routers choose other
    experts at the least difference in their inputs, and here the choice does not matter.
    """

    def forward(
        self,
        hidden_states: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
        shared: SharedExpert | None = None,
    ) -> Tensor:
        """Return the hidden states [T, H] times the sum of the weights [T, top_k], with ``shared``
        added.
        """
        total = hidden_states * top_k_weights.sum(-1, keepdim=True).to(hidden_states.dtype)
        return add_shared(total.float(), shared).to(hidden_states.dtype)


@dataclass(frozen=True)
class _Call:
    """What the operator calls for one layer."""

    spec: ExpertsSpec
    kernel: str
    names: tuple[str, ...]
    """Of the packed tensors."""


_CALLS: list[_Call] = []
_LIBRARY = torch.library.Library("qtool", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define(
    "experts(Tensor x, Tensor experts, Tensor weights, Tensor[] packed, int call, "
    "Tensor? shared=None, Tensor? gate=None) -> Tensor"
)  # type: ignore[no-untyped-call]


@torch.no_grad()
def _experts(
    x: Tensor,
    experts: Tensor,
    weights: Tensor,
    packed: Sequence[Tensor],
    call: int,
    shared: Tensor | None = None,
    gate: Tensor | None = None,
) -> Tensor:
    known = _CALLS[call]
    tensors = dict(zip(known.names, packed, strict=True))
    with current(x.device):
        kernel = load_experts_kernel(known.kernel)
        expert = None if shared is None or gate is None else SharedExpert(shared, gate)
        return kernel.apply(known.spec, x, experts, weights, tensors, expert)


def _fake_experts(
    x: Tensor,
    experts: Tensor,
    weights: Tensor,
    packed: Sequence[Tensor],
    call: int,
    shared: Tensor | None = None,
    gate: Tensor | None = None,
) -> Tensor:
    return x.new_empty(x.shape[0], _CALLS[call].spec.down.shape[0])


_LIBRARY.impl("experts", _experts, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
torch.library.register_fake("qtool::experts", _fake_experts)
