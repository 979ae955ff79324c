"""Layers of experts with random weights, and what they compute by definition."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from qtool.formats.gguf import TYPE_SCHEMES, read
from qtool.formats.gguf_blocks import TYPES
from qtool.formats.gguf_rounding import quantize as quantize_blocks
from qtool.formats.layout import QuantizedModule
from qtool.runtime.experts import reference
from qtool.runtime.experts.gates import Gate
from qtool.runtime.experts.grouped import ExpertsKernel, ExpertsSpec, ExpertWeights
from qtool.runtime.experts.routing import SharedExpert
from qtool.runtime.join import scaled_by_row
from qtool.runtime.kernels import LinearSpec, with_channel_scales
from qtool.scheme import SCHEMES
from qtool.weight import Activation, QuantizedWeight, quantize


def _silu(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    return functional.silu(gate) * up


def _gelu(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    return functional.gelu(gate, approximate="tanh") * up


def _clamped(x: Tensor) -> Tensor:
    """Return what gpt-oss does between its products."""
    gate, up = x[..., ::2].clamp(max=7.0), x[..., 1::2].clamp(-7.0, 7.0)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)


def _squared_relu(x: Tensor) -> Tensor:
    return torch.relu(x) ** 2


GATES = {
    "silu": Gate("swiglu", _silu),
    "gelu": Gate("gelu_tanh", _gelu),
    "clamped": Gate("swiglu", _clamped, True, 1.702, 7.0, 1.0),
    "squared_relu": Gate("other", _squared_relu),
}


@dataclass(frozen=True)
class Case:
    """A layer of experts, and how many tokens go through it."""

    scheme: str
    """A name in `SCHEMES`, or of a type of GGUF."""
    gate: str = "silu"
    experts: int = 8
    hidden: int = 256
    inner: int = 128
    tokens: int = 9
    top_k: int = 2
    has_bias: bool = False
    crowded: bool = False
    """Whether all tokens have the first expert."""
    has_shared: bool = False
    """Whether there is a shared expert as well."""
    dtype: torch.dtype = torch.bfloat16
    device: str = "cpu"

    def layer(self) -> tuple[ExpertsSpec, ExpertWeights]:
        """Return random weights, always the same."""
        generator = torch.Generator(self.device).manual_seed(0)
        gate = GATES[self.gate]
        scheme = SCHEMES.get(self.scheme) or TYPE_SCHEMES[self.scheme]
        inputs = scheme.activations
        static = inputs is not None and inputs.needs_data
        wide = self.inner * (1 if gate.kind == "other" else 2)

        def random(*shape: int) -> Tensor:
            values = torch.randn(shape, generator=generator, device=self.device) * 0.05
            return values.to(self.dtype)

        def expert(number: int, *shape: int) -> QuantizedWeight:
            if self.scheme in TYPE_SCHEMES:
                type = TYPES[self.scheme]
                module = QuantizedModule("layer", scheme, shape, {}, variant=self.scheme)
                return read(module, {"weight": quantize_blocks(type, random(*shape))})
            weight = scaled_by_row(quantize(random(*shape), scheme))
            if not static or inputs is None:
                return weight
            scale = torch.tensor(0.01 * (1 + number % 3), device=self.device)
            return replace(weight, activation=Activation(inputs, scale))

        shapes = (wide, self.hidden), (self.hidden, self.inner)
        up, down = (LinearSpec(scheme, shape, self.dtype, static) for shape in shapes)
        if scheme.weights.granularity == "tensor":
            up, down = with_channel_scales(up), with_channel_scales(down)
        weights = ExpertWeights(
            *([expert(number, *shape) for number in range(self.experts)] for shape in shapes)
        )
        if self.has_bias:
            weights.up_bias = random(self.experts, wide)
            weights.down_bias = random(self.experts, self.hidden)
        return ExpertsSpec(self.experts, up, down, gate), weights

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return hidden states, and the experts of each token with their weights."""
        generator = torch.Generator(self.device).manual_seed(1)
        shape = (self.tokens, self.hidden)
        x = torch.randn(shape, generator=generator, device=self.device).to(self.dtype)
        shape = (self.tokens, self.experts)
        scores = torch.rand(shape, generator=generator, device=self.device)
        scores[:, 0] += self.crowded
        weights, experts = scores.topk(self.top_k, -1)
        return x, experts, weights.softmax(-1).to(self.dtype)

    def shared(self) -> SharedExpert | None:
        """Return the results of a shared expert, if the case has one."""
        if not self.has_shared:
            return None
        generator = torch.Generator(self.device).manual_seed(2)
        shapes = (self.tokens, self.hidden), (self.tokens, 1)
        drawn = (torch.randn(shape, generator=generator, device=self.device) for shape in shapes)
        return SharedExpert(*(values.to(self.dtype) for values in drawn))

    def error(self, kernel: ExpertsKernel) -> float:
        """Return how far ``kernel`` is from the definition in f32, relative; what lies between the
        products is rounded as models round it.
        """
        spec, weights = self.layer()
        own = spec.gate.own
        exact = replace(spec, gate=replace(spec.gate, own=lambda x: own(x.to(self.dtype)).float()))
        plain = reference.pack(spec, weights)
        packed = kernel.pack(spec, weights)
        (x, *chosen), shared = self.inputs(), self.shared()
        expected = reference.apply(exact, x.float(), *chosen, plain, shared).double()
        found = kernel.apply(spec, x, *chosen, packed, shared).double()
        return float((found - expected).norm() / expected.norm())
