"""Integers in small groups times inputs that are rounded to 8 bits in groups of 32."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_kernels_cpu import CPU, relative_error

from qtool.runtime.kernels import LinearSpec, choose, int8_groups
from qtool.scheme import GGUF_INPUTS, SCHEMES, Scheme, Weights
from qtool.weight import dequantize, fake_quantize_input, quantize

WEIGHTS = [
    Weights("int4", "group", 32),
    *(Weights(f"int{bits}", "group", size) for bits, size in ((2, 16), (3, 16), (5, 32), (6, 16))),
    Weights("int8", "group", 32),
]


def spec_of(weights: Weights, shape: tuple[int, int] = (80, 256)) -> LinearSpec:
    return LinearSpec(Scheme(weights, GGUF_INPUTS), shape, torch.bfloat16)


needs_vnni = pytest.mark.skipif(
    int8_groups.unsupported_reason(spec_of(WEIGHTS[0]), CPU) is not None,
    reason=f"int8_groups: {int8_groups.unsupported_reason(spec_of(WEIGHTS[0]), CPU)}",
)


@needs_vnni
@settings(max_examples=60)
@given(
    st.sampled_from(WEIGHTS),
    st.integers(1, 70),
    st.integers(1, 12),
    st.integers(1, 21) | st.integers(250, 270),
    st.sampled_from([None, torch.float16, torch.float32]),
    st.booleans(),
    st.integers(0, 1000),
)
def test_the_product_is_exact_for_inputs_that_are_rounded(
    weights, outputs, groups, tokens, offset, has_bias, seed
):
    torch.manual_seed(seed)
    shape = (outputs, 32 * groups)
    spec = spec_of(weights, shape)
    weight = quantize(torch.randn(shape) / 30, spec.scheme)
    weight = replace(weight, scale=weight.scale.half() * -1)  # GGUF's may be negative
    if offset is not None:
        sums = torch.randn(outputs, shape[1] // weights.group_size).to(offset)
        weight = replace(weight, offset=sums)
        spec = spec_of(replace(weights, symmetric=False, offset=True), shape)
    assert int8_groups.unsupported_reason(spec, CPU) is None
    x = torch.randn(tokens, shape[1]).bfloat16()
    x[tokens // 2] = 0
    bias = torch.randn(outputs) if has_bias else None
    y = int8_groups.apply(spec, x, int8_groups.pack(spec, weight), bias)
    wanted = fake_quantize_input(x.float(), GGUF_INPUTS).double() @ dequantize(weight).double().T
    wanted = wanted if bias is None else wanted + bias.bfloat16().double()
    assert y.dtype == torch.bfloat16 and relative_error(y, wanted) <= 3e-3  # bf16 is 2e-3


@needs_vnni
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_number_that_is_not_finite_harms_its_token_alone(bad):
    spec = spec_of(WEIGHTS[0])
    weight = quantize(torch.randn(spec.shape), spec.scheme)
    x = torch.randn(9, spec.shape[1]).bfloat16()
    packed = int8_groups.pack(spec, weight)
    right = int8_groups.apply(spec, x, packed, None)
    x[3, 40] = bad
    y = int8_groups.apply(spec, x, packed, None)
    assert y[3].isnan().all()
    others = torch.arange(9) != 3
    assert torch.equal(y[others], right[others])


@needs_vnni
def test_it_is_chosen_for_such_inputs_alone():
    assert choose(spec_of(WEIGHTS[0]), CPU).kernel == "int8_groups"
    refused = {
        LinearSpec(SCHEMES["W4A16"], (80, 256), torch.bfloat16): "inputs 16 bits",
        spec_of(Weights("int4", "group", 64)): "groups of 16 or 32",
        spec_of(Weights("int4", "group", 16)): "4 bits in groups of 32",
        spec_of(Weights("int4", "group", 32, symmetric=False)): "groups of 16 or 32",
        spec_of(WEIGHTS[0], (80, 48)): "48 inputs",
        replace(spec_of(WEIGHTS[0]), dtype=torch.float32): "bfloat16 only",
    }
    for spec, reason in refused.items():
        assert reason in int8_groups.unsupported_reason(spec, CPU)
