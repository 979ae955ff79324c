"""Decoder layers with few launches: what is not a matmul or attention becomes one of three
functions, each a single kernel on a GPU.

A layer of the Llama kind is `RMSNorm.add`, one matmul for queries, keys and values,
`rotate_and_write`, attention, a matmul, `RMSNorm.add`, one matmul for gate and up, `gated`, a
matmul. Where a matmul takes codes of 8 bits, the function before it rounds to them. A layer does
not add its last output to the residual but returns a `Sum`, for the norm of the next one to add.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from qtool.engine.attention.pages import LayerGeometry, StateGeometry
from qtool.engine.delta_net import GatedDeltaNet
from qtool.engine.fused_attention import Angles, FusedAttention
from qtool.engine.joined import Linear, check_parts, codes_of, multiply, side_by_side
from qtool.engine.norms import Codes, NotFused, RMSNorm, Sum, parts_of, rounded
from qtool.runtime.kernels import current

Activation = Literal["silu", "gelu_tanh"]
ACTIVATIONS: Mapping[Activation, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
}


class FusedLayer(nn.Module):
    """A decoder layer of the Llama kind: norm, attention or a gated delta net, norm, MLP, each pair
    around a residual.

    ``angles``: see `FusedAttention`. Raises: NotFused, for a layer made of other parts.
    """

    def __init__(
        self,
        layer: nn.Module,
        geometry: LayerGeometry | StateGeometry,
        *,
        angles: Angles | None,
    ) -> None:
        super().__init__()
        norms = ("input_layernorm", "post_attention_layernorm")
        self.mixer: FusedAttention | GatedDeltaNet
        if isinstance(geometry, LayerGeometry):
            check_parts(layer, {*norms, "self_attn", "mlp"})
            self.mixer = FusedAttention(layer.get_submodule("self_attn"), geometry, angles=angles)
        else:
            check_parts(layer, {*norms, "linear_attn", "mlp"})
            self.mixer = cast(GatedDeltaNet, layer.get_submodule("linear_attn"))
        self.input_norm, self.post_norm = (RMSNorm.of(getattr(layer, name)) for name in norms)
        mlp = layer.get_submodule("mlp")
        self.mlp = GatedMLP.of(mlp) or mlp

    def forward(
        self,
        hidden_states: Tensor | Sum,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **others: object,
    ) -> Sum:
        """Return the hidden states after the layer, from those before it: [1, T, H], or the `Sum`
        of the layer before.
        """
        x, residual = parts_of(hidden_states)
        with current(x.device):
            if isinstance(self.mixer, FusedAttention):
                x, scale, residual = self.input_norm.add(x, residual, self.mixer.codes)
                x = self.mixer(x, scale, position_embeddings)
            else:
                x, _, residual = self.input_norm.add(x, residual)
                x = self.mixer(x[None])[0]
            mlp = self.mlp
            if isinstance(mlp, GatedMLP):
                x, scale, residual = self.post_norm.add(x, residual, codes_of(mlp.gate_up))
                return Sum(mlp(x, scale), residual)
            # experts, say
            x, _, residual = self.post_norm.add(x, residual)
            y = mlp(x[None])
            return Sum((y[0] if isinstance(y, tuple) else y)[0], residual)


class GatedMLP(nn.Module):
    """``down(activation(gate(x)) * up(x))``, gate and up in one matmul; ``at``: where each begins
    among its outputs.
    """

    def __init__(
        self,
        gate_up: nn.Module,
        at: Sequence[int],
        width: int,
        down: nn.Module,
        activation: Activation,
    ) -> None:
        super().__init__()
        self.gate_up, self.down, self.activation = gate_up, down, activation
        self.at, self.width = (at[0], at[1]), width

    @classmethod
    def of(cls, mlp: nn.Module) -> GatedMLP | None:
        """Return ``mlp`` as one, None when it is made of other parts."""
        gate_up = ("gate_up_proj",) if hasattr(mlp, "gate_up_proj") else ("gate_proj", "up_proj")
        activation = _activation(getattr(mlp, "act_fn", getattr(mlp, "activation_fn", None)))
        try:
            check_parts(mlp, {*gate_up, "down_proj"}, {"act_fn", "activation_fn"})
        except NotFused:
            return None
        if activation is None:
            return None
        down = mlp.get_submodule("down_proj")
        width = cast(Linear, down).in_features
        joined, at = side_by_side([getattr(mlp, name) for name in gate_up], [width, width])
        return cls(joined, at, width, down, activation)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """Return the outputs [T, H] of ``x`` [T, H], or of its codes and their scales."""
        inner, scale = gated(
            multiply(self.gate_up, x, scale),
            self.at,
            self.width,
            self.activation,
            codes_of(self.down),
        )
        return multiply(self.down, inner, scale)


def gated(
    x: Tensor, at: tuple[int, int], width: int, activation: Activation, codes: Codes | None = None
) -> tuple[Tensor, Tensor | None]:
    """Return ``activation(gate) * up`` [T, width], or its codes and their scales, f32 [T, 1];
    ``at``: where gate and up begin in a row of ``x``.
    """
    if x.is_cuda:
        from qtool.engine import elementwise

        return elementwise.gated(x, at, width, activation, codes)
    gate, up = (x[:, start : start + width] for start in at)
    return rounded(ACTIVATIONS[activation](gate) * up, codes)


def _activation(function: object) -> Activation | None:
    """Return which activation ``function`` is seen to be."""
    if not callable(function):
        return None
    x = torch.linspace(-8, 8, 65)
    y = function(x)
    alike = (name for name, f in ACTIVATIONS.items() if torch.allclose(y, f(x), atol=1e-6))
    return next(alike, None)
