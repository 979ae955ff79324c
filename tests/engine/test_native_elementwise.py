"""native_elementwise.c computes what the torch functions compute that it replaces."""

from __future__ import annotations

import itertools

import pytest
import torch

from qtool.engine import native_elementwise
from qtool.engine.attention.pages import PAGE, KVPages, Packed
from qtool.engine.decoder_layers import gated
from qtool.engine.fused_attention import Rotary, rotate_and_write
from qtool.engine.norm_kind import NormKind
from qtool.engine.norms import KINDS, Norm, Sum, add_norm

pytestmark = pytest.mark.skipif(
    isinstance(native_elementwise.elementwise_library(), str),
    reason=f"native_elementwise: {native_elementwise.elementwise_library()}",
)
ULP = 2**-7  # of bf16: sums of squares are added in another order


@pytest.fixture
def plainly(monkeypatch):
    """Runs a function without the library, which must have run since the last time."""
    library, calls = native_elementwise._library, []
    monkeypatch.setattr(native_elementwise, "_library", lambda: calls.append(1) or library())

    def run(function):
        assert calls, "the library was not called"
        calls.clear()
        with monkeypatch.context() as patch:
            patch.setattr(native_elementwise, "applies", lambda *_: False)
            return function()

    return run


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).bfloat16()


def norm_of(width: int, kind: tuple[bool, bool, bool], *, bias: bool) -> Norm:
    weight = torch.nn.Parameter(numbers(width) + 1, requires_grad=False)
    shift = torch.nn.Parameter(numbers(width + 1)[1:], requires_grad=False)
    return Norm(weight, NormKind(1e-5, *kind), shift if bias else None)


@pytest.mark.parametrize("width", [24, 64, 1000])
@pytest.mark.parametrize("tokens", [1, 70])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_norms_of_sums_are_those_of_torch(kind, tokens, width, plainly):
    x, residual, other = (numbers(tokens, width + extra)[:, :width] for extra in range(3))
    residual, other = residual.contiguous(), other.contiguous()
    norm, after = norm_of(width, kind, bias=kind[2]), norm_of(width, kind, bias=False)
    sums = Sum(x, residual), Sum(x, residual, other=other), Sum(x, residual, after, 0.3)
    for states, chosen in ((Sum(x), norm), *itertools.product(sums, (norm, None))):
        ours = add_norm(states, chosen)
        expected = plainly(lambda s=states, n=chosen: add_norm(s, n))
        for mine, theirs in zip(ours[::2], expected[::2], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=2 * ULP, atol=2 * ULP)


@pytest.mark.parametrize("width", [24, 1000])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gated_activations_are_those_of_torch(activation, width, plainly):
    x = numbers(9, 2 * width + 8) * 4
    x[0, :6] = torch.tensor([0, -0.0, 90, -90, float("inf"), 1e-30])
    ours = gated(x, (0, width + 8), width, activation)[0]
    expected = plainly(lambda: gated(x, (0, width + 8), width, activation)[0])
    torch.testing.assert_close(ours, expected, rtol=ULP, atol=1e-5)


@pytest.mark.parametrize("norms", [None, "one", "each"])
@pytest.mark.parametrize(
    ("angles", "rotated"),
    [
        *(("twice", 64), ("twice", 24), ("once", 64), ("interleaved", 64), ("interleaved", 40)),
        ("none", 0),
    ],
)
@pytest.mark.parametrize("tokens", [1, 40])
def test_queries_keys_and_values_are_those_of_torch(tokens, angles, rotated, norms, plainly):
    heads, kv_heads, width = 4, 2, 64
    qkv = numbers(tokens, (2 * heads + 2 * kv_heads) * width)
    at = (0, 2 * heads * width, (2 * heads + kv_heads) * width)  # gates stand beside queries
    rotary = None
    if rotated:
        half = numbers(2, tokens, rotated // 2).unbind()
        cos, sin = half if angles == "once" else (torch.cat((part, part), -1) for part in half)
        rotary = Rotary(cos, sin, angles)
    pair = None, None
    if norms:
        shapes = [(count, width) if norms == "each" else (width,) for count in (heads, kv_heads)]
        weights = (torch.nn.Parameter(numbers(*shape), requires_grad=False) for shape in shapes)
        pair = tuple(Norm(weight, NormKind(1e-6)) for weight in weights)
    table = torch.tensor([[3, 1, 4]], dtype=torch.int32)
    rows, positions = torch.zeros(tokens, dtype=torch.int32), torch.arange(tokens).int()
    packed = Packed(table, rows, positions, tokens)

    def run():
        k = torch.zeros(5, kv_heads, PAGE, width, dtype=torch.bfloat16)
        kv = KVPages(k, k.clone())
        q = rotate_and_write(qkv, at, heads, 2 * width, *pair, rotary, kv, packed)
        return q, kv.k, kv.v

    for ours, expected in zip(run(), plainly(run), strict=True):
        if norms:
            torch.testing.assert_close(ours, expected, rtol=3 * ULP, atol=3 * ULP)
        else:
            assert torch.equal(ours, expected)
