"""What a format writes it reads back bit for bit, whatever the scheme, the shape and the order of
the groups; and each library agrees with it.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from qtool.checkpoint import open_checkpoint
from qtool.formats import WRITABLE, QuantizedModule, detect, read, tensor_name
from qtool.scheme import SCHEMES, Activations, Scheme, Weights
from qtool.weight import Activation, QuantizedWeight, dequantize, quantize

pytestmark = pytest.mark.usefixtures("one_thread")
pytest_plugins = ["support.sample_plugin"]

INTEGERS = [
    Scheme(Weights(f"int{bits}", "group", 32, symmetric=symmetric))
    for bits in range(2, 9)
    for symmetric in (True, False)
]
ROWS = [
    Scheme(Weights(f"int{bits}", "channel", symmetric=symmetric))
    for bits in range(2, 9)
    for symmetric in (True, False)
]
OTHERS = [
    Scheme(Weights("fp8", "tensor")),
    Scheme(Weights("fp8", "tensor"), Activations("fp8", "token")),
    Scheme(
        Weights("int8", "channel"), Activations("int8", "tensor", dynamic=False, symmetric=False)
    ),
    Scheme(Weights("fp8", "block", block=(64, 32)), Activations("fp8", "group", 32)),
]
ALL = [*SCHEMES.values(), *INTEGERS, *ROWS, *OTHERS]
NAME = "model.layers.0.self_attn.o_proj"


@st.composite
def layers(draw, scheme):
    """A random layer in ``scheme``, as a module and its weight."""
    group = scheme.weights.group_size or 32
    rows, columns = draw(st.sampled_from([32, 64, 96, 160, 288])), group * draw(st.integers(1, 5))
    seed, dtype = (
        draw(st.integers(0, 999)),
        draw(st.sampled_from([torch.bfloat16, torch.float16, torch.float32])),
    )
    random = torch.Generator().manual_seed(seed)
    tensor = torch.randn(rows, columns, generator=random) * draw(
        st.sampled_from([1e-3, 0.02, 3.0])
    ) + draw(st.sampled_from([0.0, 0.01]))
    if draw(st.booleans()):
        tensor[: rows // 2, :group] = 0
    weight = quantize(tensor.to(dtype), scheme)
    if (
        scheme.weights.format.startswith("int")
        and scheme.weights.group_size
        and columns > group
        and draw(st.booleans())
    ):
        groups = torch.randperm(columns, generator=random) // group
        weight = replace(weight, perm=torch.argsort(groups, stable=True).to(torch.int32))
    if scheme.activations and not (
        scheme.activations.dynamic and scheme.activations.scale != "e4m3"
    ):
        zero = torch.tensor(float(seed % 256 - 128)) if not scheme.activations.symmetric else None
        scale = (torch.rand((), generator=random) + 0.01).bfloat16().float() / 2688
        weight = replace(weight, activation=Activation(scheme.activations, scale, zero))
    if draw(st.booleans()):
        weight = replace(weight, pre_scale=torch.rand(columns, generator=random).to(dtype))
    return weight


def module_of(weight, scheme, **options):
    tensors = {"pre_quant_scale": None} if weight.pre_scale is not None else {}
    return QuantizedModule(
        NAME, scheme, weight.shape, tensors, act_order=weight.perm is not None, **options
    )


def through_a_file(format, module, weight):
    """Write a checkpoint of this one layer, and read it back."""
    with TemporaryDirectory() as folder:
        tensors = {
            tensor_name(module, suffix): tensor
            for suffix, tensor in WRITABLE[format].write(module, weight).items()
        }
        save_file(tensors, Path(folder) / "model.safetensors")
        files = WRITABLE[format].quantization_config([module], ["lm_head"], None)
        for name, content in files.items():
            (Path(folder) / name).write_text(json.dumps(content))
        checkpoint = open_checkpoint(Path(folder))
        layout = detect(checkpoint)
        assert (layout.format, layout.warnings) == (format, ())
        assert layout.modules[module.name].scheme == module.scheme
        assert layout.modules[module.name].shape == module.shape
        return read(checkpoint, layout, module.name)


def same(one: QuantizedWeight, other: QuantizedWeight) -> bool:
    def equal(a, b):
        if isinstance(a, torch.Tensor):
            return (
                isinstance(b, torch.Tensor)
                and (a.dtype, a.shape) == (b.dtype, b.shape)
                and raw(a) == raw(b)
            )
        return (
            all(equal(vars(a)[key], vars(b)[key]) for key in vars(a))
            if isinstance(a, Activation) and b
            else a == b
        )

    return all(equal(vars(one)[key], vars(other)[key]) for key in vars(one))


def raw(tensor):
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


VARIANTS = {"gptq": ["gptq", "gptq_v2"]}


@pytest.mark.parametrize("scheme", ALL, ids=str)
@given(data=st.data())
@settings(max_examples=10)
def test_what_a_format_writes_it_reads_back_bit_for_bit(scheme, data):
    weight = data.draw(layers(scheme))
    for format in WRITABLE:
        for variant in VARIANTS.get(format, [""]):
            module = module_of(weight, scheme, variant=variant)
            if WRITABLE[format].unsupported_reason(module, weight) is None:
                assert same(through_a_file(format, module, weight), weight), format


@given(st.integers(1, 3), st.integers(1, 3), st.sampled_from([32, 64]), st.integers(0, 99))
@settings(max_examples=10)
def test_stacked_experts_are_read_back_bit_for_bit(experts, groups, rows, seed):
    scheme = SCHEMES["MXFP4A16"]
    weight = quantize(
        torch.randn(experts * rows, 32 * groups, generator=torch.Generator().manual_seed(seed)),
        scheme,
    )
    module = QuantizedModule(
        "model.layers.0.mlp.experts.gate_up_proj", scheme, weight.shape, {}, experts=experts
    )
    refusal = WRITABLE["mxfp4"].unsupported_reason(module, weight)
    assert refusal is None if experts > 1 else refusal.startswith("experts")
    assert same(through_a_file("mxfp4", module, weight), weight)


@pytest.mark.parametrize("scheme", ALL, ids=str)
def test_rounding_to_nearest_keeps_as_much_as_its_bits_allow(scheme):
    weight = torch.randn(96, 256, generator=torch.Generator().manual_seed(0))
    noise = (weight - dequantize(quantize(weight, scheme))).square().mean() / weight.square().mean()
    assert noise < {2: 0.4, 3: 0.08, 4: 0.025, 5: 0.004}.get(scheme.weights.bits, 0.0015)


def test_a_weight_is_rounded_the_same_whether_in_one_piece_or_in_many(monkeypatch):
    tensor = torch.randn(300, 96, generator=torch.Generator().manual_seed(0)).bfloat16()
    for scheme in ALL:
        if not (scheme.weights.group_size and 96 % scheme.weights.group_size):
            monkeypatch.undo()
            whole = quantize(tensor, scheme)
            values = dequantize(whole)
            monkeypatch.setattr("qtool.weight.PIECE", 1000)
            assert same(quantize(tensor, scheme), whole)
            assert torch.equal(dequantize(whole), values)


def test_a_last_group_may_be_short():
    scheme = Scheme(Weights("int4", "group", 128, symmetric=False))
    tensor = torch.randn(32, 304, generator=torch.Generator().manual_seed(0))
    weight = quantize(tensor, scheme)
    assert (weight.scale.shape, weight.block) == ((32, 3), (1, 128))
    assert (tensor - dequantize(weight)).abs().max() < 0.25
    module = module_of(weight, scheme, variant="gptq")
    assert same(through_a_file("gptq", module, weight), weight)
    assert (
        WRITABLE["compressed-tensors"].unsupported_reason(module, weight).startswith("group_size")
    )


def test_zeros_and_empty_groups_have_usable_scales():
    for scheme in ALL:
        weight = quantize(torch.zeros(32, 256, dtype=torch.float16), scheme)
        if weight.codebook is None:  # bitsandbytes keeps zero, the largest number of the group
            assert (weight.scale.float() > 0).all()
        assert not dequantize(weight).any()
