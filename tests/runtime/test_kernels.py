"""The registry of kernels: who is chosen, who is chosen for a few tokens, and that the operator
calls them so.
"""

from dataclasses import replace

import pytest
import torch

from qtool.runtime import kernels
from qtool.runtime.kernels import (
    KERNELS,
    Choice,
    Device,
    FewTokens,
    LinearSpec,
    choose,
    load_kernel,
)
from qtool.runtime.kernels import reference as plain
from qtool.runtime.linear import QuantizedLinear, SharedInput
from qtool.scheme import SCHEMES, Activations
from qtool.weight import quantize

H200 = Device("cuda", 90)


def spec_of(name: str, shape: tuple[int, int] = (256, 512)) -> LinearSpec:
    return LinearSpec(SCHEMES[name], shape, torch.bfloat16, name in ("FP8", "W8A8_STATIC"))


@pytest.fixture
def with_humming(monkeypatch):
    monkeypatch.setattr(load_kernel("humming"), "_unusable_reason", lambda: None)


@pytest.mark.parametrize("device", KERNELS)
def test_the_plain_kernel_comes_last_and_takes_everything(device):
    assert KERNELS[device][-1] == "reference"
    assert all(
        plain.unsupported_reason(spec_of(name), Device(device, 75)) is None for name in SCHEMES
    )


def test_few_tokens_get_a_kernel_of_their_own_where_one_was_measured_to_be_faster(with_humming):
    assert str(choose(spec_of("W4A16"), H200)) == "triton_weight_only to 16 tokens, then humming"
    for name in ("NVFP4A16", "MXFP4A16"):
        assert str(choose(spec_of(name), H200)) == "triton_weight_only to 16 tokens, then humming"
    assert str(choose(spec_of("W4A16"), Device("cuda", 80))) == "humming"


@pytest.mark.parametrize("name", ["FP8", "FP8_DYNAMIC", "W8A8", "W8A8_STATIC"])
def test_codes_are_multiplied_by_triton_on_hopper_and_by_torch_elsewhere(name):
    assert str(choose(spec_of(name), H200)) == "triton_w8a8"
    elsewhere = choose(spec_of(name), Device("cuda", 100))
    assert str(elsewhere) == "scaled_mm" and "sm_90" in elsewhere.refused["triton_w8a8"]
    for_all = replace(
        SCHEMES[name], activations=Activations(SCHEMES[name].weights.format, "tensor")
    )
    # one scale for all tokens, found at run time
    assert str(choose(LinearSpec(for_all, (256, 512), torch.bfloat16), H200)) == "scaled_mm"


def test_a_second_copy_of_the_weight_is_made_only_where_there_is_room(with_humming):
    assert choose(spec_of("W4A16"), H200, second_copy=False).few is None


def test_without_humming_triton_serves_all_tokens(monkeypatch):
    monkeypatch.setattr(
        load_kernel("humming"), "_unusable_reason", lambda: "humming-kernels is not installed"
    )
    choice = choose(spec_of("W4A16"), H200)
    assert str(choice) == "triton_weight_only"
    assert "not installed" in choice.refused["humming"]


def test_the_operator_calls_the_kernel_for_the_number_of_tokens(monkeypatch):
    called = []

    class Recorder:
        def __init__(self, name):
            self.name, self.pack = name, plain.pack

        def apply(self, spec, x, packed, bias):
            called.append((self.name, x.shape[0]))
            return plain.apply(spec, x, packed, bias)

    monkeypatch.setattr(kernels, "load_kernel", Recorder)
    monkeypatch.setattr("qtool.runtime.linear.load_kernel", Recorder)
    spec = spec_of("W4A16")
    weight = quantize(torch.randn(spec.shape, dtype=torch.bfloat16), spec.scheme)
    layer = QuantizedLinear(spec, Choice("many", {}, FewTokens("few", 3)), weight)
    expected = QuantizedLinear(spec, Choice("reference", {}), weight)
    for tokens in (1, 3, 4, 9):
        x = torch.randn(tokens, 512, dtype=torch.bfloat16)
        assert torch.equal(layer(x), expected(x))
    assert [call for call in called if call[0] != "reference"] == [
        ("few", 1),
        ("few", 3),
        ("many", 4),
        ("many", 9),
    ]
    # one copy where both read the same tensors
    assert layer.few_data.data_ptr() == layer.many_data.data_ptr() == weight.data.data_ptr()


def test_the_order_of_the_inputs_and_their_factor_come_before_the_kernel():
    spec = spec_of("W8A16")
    weight = quantize(torch.randn(spec.shape, dtype=torch.bfloat16), spec.scheme)
    order, factor = torch.randperm(512).to(torch.int32), torch.rand(512, dtype=torch.bfloat16) + 0.5
    x = torch.randn(2, 3, 512, dtype=torch.bfloat16)
    layer = QuantizedLinear(
        spec, Choice("reference", {}), replace(weight, perm=order, pre_scale=factor)
    )
    plainly = QuantizedLinear(spec, Choice("reference", {}), weight)
    assert torch.equal(layer(x), plainly((x * factor)[..., order.long()]))
    assert layer(x[:0]).shape == (0, 3, 256)


def test_layers_that_share_an_input_take_their_parts_of_one_product():
    spec = spec_of("W8A16")
    whole = QuantizedLinear(
        spec,
        Choice("reference", {}),
        quantize(torch.randn(spec.shape, dtype=torch.bfloat16), spec.scheme),
    )
    shared = SharedInput(whole, (128, 64, 64))
    one, other = (
        torch.randn(4, 512, dtype=torch.bfloat16),
        torch.randn(4, 512, dtype=torch.bfloat16),
    )
    expected, expected_other = (
        whole(one).split((128, 64, 64), -1),
        whole(other).split((128, 64, 64), -1),
    )
    assert torch.equal(shared.take(one, 0), expected[0])
    # another input in between is no trouble
    assert torch.equal(shared.take(other, 2), expected_other[2])
    assert torch.equal(shared.take(one, 1), expected[1])
    assert torch.equal(shared.take(one, 1), expected[1])  # nor is asking twice
    shared.take(one, 0)
    one.zero_()
    assert not shared.take(one, 2).any()  # the same tensor with other content is another input
    shared = SharedInput(whole, (128, 64, 64))
    for index in range(3):
        shared.take(one, index)
    assert shared._waiting is None  # nothing is kept that nobody needs any more
