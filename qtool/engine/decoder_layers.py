"""Decoder layers with few launches: what is not a matmul or attention becomes one of three
functions, each a single kernel on a GPU.

A layer of the Llama kind is `RMSNorm.add`, one matmul for queries, keys and values,
`rotate_and_write`, attention, a matmul, `RMSNorm.add`, one matmul for gate and up, `gated`, a
matmul. Where a matmul takes codes of 8 bits, the function before it rounds to them. A layer does
not add its last output to the residual but returns a `Sum`, for the norm of the next one to add.

`fuse` trusts no name: it runs each layer of transformers beside its replacement, and leaves the
model as it is unless they agree.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from qtool.engine.attention.interface import (
    RECORDING,
    RUNNING,
    attend,
    recording,
    running,
    write,
)
from qtool.engine.attention.pages import KVPages, LayerGeometry, Packed
from qtool.errors import one_line
from qtool.runtime.kernels import current
from qtool.runtime.kernels.scaled_mm import rounded_rows
from qtool.runtime.linear import FusedLinear, QuantizedLinear
from qtool.scheme import Activations

LOG = logging.getLogger("qtool.engine")
Codes = Literal["fp8", "int8"]
Activation = Literal["silu", "gelu_tanh"]
ACTIVATIONS: Mapping[Activation, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
}
TOKENS = 6  # of the input that layers are compared with
# relative to what a layer adds to its input
TOLERANCE = {
    torch.float32: 1e-5,
    torch.bfloat16: 1e-2,
    torch.float16: 1e-2,
}
# the same with the quantized layers themselves: where inputs are rounded, codes move at the least
# difference
ROUNDED_TOLERANCE = 0.1
FIRST = 3  # layers that are also compared together; over many, differences grow without end
WHOLE_TOLERANCE = 0.1  # of these; a residual that is lost is more
PASSIVE = (nn.Dropout, nn.Identity)  # modules that do nothing when a model runs


class NotFused(Exception):
    """Why a model stays as it is."""


def fuse(model: Any) -> bool:
    """Replace the decoder layers of ``model``, and its last norm, by `FusedLayer`, if it can be
    seen to compute the same.

    The attention of the model is `qtool.engine.attention.interface`'s already. Peak memory: the
    model, and the weights of a layer. Logs why not.
    """
    device = next(model.parameters()).device
    try:
        with torch.no_grad(), current(device):
            _fuse(model.get_decoder(), device)
    except (
        Exception
    ) as error:  # whatever the code of an architecture does with what it does not expect
        reason = str(error) if isinstance(error, NotFused) else one_line(error)
        LOG.info("the layers of %s run as transformers has them: %s", type(model).__name__, reason)
        return False
    return True


def _fuse(decoder: Any, device: torch.device) -> None:
    layers, norm = list(decoder.layers), RMSNorm.of(decoder.norm)
    _, geometry, arguments = _dry_run(decoder, device)
    fused = []
    for number, layer in enumerate(layers):
        if layer not in arguments:
            raise NotFused(f"layer {number} is not called")
        try:
            fused.append(_proven(layer, geometry, arguments[layer]))
        except NotFused as error:
            raise NotFused(f"layer {number}: {error}") from None
        if device.type == "cuda":
            # the weights that were joined leave pieces too small for the next ones
            torch.cuda.empty_cache()
    before = decoder.layers, decoder.norm
    try:
        decoder.layers = nn.ModuleList(layers[:FIRST])
        expected, _, _ = _dry_run(decoder, device)
        decoder.layers, decoder.norm = nn.ModuleList(fused[:FIRST]), norm
        result, _, _ = _dry_run(decoder, device)
        if not (far := _distance(result, expected, expected)) <= WHOLE_TOLERANCE:
            raise NotFused(
                f"the model does something between its layers (relative error {far:.1e})"
            )
        decoder.layers = nn.ModuleList(fused)
        _dry_run(decoder, device)
    except Exception:
        decoder.layers, decoder.norm = before
        raise


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
        _only(layer, {*norms, "self_attn", "mlp"})
        attention: Any = layer.self_attn
        q_k_v = ("qkv_proj",) if hasattr(attention, "qkv_proj") else ("q_proj", "k_proj", "v_proj")
        _only(attention, {*q_k_v, "o_proj"}, {"q_norm", "k_norm"})
        if geometry.head_dim != geometry.v_head_dim:
            raise NotFused("values are of another size than keys")
        sizes = [
            heads * geometry.head_dim
            for heads in (geometry.heads, geometry.kv_heads, geometry.kv_heads)
        ]
        self.geometry, self.rotates = geometry, rotates
        self.input_norm, self.post_norm = (RMSNorm.of(getattr(layer, name)) for name in norms)
        self.qkv, self.at = _side_by_side([getattr(attention, name) for name in q_k_v], sizes)
        self.o_proj = attention.o_proj
        self.q_norm, self.k_norm = (
            RMSNorm.of(norm) if (norm := getattr(attention, name, None)) else None
            for name in ("q_norm", "k_norm")
        )
        self._check_head_norms()
        self.mlp = GatedMLP.of(layer.mlp) or layer.mlp

    def _check_head_norms(self) -> None:
        q, k = self.q_norm, self.k_norm
        if (q is None) != (k is None) or (
            q
            and k
            and (q.kind != k.kind or not len(q.weight) == len(k.weight) == self.geometry.head_dim)
        ):
            raise NotFused("the norms of queries and keys are not over one head each")

    def forward(
        self,
        hidden_states: Tensor | Sum,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **_: Any,
    ) -> Sum:
        """Return what `Sum` says of [1, T, H], from as much, or from the `Sum` of the layer
        before.
        """
        x, residual = _parts(hidden_states)
        with current(x.device):
            x, scale, residual = self.input_norm.add(x, residual, _codes_of(self.qkv))
            attended = self._attend(_multiply(self.qkv, x, scale), position_embeddings)
            mlp: Any = self.mlp
            if not isinstance(mlp, GatedMLP):  # experts, say
                x, scale, residual = self.post_norm.add(self.o_proj(attended), residual)
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
        rotary = (
            (angles[0].flatten(0, -2).contiguous(), angles[1].flatten(0, -2).contiguous())
            if self.rotates and angles
            else None
        )
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
    def of(cls, module: Any) -> RMSNorm:
        """Return ``module`` as a norm of the kind that it is seen to be.

        Raises: NotFused, when it is of none.
        """
        weight, eps = (
            getattr(module, "weight", None),
            getattr(module, "variance_epsilon", getattr(module, "eps", None)),
        )
        if isinstance(module, RMSNorm):
            return module
        if (
            not isinstance(weight, nn.Parameter)
            or weight.dim() != 1
            or not isinstance(eps, float)
            or getattr(module, "bias", None) is not None
        ):
            raise NotFused(f"{type(module).__name__} is no RMSNorm")
        x = _random((4, len(weight)), weight) * torch.tensor(
            [1e-3, 0.1, 1, 10], device=weight.device
        )[:, None].to(weight.dtype)
        expected = module(x)
        kinds = [
            cls(weight, eps, plus_one=plus_one, late=late)
            for plus_one, late in ((False, False), (True, True), (False, True), (True, False))
        ]
        errors = [_distance(norm._plain(x), expected, expected) for norm in kinds]
        best = min(range(len(kinds)), key=errors.__getitem__)
        if expected.dtype != x.dtype or not errors[best] <= TOLERANCE[x.dtype]:
            raise NotFused(
                f"{type(module).__name__} is no RMSNorm that is known (relative error "
                f"{errors[best]:.1e})"
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
        return *_rounded(self._plain(total), codes), total

    def _plain(self, x: Tensor) -> Tensor:
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
        self.gate_up, self.down, self.at, self.width, self.activation = (
            gate_up,
            down,
            (at[0], at[1]),
            width,
            activation,
        )

    @classmethod
    def of(cls, mlp: Any) -> GatedMLP | None:
        """Return ``mlp`` as one, None when it is made of other parts."""
        gate_up = ("gate_up_proj",) if hasattr(mlp, "gate_up_proj") else ("gate_proj", "up_proj")
        activation = _activation(getattr(mlp, "act_fn", getattr(mlp, "activation_fn", None)))
        try:
            _only(mlp, {*gate_up, "down_proj"}, {"act_fn", "activation_fn"})
        except NotFused:
            return None
        if activation is None:
            return None
        width = mlp.down_proj.in_features
        joined, at = _side_by_side([getattr(mlp, name) for name in gate_up], [width, width])
        return cls(joined, at, width, mlp.down_proj, activation)

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
        part if norm is None else norm._plain(part) for part, norm in ((q, q_norm), (k, k_norm))
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


def _codes_of(linear: Any) -> Codes | None:
    return linear.takes_codes if isinstance(linear, QuantizedLinear) else None


def _multiply(linear: Any, x: Tensor, scale: Tensor | None) -> Tensor:
    y: Tensor = linear(x) if scale is None else linear.multiply_codes(x, scale)
    return y


def _only(
    module: nn.Module,
    needed: set[str],
    allowed: Set[str] = frozenset(),
) -> None:
    """Raises: NotFused, unless ``module`` has the parts ``needed``, and no other but those
    ``allowed`` and such as do nothing.
    """
    parts = {name for name, part in module.named_children() if not isinstance(part, PASSIVE)}
    own = {name for name, _ in module.named_parameters(recurse=False)}
    if wrong := sorted((needed - parts) | (parts - needed - allowed) | own):
        raise NotFused(
            f"{type(module).__name__} has {'no' if wrong[0] in needed else 'a'} `{wrong[0]}`"
        )


def _activation(function: Any) -> Activation | None:
    """Return which activation ``function`` is seen to be."""
    x = torch.linspace(-8, 8, 65)
    alike = (
        name
        for name, known in ACTIVATIONS.items()
        if callable(function) and torch.allclose(function(x), known(x), atol=1e-6)
    )
    return next(alike, None)


def _side_by_side(linears: Sequence[Any], sizes: Sequence[int]) -> tuple[nn.Module, list[int]]:
    """Return one layer for ``linears``, which have one input, and where each of its parts, of
    ``sizes`` outputs, begins among its outputs.

    Plain weights are joined, and become views of the whole.
    """
    starts = list(accumulate(sizes, initial=0))
    if sum(linear.out_features for linear in linears) != starts[-1]:
        raise NotFused(
            f"{sum(linear.out_features for linear in linears)} outputs instead of {starts[-1]}"
        )
    if len(linears) == 1:
        return linears[0], starts[:-1]
    shared = linears[0].shared if isinstance(linears[0], FusedLinear) else None
    if (
        shared
        and all(isinstance(linear, FusedLinear) and linear.shared is shared for linear in linears)
        and len(shared.sizes) == len(linears)
    ):
        begins = list(accumulate(shared.sizes, initial=0))
        return shared.whole, [begins[linear.index] for linear in linears]
    if (
        not all(type(linear) is nn.Linear for linear in linears)
        or len({linear.weight.dtype for linear in linears}) > 1
    ):
        return SideBySide(linears), starts[:-1]
    whole = nn.Linear(
        linears[0].in_features,
        starts[-1],
        bias=any(linear.bias is not None for linear in linears),
        device="meta",
    )
    whole.weight = nn.Parameter(
        torch.cat([linear.weight for linear in linears]), requires_grad=False
    )
    if whole.bias is not None:
        biases = [
            linear.weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias
            for linear in linears
        ]
        whole.bias = nn.Parameter(torch.cat(biases), requires_grad=False)
    for linear, start in zip(linears, starts, strict=False):
        part = slice(start, start + linear.out_features)
        linear.weight = nn.Parameter(whole.weight[part], requires_grad=False)
        if linear.bias is not None:
            linear.bias = nn.Parameter(whole.bias[part], requires_grad=False)
    return whole, starts[:-1]


def _dry_run(
    decoder: Any, device: torch.device
) -> tuple[Tensor, dict[int, LayerGeometry], dict[nn.Module, dict[str, Any]]]:
    """Run ``decoder`` on a few tokens.

    Return its output [1, T, H], the geometry of its layers, and the arguments that each was called
    with.
    """
    arguments: dict[nn.Module, dict[str, Any]] = {}

    def note(module: nn.Module, _: Any, given: dict[str, Any]) -> None:
        arguments[module] = given

    positions = torch.arange(TOKENS, device=device)[None]
    handles = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in decoder.layers]
    try:
        with recording() as found:
            output: Tensor = decoder(
                input_ids=positions + 1, position_ids=positions, use_cache=False
            )[0]
    finally:
        for handle in handles:
            handle.remove()
    return output, {layer.layer_idx: layer for layer in found.layers}, arguments


def _proven(
    layer: Any, geometry: Mapping[int, LayerGeometry], arguments: dict[str, Any]
) -> FusedLayer:
    """Return ``layer`` fused.

    Raises: NotFused, unless both make the same of a random input, and write the same to the cache.
    """
    number: int = getattr(getattr(layer, "self_attn", None), "layer_idx", -1)
    if number not in geometry:
        raise NotFused(f"{type(layer).__name__} has no `self_attn` that attends")
    if (
        "position_ids" in arguments
        # finds out a layer that looks at positions by itself, as those do that temper their
        # attention
    ):
        arguments = {**arguments, "position_ids": arguments["position_ids"] + 100_000}
    if not hasattr(layer, "input_layernorm"):
        raise NotFused(f"{type(layer).__name__} has no `input_layernorm`")
    weight = RMSNorm.of(layer.input_layernorm).weight
    x = _random((1, TOKENS, len(weight)), weight)
    with _stand_ins(layer):
        error = _error(layer, geometry[number], True, x, arguments)
        rotates = error <= TOLERANCE[x.dtype]
        if not rotates:
            error = min(error, _error(layer, geometry[number], False, x, arguments))
    if error <= TOLERANCE[x.dtype]:
        error = _error(layer, geometry[number], rotates, x, arguments)
        if error <= ROUNDED_TOLERANCE:
            return FusedLayer(layer, geometry[number], rotates=rotates)
    raise NotFused(
        f"{type(layer).__name__} is not what its parts seem to be (relative error {error:.1e})"
    )


def _error(
    layer: Any, geometry: LayerGeometry, rotates: bool, x: Tensor, arguments: dict[str, Any]
) -> float:
    """Return how far a fused ``layer`` is from itself at ``x`` [1, T, H]."""
    added = _with_scratch(layer, x, geometry, arguments)[0] - x
    # as large as what the layer adds: neither then hides in the other's rounding
    x = x * (added.norm() / x.norm()).clamp(1e-3, 1e3)
    fused = FusedLayer(layer, geometry, rotates=rotates)
    return _difference(
        _with_scratch(fused, x, geometry, arguments),
        _with_scratch(layer, x, geometry, arguments),
        x,
    )


class StandIn(nn.Module):
    """In place of a quantized layer while a decoder layer is compared: linear, cheap, and without
    codes that move at the least difference.
    """

    def __init__(self, linear: QuantizedLinear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., N]: for each output the sum of two inputs, with factors."""
        n = torch.arange(self.out_features, device=x.device)
        one, other = ((n * step + 3) % self.in_features for step in (7919, 104729))
        factors = (n % 13 - 6).to(x.dtype) / 8, (n % 7 - 3).to(x.dtype) / 4
        return x[..., one] * factors[0] + x[..., other] * factors[1]


@contextmanager
def _stand_ins(layer: nn.Module) -> Iterator[None]:
    """Put a `StandIn` in place of each quantized layer in ``layer``."""
    taken: list[tuple[Any, str, QuantizedLinear]] = []
    for module in layer.modules():
        holders: list[Any] = [module, *([module.shared] if isinstance(module, FusedLinear) else [])]
        for holder in holders:
            names = (
                [name for name, _ in holder.named_children()]
                if isinstance(holder, nn.Module)
                else ["whole"]
            )
            taken += [
                (holder, name, child)
                for name in names
                if isinstance(child := getattr(holder, name), QuantizedLinear)
            ]
    stand_ins = {linear: StandIn(linear) for *_, linear in taken}
    try:
        for holder, name, linear in taken:
            setattr(holder, name, stand_ins[linear])
        yield
    finally:
        for holder, name, linear in taken:
            setattr(holder, name, linear)


@contextmanager
def _scratch(geometry: LayerGeometry, like: Tensor) -> Iterator[KVPages]:
    """Run one sequence of `TOKENS` tokens on pages of its own."""
    ints = partial(torch.tensor, dtype=torch.int32, device=like.device)
    shape = (2, geometry.kv_heads, 16)
    k, v = (like.new_zeros(*shape, width) for width in (geometry.head_dim, geometry.v_head_dim))
    packed = Packed(
        ints([[1]]), ints([0] * TOKENS), ints(range(TOKENS)), 0, ints([0, TOKENS]), longest=TOKENS
    )
    pages = KVPages(k, v)
    with running(packed, {geometry.layer_idx: pages}):
        yield pages


def _with_scratch(
    layer: Any, x: Tensor, geometry: LayerGeometry, arguments: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what ``layer`` makes of ``x`` [1, T, H], and the keys and values it writes."""
    with _scratch(geometry, x) as pages:
        result = layer(x, **arguments)
    if not isinstance(result, Tensor | Sum):
        raise NotFused(f"{type(layer).__name__} returns a {type(result).__name__}")
    return result.total()[None] if isinstance(result, Sum) else result, pages.k, pages.v


def _difference(result: tuple[Tensor, ...], expected: tuple[Tensor, ...], x: Tensor) -> float:
    """Return the largest relative error of what a layer adds to ``x``, and of its keys and
    values.
    """
    references = (expected[0] - x, *expected[1:])
    return max(_distance(*three) for three in zip(result, expected, references, strict=True))


def _random(shape: tuple[int, ...], like: Tensor) -> Tensor:
    generator = torch.Generator(like.device).manual_seed(0)
    return torch.randn(shape, generator=generator, device=like.device).to(like.dtype)


def _distance(result: Tensor, expected: Tensor, reference: Tensor) -> float:
    """Return how far ``result`` is from ``expected``, relative to the norm of ``reference``; NaN
    counts as far.
    """
    size = float(reference.double().norm())
    return float((result.double() - expected.double()).norm()) / (size or 1.0)
