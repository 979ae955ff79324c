"""Where latents are kept in place of keys and values, and where they are not."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch
from torch import nn

from qtool.engine.latent_attention import LatentAttention, keep_latents
from qtool.runtime.kernels import Choice, LinearSpec
from qtool.runtime.linear import QuantizedLinear
from qtool.scheme import SCHEMES
from qtool.weight import Activation, quantize

HEADS, KEYS, VALUES = 4, 24, 20


class Attention(nn.Module):
    """What `keep_latents` looks at of a model's attention."""

    num_heads, qk_nope_head_dim, qk_rope_head_dim, v_head_dim = HEADS, KEYS, 16, VALUES

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.kv_b_proj = linear

    def expand_kv(self, latents, rotary):
        both = self.kv_b_proj(latents).view(1, latents.shape[2], HEADS, -1).transpose(1, 2)
        keys, values = both.split([KEYS, VALUES], dim=-1)
        return torch.cat([keys, rotary.expand(-1, HEADS, -1, -1)], dim=-1), values


class Scaled(Attention):
    def expand_kv(self, latents, rotary):
        keys, values = super().expand_kv(latents, rotary)
        return keys, 2 * values


class Model(nn.Module):
    dtype = torch.bfloat16

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention


def linear(rank: int = 32, *, bias: bool = False) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(rank, HEADS * (KEYS + VALUES), bias=bias, dtype=torch.bfloat16)


def quantized(name: str) -> QuantizedLinear:
    scheme, dense = SCHEMES[name], linear()
    weight = quantize(dense.weight.data, scheme)
    static = not scheme.activations.dynamic
    if static:
        weight = replace(weight, activation=Activation(scheme.activations, torch.tensor(0.01)))
    spec = LinearSpec(scheme, tuple(dense.weight.shape), torch.bfloat16, static)
    return QuantizedLinear(spec, Choice("reference", ()), weight)


@pytest.mark.parametrize("make", [linear, lambda: quantized("FP8_DYNAMIC")], ids=["", "FP8"])
@torch.no_grad()
def test_latents_are_kept_and_give_the_same_attention(make):
    attention = Attention(make())
    q = torch.randn(HEADS, 5, KEYS + 16).bfloat16()
    latents, rotary = torch.randn(1, 1, 5, 32).bfloat16(), torch.randn(1, 1, 5, 16).bfloat16()
    keys, values = attention.expand_kv(latents, rotary)
    expected = torch.softmax(q.float() @ keys[0].mT.float() / 8, -1) @ values[0].float()
    keep_latents(Model(attention))
    assert isinstance(attention.latent, LatentAttention) and attention.kv_b_proj is None
    kept, latent = attention.expand_kv(latents, rotary)
    assert torch.equal(kept, torch.cat([latents, rotary], -1)) and torch.equal(latent, latents)
    own = attention.latent.queries(*q.transpose(0, 1).split([KEYS, 16], -1))
    own = own.transpose(0, 1).float()
    gathered = torch.softmax(own @ kept[0].mT.float() / 8, -1) @ latents[0].float()
    result = attention.latent.values(gathered.transpose(0, 1).bfloat16()).transpose(0, 1)
    assert float((result - expected).norm() / expected.norm()) < 0.05


@pytest.mark.parametrize(
    ("attention", "reason"),
    [
        (lambda: Attention(quantized("FP8")), "a calibrated scale"),
        (lambda: Attention(linear(48)), "48 and 16 numbers are not powers of two"),
        (lambda: Attention(linear(bias=True)), "without a bias"),
        (lambda: Scaled(linear()), "expands them otherwise"),
    ],
)
@torch.no_grad()
def test_what_does_something_else_keeps_keys_and_values_and_says_so(attention, reason, caplog):
    caplog.set_level(logging.INFO, "qtool.engine")
    module = attention()
    keep_latents(Model(module))
    assert not hasattr(module, "latent") and module.kv_b_proj is not None
    assert reason in caplog.text
