"""The CPU kernels: each against the plain one and float64, over random layers; what they take, and
what they say of the rest.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qtool.runtime.kernels import KERNELS, Choice, Device, LinearSpec, choose, load_kernel, native
from qtool.runtime.kernels import int4pack as int4
from qtool.runtime.linear import QuantizedLinear
from qtool.runtime.packed import in_huge_pages
from qtool.scheme import SCHEMES, Activations, Scheme, Weights
from qtool.weight import Activation, QuantizedWeight, dequantize, fake_quantize_input, quantize

CPU = Device("cpu")
TAKERS = {
    "native": tuple(name for name in SCHEMES if name not in ("W8A8", "W8A8_STATIC", "W4A8")),
    "int4pack": ("W4A16", "W4A16_ASYM", "W3A16", "W2A16"),
    "onednn": (
        "W8A8",
        "W8A8_STATIC",
        "W8A16",
        "W8A16_CHANNEL",
        "W7A16",
        "W6A16",
        "W5A16",
        "W4A8",
        "W4A16_ASYM",
    ),
    "int8pack": ("W8A16_CHANNEL",),
    "reference": tuple(SCHEMES),
}


def spec_of(
    scheme: Scheme | str, shape: tuple[int, int] = (80, 256), dtype: torch.dtype = torch.bfloat16
) -> LinearSpec:
    scheme = SCHEMES[scheme] if isinstance(scheme, str) else scheme
    return LinearSpec(
        scheme, shape, dtype, bool(scheme.activations and not scheme.activations.dynamic)
    )


def sample(spec: LinearSpec, tokens: int, seed: int = 0) -> tuple[torch.Tensor, QuantizedWeight]:
    """An input with an outlying channel and tokens of several sizes, and a weight, with the scale
    of such inputs where it is static.
    """
    generator = torch.Generator().manual_seed(seed)
    x = (
        torch.randn(tokens, spec.shape[1], generator=generator)
        * torch.rand(tokens, 1, generator=generator)
        * 5
        + 0.3
    )
    x[:, 0] *= 30
    x = x.to(spec.dtype)
    weight = quantize(
        (torch.randn(spec.shape, generator=generator) * 0.02 + 0.005).to(spec.dtype), spec.scheme
    )
    activations = spec.scheme.activations
    if activations and not activations.dynamic:
        low, high = x.float().min().clamp(max=0), x.float().max().clamp(min=0)
        zero = None if activations.symmetric else (-128 - low * 255 / (high - low)).round()
        scale = x.float().abs().amax() / 127 if activations.symmetric else (high - low) / 255
        weight = replace(weight, activation=Activation(activations, scale, zero))
    elif activations and activations.scale == "e4m3":
        weight = replace(weight, activation=Activation(activations, x.float().abs().amax() / 2688))
    return x, weight


def exact(
    spec: LinearSpec, x: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None
) -> torch.Tensor:
    """The product in float64, of the input as it is rounded."""
    if spec.scheme.activations:
        static = weight.activation
        x = fake_quantize_input(x, spec.scheme.activations, static.scale, static.zero)
    y = x.double() @ dequantize(weight).double().T
    return y if bias is None else y + bias.double()


# what this machine can run: native asks for more than the others, and is tested apart, as is
# int8_groups, which takes no scheme of a name
HERE = [
    kernel
    for kernel in KERNELS["cpu"]
    if kernel != "int8_groups"
    and (
        kernel != "native" or load_kernel(kernel).unsupported_reason(spec_of("W4A16"), CPU) is None
    )
]


def relative_error(y: torch.Tensor, reference: torch.Tensor) -> float:
    return float((y.double() - reference).norm() / reference.norm().clamp(min=1e-30))


def why_not(kernel: str, spec: LinearSpec) -> str | None:
    """Why a kernel cannot compute; native leaves some layers to another that is faster."""
    if kernel == "native":
        return native.unsupported_product(spec)
    return load_kernel(kernel).unsupported_reason(spec, CPU)


def run(
    kernel: str,
    spec: LinearSpec,
    x: torch.Tensor,
    weight: QuantizedWeight,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    module = load_kernel(kernel)
    assert why_not(kernel, spec) is None
    y = module.apply(spec, x, module.pack(spec, weight), bias)
    assert y.shape == (x.shape[0], spec.shape[0]) and y.dtype == x.dtype and y.is_contiguous()
    return y


def check(
    kernel: str, scheme: Scheme, shape: tuple[int, int], tokens: int, has_bias: bool, seed: int
) -> None:
    spec = spec_of(scheme, shape)
    x, weight = sample(spec, tokens, seed)
    bias = torch.linspace(-1, 1, shape[0]).to(spec.dtype) if has_bias else None
    y, reference = run(kernel, spec, x, weight, bias), exact(spec, x, weight, bias)
    # a few outputs may cancel
    usual = (
        torch.outer(x.double().norm(dim=1), dequantize(weight).double().norm(dim=1)).norm()
        / shape[1] ** 0.5
    )
    size = torch.maximum(reference.norm(), usual)
    assert (y.double() - reference).norm() <= 1e-2 * size
    assert (y.double() - run("reference", spec, x, weight, bias).double()).norm() <= 1e-2 * size


groups = st.sampled_from([32, 64, 128, 256])
sizes = st.integers(1, 150) | st.sampled_from([256, 384])
tokens = st.integers(1, 9) | st.sampled_from([79, 80, 200])
options = {
    "outputs": sizes,
    "inputs": sizes,
    "tokens": tokens,
    "has_bias": st.booleans(),
    "seed": st.integers(0, 1000),
}


def weights_of(
    formats: list[str], group_sizes: st.SearchStrategy[int], symmetric: st.SearchStrategy[bool]
) -> st.SearchStrategy[Weights]:
    whole = st.builds(
        Weights,
        st.sampled_from(formats),
        st.sampled_from(["channel", "tensor"]),
        symmetric=symmetric,
    )
    grouped = st.builds(
        Weights, st.sampled_from(formats), st.just("group"), group_sizes, symmetric=symmetric
    )
    return whole | grouped


def even(inputs: int, weights: Weights) -> int:
    return inputs + inputs % 2 if weights.bits == 4 else inputs


@pytest.mark.slow
@settings(max_examples=40)
@given(weights=weights_of(["int2", "int3", "int4"], groups, st.booleans()), **options)
def test_int4pack_multiplies_as_the_definition_says(
    weights, outputs, inputs, tokens, has_bias, seed
):
    check("int4pack", Scheme(weights), (outputs, even(inputs, weights)), tokens, has_bias, seed)


@pytest.mark.slow
@settings(max_examples=60)
@given(
    weights=weights_of([f"int{bits}" for bits in range(2, 9)], st.integers(16, 160), st.booleans()),
    activations=st.none()
    | st.builds(
        Activations,
        st.sampled_from(["int8", "int4"]),
        st.sampled_from(["token", "tensor"]),
        symmetric=st.booleans(),
    )
    | st.builds(
        Activations,
        st.just("int8"),
        st.just("tensor"),
        dynamic=st.just(False),
        symmetric=st.booleans(),
    ),
    **options,
)
def test_onednn_multiplies_as_the_definition_says(
    weights, activations, outputs, inputs, tokens, has_bias, seed
):
    check(
        "onednn",
        Scheme(weights, activations),
        (outputs, even(inputs, weights)),
        tokens,
        has_bias,
        seed,
    )


@pytest.mark.slow
@settings(max_examples=40)
@given(
    weights=st.builds(
        Weights,
        st.sampled_from(["int5", "int6", "int7", "int8"]),
        st.sampled_from(["channel", "tensor"]),
    ),
    **options,
)
def test_int8pack_multiplies_as_the_definition_says(
    weights, outputs, inputs, tokens, has_bias, seed
):
    check("int8pack", Scheme(weights), (outputs, inputs), tokens, has_bias, seed)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", HERE)
def test_4096_tokens_are_no_different(kernel):
    for name in TAKERS[kernel][:2]:
        check(kernel, SCHEMES[name], (72, 256), 4096, True, 0)


@pytest.mark.parametrize(
    ("kernel", "name"), [(kernel, name) for kernel in HERE for name in TAKERS[kernel]]
)
def test_every_kernel_keeps_the_contract(kernel, name):
    spec = spec_of(name)
    assert why_not(kernel, spec) is None
    x, weight = sample(spec, 6)
    bias = torch.linspace(-1, 1, spec.shape[0])
    layer = QuantizedLinear(spec, Choice(kernel, {}), weight, bias)
    y = layer(x.view(2, 3, -1))
    assert y.shape == (2, 3, 80) and y.dtype == torch.bfloat16
    assert relative_error(y.flatten(0, 1), exact(spec, x, weight, bias)) <= 1e-2
    one = QuantizedLinear(spec, Choice("reference", {}), weight, bias)(x[:1]).double()
    assert relative_error(layer(x[:1]), one) <= 1e-2 and layer(x[:0]).shape == (0, 80)


@pytest.mark.parametrize("kernel", HERE)
def test_every_kernel_can_be_in_a_compiled_graph(kernel):
    for name in TAKERS[kernel][::8]:
        spec = spec_of(name)
        x, weight = sample(spec, 6)
        layer = QuantizedLinear(spec, Choice(kernel, {}), weight, torch.ones(spec.shape[0]))
        torch._dynamo.reset()
        assert torch.equal(torch.compile(layer, fullgraph=True, backend="eager")(x), layer(x))


@pytest.mark.parametrize("kernel", HERE)
def test_zeros_stay_zeros_and_a_token_of_zeros_harms_no_other(kernel):
    spec = spec_of(TAKERS[kernel][0])
    x, weight = sample(spec, 3)
    x[1] = 0
    y = run(kernel, spec, x, weight, None)
    assert not y[1].any() and relative_error(y, exact(spec, x, weight, None)) <= 1e-2


@pytest.mark.parametrize("name", TAKERS["onednn"])
def test_rounded_inputs_are_multiplied_exactly(name):
    """What remains is the rounding of the result to bfloat16, half a step of 2^-8, and of the input
    that the definition keeps in bfloat16.
    """
    spec = spec_of(name)
    x, weight = sample(spec, 5)
    assert (
        relative_error(run("onednn", spec, x, weight, None), exact(spec, x, weight, None)) <= 4e-3
    )


def test_unaligned_tensors_do_not_fault():
    spec = spec_of("W8A16_CHANNEL")
    x, weight = sample(spec, 3)
    shifted, data = (
        torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view_as(x),
        torch.empty(weight.data.numel() + 1, dtype=torch.int8)[1:],
    )
    weight = replace(weight, data=data.view_as(weight.data).copy_(weight.data))
    assert (
        relative_error(
            run("int8pack", spec, shifted.copy_(x), weight, None), exact(spec, x, weight, None)
        )
        <= 1e-2
    )


def test_the_operator_and_the_blocks_agree(monkeypatch):
    spec = spec_of("W4A16_ASYM", (200, 200))
    x, weight = sample(spec, 90)
    blocks = run("int4pack", spec, x, weight, None)
    monkeypatch.setattr(int4, "MANY", 1000)
    assert relative_error(run("int4pack", spec, x, weight, None), blocks.double()) <= 1e-2


OBJECTIONS = [
    ("int4pack", spec_of("W4A16", dtype=torch.float16), "float16: supports bfloat16 only"),
    ("int4pack", spec_of("W4A8"), "inputs int8 token: supports 16 bits only"),
    (
        "int4pack",
        spec_of("FP8_W8A16"),
        "weights fp8 channel: supports int2, int3 and int4 by group, channel or tensor",
    ),
    (
        "int4pack",
        spec_of(Scheme(Weights("int4", "group", 48))),
        "needs groups of 32, 64, 128 or 256, found 48",
    ),
    ("onednn", spec_of("W8A8", dtype=torch.float32), "float32: supports bfloat16 only"),
    (
        "onednn",
        spec_of("NVFP4A16"),
        "weights nvfp4 g16: supports integers by group, channel or tensor",
    ),
    (
        "onednn",
        spec_of(Scheme(Weights("int8", "block", block=(64, 64)))),
        "weights int8 64x64: supports integers by group, channel or tensor",
    ),
    ("onednn", spec_of("W4AFP8"), "inputs fp8 token: supports integers by token or tensor"),
    (
        "onednn",
        spec_of(Scheme(Weights("int8"), Activations("int8", "group", 128))),
        "inputs int8 g128: supports integers by token or tensor",
    ),
    ("int8pack", spec_of("W8A16_CHANNEL", dtype=torch.float16), "float16: supports bfloat16 only"),
    ("int8pack", spec_of("W8A8"), "inputs int8 token: supports 16 bits only"),
    (
        "int8pack",
        spec_of("W8A16"),
        "weights int8 g128: supports int5 to int8 by channel or tensor, without zero points",
    ),
]


@pytest.mark.parametrize(("kernel", "spec", "reason"), OBJECTIONS)
def test_an_unsupported_reason_says_what_was_found_and_what_is_taken(kernel, spec, reason):
    assert load_kernel(kernel).unsupported_reason(spec, CPU) == reason


def test_an_older_cpu_is_refused_by_name_of_what_it_lacks(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    choice = choose(spec_of("W8A16_CHANNEL"), CPU)
    old = "needs a CPU with AVX2 or AVX512"
    refused = {
        "int8_groups": "needs a CPU with AVX512 VNNI",
        "native": "needs a CPU with AVX512",
        "int4pack": old,
        "onednn": "needs a CPU with AVX512 VNNI",
        "int8pack": old,
    }
    assert choice == Choice("reference", refused)


def test_each_scheme_goes_to_its_kernel_where_native_is_none(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: False)
    chosen = {name: choose(spec_of(name), CPU).kernel for name in SCHEMES}
    assert {name for name in SCHEMES if chosen[name] == "int4pack"} == {
        "W4A16",
        "W4A16_ASYM",
        "W3A16",
        "W2A16",
    }
    assert {name for name in SCHEMES if chosen[name] == "onednn"} == set(TAKERS["onednn"]) - {
        "W4A16_ASYM"
    }
    assert "int8pack" not in chosen.values()  # it is for CPUs without VNNI


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.float8_e4m3fn], ids=str)
def test_large_tensors_are_the_same_in_huge_pages(dtype):
    tensor = torch.randint(0, 256, (3, 1 << 20), dtype=torch.uint8).view(dtype)
    moved = in_huge_pages(tensor)
    assert moved.data_ptr() != tensor.data_ptr() and moved.data_ptr() % 64 == 0
    assert moved.shape == tensor.shape and moved.dtype == dtype
    assert torch.equal(moved.view(torch.uint8), tensor.view(torch.uint8))
    for left in (tensor[:, ::2], tensor[:, :100]):
        assert in_huge_pages(left) is left
