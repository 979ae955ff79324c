"""Decoder layers with few launches: what is not a matmul or attention becomes one of three
functions, each a single kernel on a GPU.

A layer of the Llama kind is `RMSNorm.add`, one matmul for queries, keys and values,
`rotate_and_write`, attention, a matmul, `RMSNorm.add`, one matmul for gate and up, `gated`, a
matmul. Where a matmul takes codes of 8 bits, the function before it rounds to them. A layer does
not add its last output to the residual but returns a `Sum`, for the norm of the next one to add.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from qtool.engine.attention.interface import RECORDING, RUNNING, attend, write
from qtool.engine.attention.pages import KVPages, LayerGeometry, Packed
from qtool.runtime.kernels import current
from qtool.runtime.kernels.scaled_mm import rounded_rows
from qtool.runtime.linear import FusedLinear, QuantizedLinear
from qtool.scheme import Activations

Codes = Literal["fp8", "int8"]
Activation = Literal["silu", "gelu_tanh"]
Linear = nn.Linear | QuantizedLinear | FusedLinear
ACTIVATIONS: Mapping[Activation, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
}
# The largest relative error of a part that replaces another.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}
PASSIVE = (nn.Dropout, nn.Identity)  # modules that do nothing when a model runs


class NotFused(Exception):
    """Why a model stays as it is."""


@dataclass
class Sum:
    """Hidden states that are still to be added: two tensors [T, H]."""

    x: Tensor
    residual: Tensor

    def total(self) -> Tensor:
        """Return the hidden states, [T, H]."""
        return self.residual + self.x


class FusedLayer(nn.Module):
    """A decoder layer of the Llama kind: norm, attention, norm, MLP, each pair around a residual.

    ``rotates``: queries and keys get the rotary embedding. Raises: NotFused, for a layer made of
        other parts.
    """

    def __init__(self, layer: nn.Module, geometry: LayerGeometry, *, rotates: bool) -> None:
        super().__init__()
        norms = ("input_layernorm", "post_attention_layernorm")
        _check_parts(layer, {*norms, "self_attn", "mlp"})
        attention = layer.get_submodule("self_attn")
        q_k_v = ("qkv_proj",) if hasattr(attention, "qkv_proj") else ("q_proj", "k_proj", "v_proj")
        _check_parts(attention, {*q_k_v, "o_proj"}, {"q_norm", "k_norm"})
        if geometry.head_dim != geometry.v_head_dim:
            raise NotFused("values are of another size than keys")
        heads = (geometry.heads, geometry.kv_heads, geometry.kv_heads)
        sizes = [count * geometry.head_dim for count in heads]
        self.geometry, self.rotates = geometry, rotates
        self.input_norm, self.post_norm = (RMSNorm.of(getattr(layer, name)) for name in norms)
        self.qkv, self.at = _side_by_side([getattr(attention, name) for name in q_k_v], sizes)
        self.o_proj = attention.get_submodule("o_proj")
        self.q_norm = _norm_of(attention, "q_norm")
        self.k_norm = _norm_of(attention, "k_norm")
        self._check_head_norms()
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
        x, residual = _parts(hidden_states)
        with current(x.device):
            x, scale, residual = self.input_norm.add(x, residual, _codes_of(self.qkv))
            attended = self._attend(_multiply(self.qkv, x, scale), position_embeddings)
            mlp = self.mlp
            if not isinstance(mlp, GatedMLP):  # experts, say
                x, _, residual = self.post_norm.add(self.o_proj(attended), residual)
                return Sum(mlp(x[None])[0], residual)
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
        rotary = None
        if self.rotates and angles:
            cos, sin = angles
            rotary = cos.flatten(0, -2).contiguous(), sin.flatten(0, -2).contiguous()
        q = rotate_and_write(
            qkv, self.at, geometry.heads, self.q_norm, self.k_norm, rotary, kv, packed
        )
        return attend(
            q,
            kv,
            packed,
            scaling=geometry.scaling,
            window=geometry.window,
            softcap=geometry.softcap,
        ).flatten(1)


class RMSNorm(nn.Module):
    """A norm of any model that divides by the root of the mean of squares.

    ``plus_one``: the weight is what is added to 1, as Gemma has it. ``late``: the norm is rounded
        only after it is multiplied by the weight.
    """

    def __init__(self, weight: nn.Parameter, eps: float, *, plus_one: bool, late: bool) -> None:
        super().__init__()
        self.weight, self.eps, self.plus_one, self.late = weight, eps, plus_one, late

    @property
    def kind(self) -> tuple[float, bool, bool]:
        """Everything but the weight."""
        return self.eps, self.plus_one, self.late

    @classmethod
    def of(cls, module: nn.Module) -> RMSNorm:
        """Return ``module`` as a norm of the kind that it is seen to be.

        Raises: NotFused, when it is of none.
        """
        if isinstance(module, RMSNorm):
            return module
        name = type(module).__name__
        weight = getattr(module, "weight", None)
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        is_vector = isinstance(weight, nn.Parameter) and weight.dim() == 1
        if not is_vector or not isinstance(eps, float) or getattr(module, "bias", None) is not None:
            raise NotFused(f"{name} is not an RMSNorm")
        weight = cast(nn.Parameter, weight)
        sizes = torch.tensor([[1e-3], [0.1], [1], [10]], device=weight.device)
        x = random_input((4, len(weight)), weight) * sizes.to(weight.dtype)
        expected = module(x)
        kinds = [
            cls(weight, eps, plus_one=plus_one, late=late)
            for plus_one, late in ((False, False), (True, True), (False, True), (True, False))
        ]
        errors = [distance(norm.normalize(x), expected, expected) for norm in kinds]
        best = min(range(len(kinds)), key=errors.__getitem__)
        if expected.dtype != x.dtype or not errors[best] <= TOLERANCE[x.dtype]:
            raise NotFused(
                f"{name} is not a known kind of RMSNorm (relative error {errors[best]:.1e})"
            )
        return kinds[best]

    def forward(self, x: Tensor | Sum) -> Tensor:
        """Return the norm, [1, T, H], of the hidden states."""
        with current(self.weight.device):
            normed, _, _ = self.add(*_parts(x))
        return normed[None]

    def add(
        self, x: Tensor, residual: Tensor | None, codes: Codes | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Return the norm of ``x + residual``, [T, H], or its codes and their scales, f32 [T, 1];
        and the sum.
        """
        if x.is_cuda:
            from qtool.engine import elementwise

            return elementwise.add_norm(
                x.contiguous(),
                residual,
                self.weight,
                self.eps,
                plus_one=self.plus_one,
                late=self.late,
                codes=codes,
            )
        total = x if residual is None else residual + x
        return *_rounded(self.normalize(total), codes), total

    def normalize(self, x: Tensor) -> Tensor:
        """Return the norm of ``x``, of its shape and dtype, over the last dimension."""
        wide, weight = x.float(), self.weight.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        if not self.late:
            wide = wide.to(x.dtype).float()
        return (wide * (1 + weight if self.plus_one else weight)).to(x.dtype)


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
    kv: KVPages,
    packed: Packed,
) -> Tensor:
    """Norm and rotate queries and keys, and store keys and values. Return the queries [T, heads,
    D].

    Args:
        qkv: queries, keys and values of each token, [T, ...]; ``at``: where each of the three
            begins.
        rotary: cosines and sines [T, at most D]; the channels that are left are not rotated.
    """
    if qkv.is_cuda:
        from qtool.engine import elementwise

        norms = (q_norm.weight, k_norm.weight, *q_norm.kind) if q_norm and k_norm else None
        scales = kv.k_scale, kv.v_scale
        where = packed.table, packed.rows, packed.positions
        return elementwise.rotate_and_write(
            qkv, (at[0], at[1], at[2]), heads, norms, rotary, kv.k, kv.v, scales, *where
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
        q, k = (_rotate(part, *rotary) for part in (q, k))
    write(kv, k, v, packed)
    return q


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first channels of ``x`` [T, heads, D], as transformers does."""
    turning, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    one, other = turning.chunk(2, dim=-1)
    turned = turning * cos[:, None] + torch.cat((-other, one), dim=-1) * sin[:, None]
    return torch.cat((turned.to(x.dtype), rest), dim=-1)


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
    return _rounded(ACTIVATIONS[activation](gate) * up, codes)


def _rounded(x: Tensor, codes: Codes | None) -> tuple[Tensor, Tensor | None]:
    return rounded_rows(x, Activations(codes, "token")) if codes else (x, None)


def _parts(x: Tensor | Sum) -> tuple[Tensor, Tensor | None]:
    return (x.x, x.residual) if isinstance(x, Sum) else (x.flatten(0, -2), None)


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
    if wrong := sorted((needed - parts) | (parts - needed - allowed) | own):
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


def random_input(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Return normal random numbers, the same each time, with the dtype and device of ``like``."""
    generator = torch.Generator(like.device).manual_seed(0)
    return torch.randn(shape, generator=generator, device=like.device).to(like.dtype)


def distance(result: Tensor, expected: Tensor, reference: Tensor) -> float:
    """Return how far ``result`` is from ``expected``, relative to the norm of ``reference``; NaN
    counts as far.
    """
    size = float(reference.double().norm())
    return float((result.double() - expected.double()).norm()) / (size or 1.0)
