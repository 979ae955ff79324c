"""Decoder layers with few launches: what is not a matmul or attention becomes one of three
functions, each a single kernel on a GPU.

A layer is `add_norm`, one matmul for queries, keys and values, `rotate_and_write`, attention, a
matmul, `add_norm`, one matmul for gate and up, `gated`, a matmul. Where a matmul takes codes of 8
bits, the function before it rounds to them. A layer does not add its last output to the residual
but returns a `Sum`, for the norm of the next one to add.

Room for another kind: where a layer has norms is a line of `LAYOUTS`, what a norm computes a
`norm_kind.NormKind`, how queries and keys rotate one of `fused_attention.Angles`. `fusion` compares
each layer with transformers' own, so that a name that stands for something else does no harm.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from qtool.engine import native_elementwise
from qtool.engine.attention.pages import LayerGeometry, StateGeometry
from qtool.engine.fused_attention import Angles, FusedAttention, PositionEmbeddings
from qtool.engine.fused_latents import FusedLatentAttention
from qtool.engine.joined import (
    PASSIVE,
    Linear,
    check_parts,
    codes_of,
    multiply,
    side_by_side,
)
from qtool.engine.norms import Codes, Norm, NotFused, Sum, add_norm, rounded
from qtool.runtime.experts.grouped import ExpertsStandIn, GroupedExperts
from qtool.runtime.experts.routing import SharedExpert
from qtool.runtime.kernels import current

Activation = Literal["silu", "gelu_tanh"]
ACTIVATIONS: Mapping[Activation, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
}


class Layout(NamedTuple):
    """The names of the norms of a layer; None where it has none."""

    before_mixer: str | None
    after_mixer: str | None
    before_mlp: str | None
    after_mlp: str | None


LAYOUTS = (
    # Llama and most others
    Layout("input_layernorm", None, "post_attention_layernorm", None),
    # Apertus
    Layout("attention_layernorm", None, "feedforward_layernorm", None),
    # OLMo 2, EXAONE 4
    Layout(None, "post_attention_layernorm", None, "post_feedforward_layernorm"),
    # Gemma 2 and 3
    Layout(
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
    # GLM-4
    Layout(
        "input_layernorm",
        "post_self_attn_layernorm",
        "post_attention_layernorm",
        "post_mlp_layernorm",
    ),
)
PARALLEL = Layout("input_layernorm", None, None, None)  # Cohere: mixer and MLP read one norm
MLPS = ("mlp", "block_sparse_moe")


class FusedLayer(nn.Module):
    """A decoder layer: attention or a gated delta net, and an MLP, each with norms before and after
    it and around both a residual, ``x + factor * after(part(before(x)))``. Both may also read the
    same norm, and add to the same residual.

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
        layout = layout_of(layer)
        mlp_name = _mlp_of(layer)
        self.is_parallel = layout is PARALLEL
        self.mixer: FusedAttention | FusedLatentAttention | Unfused
        norms = {name for name in layout if name}
        if isinstance(geometry, LayerGeometry):
            check_parts(layer, {*norms, "self_attn", mlp_name})
            kind = FusedLatentAttention if geometry.keeps_latents else FusedAttention
            self.mixer = kind(layer.get_submodule("self_attn"), geometry, angles=angles)
        else:
            check_parts(layer, {*norms, "linear_attn", mlp_name})
            self.mixer = Unfused(layer.get_submodule("linear_attn"))
        self.before_mixer, self.after_mixer, self.before_mlp, self.after_mlp = (
            Norm.of(layer.get_submodule(name)) if name else None for name in layout
        )
        mlp = layer.get_submodule(mlp_name)
        self.mlp = GatedMLP.of(mlp) or Mixture.of(mlp) or Unfused(_with_gated_mlps(mlp))
        # Granite's
        self.factor = float(getattr(layer, "residual_multiplier", 1.0))

    def forward(
        self,
        hidden_states: Tensor | Sum,
        position_embeddings: PositionEmbeddings | None = None,
        **others: object,
    ) -> Sum:
        """Return the hidden states after the layer, from those before it: [1, T, H], or the `Sum`
        of the layer before.
        """
        states = Sum.of(hidden_states)
        codes = self.mixer.codes
        with current(states.x.device):
            if self.is_parallel:
                codes = codes if codes == self.mlp.codes else None
                x, scale, residual = add_norm(states, self.before_mixer, codes)
                mixed = self.mixer(x, scale, position_embeddings)
                return Sum(self.mlp(x, scale), residual, other=mixed)
            x, scale, residual = add_norm(states, self.before_mixer, codes)
            mixed = self.mixer(x, scale, position_embeddings)
            states = Sum(mixed, residual, self.after_mixer, self.factor)
            x, scale, residual = add_norm(states, self.before_mlp, self.mlp.codes)
            return Sum(self.mlp(x, scale), residual, self.after_mlp, self.factor)


def layout_of(layer: nn.Module) -> Layout:
    """Return where ``layer`` has its norms. Raises: NotFused, when it has others."""
    parts = {name for name, part in layer.named_children() if not isinstance(part, PASSIVE)}
    norms = parts - {"self_attn", "linear_attn", *MLPS}
    for layout in (*LAYOUTS, PARALLEL):
        if norms == {name for name in layout if name}:
            return layout
    names = ", ".join(f"`{name}`" for name in sorted(norms)) or "none"
    raise NotFused(f"{type(layer).__name__} has an unknown set of norms: {names}")


def _mlp_of(layer: nn.Module) -> str:
    return next((name for name in MLPS if hasattr(layer, name)), MLPS[0])


class Unfused(nn.Module):
    """A part of a layer that runs as it is: experts, say, or a gated delta net."""

    codes: Codes | None = None

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: Tensor, *_: object) -> Tensor:
        """Return the outputs [T, H] of ``x`` [T, H]."""
        y: Tensor | tuple[Tensor, ...] = self.part(x[None])
        return (y[0] if isinstance(y, tuple) else y)[0]


def _with_gated_mlps(part: nn.Module) -> nn.Module:
    """Return ``part`` with each of its members that is a `GatedMLP` as one: shared experts, say."""
    found = {name: GatedMLP.of(member) for name, member in part.named_children()}
    if not any(found.values()):
        return part
    changed = copy.copy(part)
    changed._modules = part._modules | {
        name: OfAnyShape(mlp) for name, mlp in found.items() if mlp is not None
    }
    return changed


class OfAnyShape(nn.Module):
    """A part that takes [T, H], in the code of a model, which has more dimensions."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs [..., H] of ``x`` [..., H]."""
        y: Tensor = self.part(x.flatten(0, -2))
        return y.view(*x.shape[:-1], y.shape[-1])


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
        self.gate_up = gate_up
        self.down = down
        self.activation = activation
        self.at = (at[0], at[1])
        self.width = width

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

    @property
    def codes(self) -> Codes | None:
        """What the input may be rounded to before."""
        return codes_of(self.gate_up)

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


class Mixture(nn.Module):
    """A mixture of packed experts and a shared expert with a gate, as in Qwen2-MoE. The kernel of
    the packed experts adds the shared one.

    Args:
        router: returns logits, weights [T, top_k] and experts [T, top_k].
        experts: adds up what it makes of the chosen experts and `SharedExpert`.
        shared: the shared expert.
        shared_gate: its gate, H inputs and one output.
    """

    codes: Codes | None = None

    def __init__(
        self, router: nn.Module, experts: nn.Module, shared: GatedMLP, shared_gate: nn.Module
    ) -> None:
        super().__init__()
        self.router = router
        self.experts = experts
        self.shared = shared
        self.shared_gate = shared_gate

    @classmethod
    def of(cls, mlp: nn.Module) -> Mixture | None:
        """Return ``mlp`` as a `Mixture`; None if it has other parts."""
        try:
            check_parts(mlp, {"gate", "experts", "shared_expert", "shared_expert_gate"})
        except NotFused:
            return None
        router, experts, member, gate = (
            mlp.get_submodule(name)
            for name in ("gate", "experts", "shared_expert", "shared_expert_gate")
        )
        shared = GatedMLP.of(member)
        if shared is None or not isinstance(experts, GroupedExperts | ExpertsStandIn):
            return None
        return cls(router, experts, shared, gate)

    def forward(self, x: Tensor, *_: object) -> Tensor:
        """Return the outputs [T, H] of ``x`` [T, H]."""
        shared = SharedExpert(self.shared(x), self.shared_gate(x))
        _, weights, chosen = self.router(x)
        y: Tensor = self.experts(x, chosen, weights, shared)
        return y


def gated(
    x: Tensor, at: tuple[int, int], width: int, activation: Activation, codes: Codes | None = None
) -> tuple[Tensor, Tensor | None]:
    """Return ``activation(gate) * up`` [T, width], or its codes and their scales, f32 [T, 1];
    ``at``: where gate and up begin in a row of ``x``.
    """
    if x.is_cuda:
        from qtool.engine import elementwise

        return elementwise.gated(x, at, width, activation, codes)
    if native_elementwise.applies(x):
        return rounded(native_elementwise.gated(x, at, width, activation), codes)
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
