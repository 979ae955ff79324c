"""Decoder layers with few launches: what is not a matmul or attention becomes one of three
functions, each a single kernel on a GPU.

A layer of the Llama kind is `RMSNorm.add`, one matmul for queries, keys and values,
`rotate_and_write`, attention, a matmul, `RMSNorm.add`, one matmul for gate and up, `gated`, a
matmul. Where a matmul takes codes of 8 bits, the function before it rounds to them. A layer does
not add its last output to the residual but returns a `Sum`, for the norm of the next one to add.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from functools import partial
from itertools import accumulate
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from qtool.engine.attention.interface import RECORDING, RUNNING, attend, write
from qtool.engine.attention.pages import KVPages, LayerGeometry, Packed
from qtool.engine.norms import Codes, NotFused, RMSNorm, Sum, parts_of, rounded
from qtool.runtime.kernels import current
from qtool.runtime.linear import FusedLinear, QuantizedLinear

Activation = Literal["silu", "gelu_tanh"]
# whether models make the angle of each pair of channels once, or twice, for both channels
Angles = Literal["once", "twice"]
Linear = nn.Linear | QuantizedLinear | FusedLinear
ACTIVATIONS: Mapping[Activation, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
}
PASSIVE = (nn.Dropout, nn.Identity)  # modules that do nothing when a model runs


class RotaryMismatch(NotFused):
    """Why the angles of a model are not of the kind that was tried."""


class FusedLayer(nn.Module):
    """A decoder layer of the Llama kind: norm, attention, norm, MLP, each pair around a residual.

    ``angles``: how queries and keys get the rotary embedding; None: they do not. Raises: NotFused,
        for a layer made of other parts.
    """

    def __init__(self, layer: nn.Module, geometry: LayerGeometry, *, angles: Angles | None) -> None:
        super().__init__()
        norms = ("input_layernorm", "post_attention_layernorm")
        _check_parts(layer, {*norms, "self_attn", "mlp"})
        attention = layer.get_submodule("self_attn")
        q_k_v = ("qkv_proj",) if hasattr(attention, "qkv_proj") else ("q_proj", "k_proj", "v_proj")
        _check_parts(attention, {*q_k_v, "o_proj"}, {"q_norm", "k_norm", "sinks"})
        if geometry.head_dim != geometry.v_head_dim:
            raise NotFused("values are of another size than keys")
        heads = (geometry.heads, geometry.kv_heads, geometry.kv_heads)
        sizes = [count * geometry.head_dim for count in heads]
        self.geometry, self.angles = geometry, angles
        self.input_norm, self.post_norm = (RMSNorm.of(getattr(layer, name)) for name in norms)
        self.qkv, self.at = _side_by_side([getattr(attention, name) for name in q_k_v], sizes)
        self.o_proj = attention.get_submodule("o_proj")
        self.q_norm = _norm_of(attention, "q_norm")
        self.k_norm = _norm_of(attention, "k_norm")
        self._check_head_norms()
        self.sinks: nn.Parameter | None = getattr(attention, "sinks", None)
        mlp = layer.get_submodule("mlp")
        self.mlp = GatedMLP.of(mlp) or mlp

    def _check_head_norms(self) -> None:
        q, k = self.q_norm, self.k_norm
        if q is None and k is None:
            return
        width = self.geometry.head_dim
        if (
            q is None
            or k is None
            or q.kind != k.kind
            or not len(q.weight) == len(k.weight) == width
        ):
            raise NotFused("the norms of queries and keys are not over one head each")

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
            x, scale, residual = self.input_norm.add(x, residual, _codes_of(self.qkv))
            attended = self._attend(_multiply(self.qkv, x, scale), position_embeddings)
            mlp = self.mlp
            if not isinstance(mlp, GatedMLP):  # experts, say
                x, _, residual = self.post_norm.add(self.o_proj(attended), residual)
                y = mlp(x[None])
                return Sum((y[0] if isinstance(y, tuple) else y)[0], residual)
            x, scale, residual = self.post_norm.add(
                self.o_proj(attended), residual, _codes_of(mlp.gate_up)
            )
            return Sum(mlp(x, scale), residual)

    def _attend(self, qkv: Tensor, angles: tuple[Tensor, Tensor] | None) -> Tensor:
        """Return the attention [T, heads * D] of queries, keys and values side by side."""
        geometry, found = self.geometry, RECORDING.get(None)
        if found is not None:
            found.layers.append(geometry)
            return qkv.new_zeros(qkv.shape[0], geometry.heads * geometry.head_dim)
        packed, layers = RUNNING.get()
        kv = layers[geometry.layer_idx]
        rotary, rotated = None, 0
        if self.angles and angles:
            cos, sin = angles
            rotary = cos.flatten(0, -2).contiguous(), sin.flatten(0, -2).contiguous()
            rotated = cos.shape[-1] * (2 if self.angles == "once" else 1)
            if rotated > geometry.head_dim:
                raise RotaryMismatch(f"{rotated} channels of {geometry.head_dim} would be rotated")
        q = rotate_and_write(
            qkv, self.at, geometry.heads, self.q_norm, self.k_norm, rotary, rotated, kv, packed
        )
        return attend(
            q,
            kv,
            packed,
            scaling=geometry.scaling,
            window=geometry.window,
            softcap=geometry.softcap,
            sinks=self.sinks,
        ).flatten(1)


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
            _check_parts(mlp, {*gate_up, "down_proj"}, {"act_fn", "activation_fn"})
        except NotFused:
            return None
        if activation is None:
            return None
        down = mlp.get_submodule("down_proj")
        width = cast(Linear, down).in_features
        joined, at = _side_by_side([getattr(mlp, name) for name in gate_up], [width, width])
        return cls(joined, at, width, down, activation)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """Return the outputs [T, H] of ``x`` [T, H], or of its codes and their scales."""
        inner, scale = gated(
            _multiply(self.gate_up, x, scale),
            self.at,
            self.width,
            self.activation,
            _codes_of(self.down),
        )
        return _multiply(self.down, inner, scale)


class SideBySide(nn.Module):
    """Layers that share an input and cannot be one matmul."""

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs of all, [T, N]."""
        return torch.cat([part(x) for part in self.parts], dim=-1)


def rotate_and_write(
    qkv: Tensor,
    at: Sequence[int],
    heads: int,
    q_norm: RMSNorm | None,
    k_norm: RMSNorm | None,
    rotary: tuple[Tensor, Tensor] | None,
    rotated: int,
    kv: KVPages,
    packed: Packed,
) -> Tensor:
    """Norm and rotate queries and keys, and store keys and values. Return the queries [T, heads,
    D].

    Args:
        qkv: queries, keys and values of each token, [T, ...]; ``at``: where each of the three
            begins.
        rotary: cosines and sines [T, at least rotated / 2]; the rest repeats them.
        rotated: the first channels of a head, which are rotated.
    """
    if qkv.is_cuda:
        from qtool.engine import elementwise

        norms = (q_norm.weight, k_norm.weight, *q_norm.kind) if q_norm and k_norm else None
        scales = kv.k_scale, kv.v_scale
        where = packed.table, packed.rows, packed.positions
        return elementwise.rotate_and_write(
            qkv, (at[0], at[1], at[2]), heads, norms, rotary, rotated, kv.k, kv.v, scales, *where
        )
    (tokens, _), (_, kv_heads, _, width) = qkv.shape, kv.k.shape
    q, k, v = (
        qkv[:, start : start + count * width].view(tokens, count, width)
        for start, count in zip(at, (heads, kv_heads, kv_heads), strict=True)
    )
    q, k = (
        part if norm is None else norm.normalize(part) for part, norm in ((q, q_norm), (k, k_norm))
    )
    if rotary:
        q, k = (_rotate(part, *rotary, rotated) for part in (q, k))
    write(kv, k, v, packed)
    return q


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, rotated: int) -> Tensor:
    """Rotate the first ``rotated`` channels of ``x`` [T, heads, D], as transformers does."""
    one, other = x[..., :rotated].chunk(2, dim=-1)
    cos, sin = (part[:, None, : rotated // 2] for part in (cos, sin))
    turned = one * cos - other * sin, other * cos + one * sin
    return torch.cat((*(part.to(x.dtype) for part in turned), x[..., rotated:]), dim=-1)


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


def _codes_of(linear: nn.Module) -> Codes | None:
    return linear.takes_codes if isinstance(linear, QuantizedLinear) else None


def _multiply(linear: nn.Module, x: Tensor, scale: Tensor | None) -> Tensor:
    if scale is not None:
        return cast(QuantizedLinear, linear).multiply_codes(x, scale)
    y: Tensor = linear(x)
    return y


def _norm_of(module: nn.Module, name: str) -> RMSNorm | None:
    norm = getattr(module, name, None)
    return None if norm is None else RMSNorm.of(norm)


def _check_parts(module: nn.Module, needed: set[str], allowed: Set[str] = frozenset()) -> None:
    """Raises: NotFused, unless ``module`` has the parts ``needed``, and no other but those
    ``allowed`` and such as do nothing.
    """
    parts = {name for name, part in module.named_children() if not isinstance(part, PASSIVE)}
    own = {name for name, _ in module.named_parameters(recurse=False)}
    if wrong := sorted((needed - parts) | ((parts | own) - needed - allowed)):
        has = "no" if wrong[0] in needed else "a"
        raise NotFused(f"{type(module).__name__} has {has} `{wrong[0]}`")


def _activation(function: object) -> Activation | None:
    """Return which activation ``function`` is seen to be."""
    if not callable(function):
        return None
    x = torch.linspace(-8, 8, 65)
    y = function(x)
    alike = (name for name, f in ACTIVATIONS.items() if torch.allclose(y, f(x), atol=1e-6))
    return next(alike, None)


def _side_by_side(linears: Sequence[Linear], sizes: Sequence[int]) -> tuple[nn.Module, list[int]]:
    """Return one layer for ``linears``, which have one input, and where each of its parts, of
    ``sizes`` outputs, begins among its outputs.
    """
    starts = list(accumulate(sizes, initial=0))
    outputs = sum(linear.out_features for linear in linears)
    if outputs != starts[-1]:
        raise NotFused(f"{outputs} outputs instead of {starts[-1]}")
    if len(linears) == 1:
        return linears[0], starts[:-1]
    shared = [linear.shared for linear in linears if isinstance(linear, FusedLinear)]
    whole = shared[0] if shared else None
    if whole and shared == [whole] * len(linears) and len(whole.sizes) == len(linears):
        begins = list(accumulate(whole.sizes, initial=0))
        return whole.whole, [begins[cast(FusedLinear, linear).index] for linear in linears]
    dense = [linear for linear in linears if type(linear) is nn.Linear]
    if len(dense) == len(linears) and len({linear.weight.dtype for linear in dense}) == 1:
        return _joined(dense), starts[:-1]
    return SideBySide(linears), starts[:-1]


def _joined(linears: Sequence[nn.Linear]) -> nn.Linear:
    """Return one layer with the outputs of all; their weights become views of its own."""
    starts = list(accumulate((linear.out_features for linear in linears), initial=0))
    has_bias = any(linear.bias is not None for linear in linears)
    whole = nn.Linear(linears[0].in_features, starts[-1], bias=has_bias, device="meta")
    weights: list[Tensor] = [linear.weight for linear in linears]
    whole.weight = _parameter(torch.cat(weights))
    if has_bias:
        biases: list[Tensor] = [
            linear.weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias
            for linear in linears
        ]
        whole.bias = _parameter(torch.cat(biases))
    for linear, start in zip(linears, starts, strict=False):
        part = slice(start, start + linear.out_features)
        linear.weight = _parameter(whole.weight[part])
        if linear.bias is not None:
            linear.bias = _parameter(whole.bias[part])
    return whole


def _parameter(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
