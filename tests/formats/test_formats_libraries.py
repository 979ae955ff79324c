"""What qtool writes, the library that owns the format dequantizes to the weights that `dequantize`
says, and rounds to nearest alike.

Where nothing else is said, equal means equal bit for bit, in the dtype the library computes in.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.entrypoints.convert.converters.fp8block_dequantizer import (
    FP8BlockDequantizer,
)
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.quantization import quantize as round_to_codes
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from hypothesis import given, settings
from hypothesis import strategies as st
from test_formats_write import INTEGERS, OTHERS, ROWS, layers, module_of

from qtool.formats import (
    WRITABLE,
    QuantizedModule,
    compressed_tensors,
    fp8_block,
    gptq,
    mxfp4,
    torchao,
)
from qtool.scheme import SCHEMES, Scheme, Weights
from qtool.weight import codes_to_values, dequantize, quantize

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]
pytest_plugins = ["support.sample_plugin"]

few = settings(max_examples=10)
with_groups = [
    scheme
    for scheme in [*SCHEMES.values(), *INTEGERS, *ROWS, *OTHERS]
    if scheme.weights.format.startswith("int")
]
with_floats = [
    scheme for scheme in [*SCHEMES.values(), *OTHERS] if scheme.weights.format.startswith("fp")
]
sized = [
    Scheme(Weights(f"int{bits}", "group", size, symmetric=symmetric))
    for bits, size, symmetric in ((4, 16, False), (8, 64, True), (3, 32, True))
]


def drawn(data, scheme, *, act_order=False):
    """Return a random layer in ``scheme`` without a factor on its input and, unless asked for,
    without act-order.
    """
    weight = replace(data.draw(layers(scheme)), pre_scale=None)
    return weight if act_order else replace(weight, perm=None)


def written(format, weight, scheme, **options):
    """Return the tensors of ``weight``; the example is skipped where the format has an
    objection.
    """
    module = module_of(weight, scheme, **options)
    assert WRITABLE[format].unsupported_reason(module, weight) is None
    return WRITABLE[format].write(module, weight)


def holds(format, scheme):
    weight = quantize(torch.ones(128, 128), scheme)
    return WRITABLE[format].unsupported_reason(module_of(weight, scheme), weight) is None


def config_of(*modules):
    return compressed_tensors.quantization_config(modules, ["lm_head"], None)["config.json"][
        "quantization_config"
    ]


def parsed(scheme):
    """Return ``scheme`` as compressed-tensors understands the config that qtool writes for it."""
    module = QuantizedModule("model.layers.0.mlp.up_proj", scheme, (128, 128), {})
    (group,) = QuantizationConfig.model_validate(config_of(module)).config_groups.values()
    return group


def decompressed(tensors, group):
    return BaseCompressor.get_value_from_registry(group.format).decompress(tensors, group)["weight"]


@pytest.mark.parametrize(
    "scheme",
    [
        scheme
        for scheme in [*with_groups, *with_floats, *sized]
        if holds("compressed-tensors", scheme)
    ],
    ids=str,
)
@given(data=st.data())
@few
def test_compressed_tensors_decompresses_what_is_written(scheme, data):
    weight = drawn(data, scheme)
    found = decompressed(written("compressed-tensors", weight, scheme), parsed(scheme))
    if (
        scheme.weights.scale == "e4m3"
        # it multiplies by scale / divisor, one f32 rounding away from scale * multiplier, and
        # rounds to
        # bf16
    ):
        torch.testing.assert_close(found, dequantize(weight, torch.bfloat16), rtol=2**-7, atol=0)
    # in bf16, which holds a value of 4 bits times a power of two
    elif scheme.weights.scale == "e8m0":
        assert torch.equal(found.float(), dequantize(weight))
    else:  # in the dtype of the scale: the product is rounded once, here as there
        assert found.dtype == weight.scale.dtype
        assert torch.equal(found, dequantize(weight, found.dtype))


def test_compressed_tensors_parses_a_config_of_several_schemes():
    names = ("FP8_DYNAMIC", "W4A16_ASYM", "NVFP4", "MXFP8", "W8A8_STATIC")
    modules = [
        QuantizedModule(f"model.layers.{i}.mlp.up_proj", SCHEMES[name], (128, 128), {})
        for i, name in enumerate(names)
    ]
    config = QuantizationConfig.model_validate(config_of(*modules))
    assert config.format == "mixed-precision"
    assert config.ignore == ["lm_head"]
    found = {group.targets[0]: group for group in config.config_groups.values()}
    for module in modules:
        alone = parsed(module.scheme)
        assert found[module.name].weights == alone.weights
        assert found[module.name].input_activations == alone.input_activations
        assert found[module.name].format == alone.format


def test_compressed_tensors_names_the_format_of_a_scheme_as_the_library_does():
    from compressed_tensors.compressors.format import infer_module_format

    for scheme in [*with_groups, *with_floats]:
        if holds("compressed-tensors", scheme):
            group = parsed(scheme)
            inputs = scheme.activations and scheme.activations.format
            if group.format == "pack-quantized" and inputs == "fp8":
                continue  # what vLLM's kernel takes, and the library only when it is asked for
            assert infer_module_format(torch.nn.Linear, group).value == group.format


V1_AND_V2 = [
    (Scheme(Weights(f"int{bits}", "group", 32, symmetric=symmetric)), version)
    for bits in gptq.BITS
    for symmetric in (True, False)
    for version in ("gptq", "gptq_v2")
]
V1_AND_V2 += [
    (Scheme(Weights(f"int{bits}", "channel", symmetric=bits == 8)), "gptq") for bits in gptq.BITS
]


@pytest.mark.parametrize(("scheme", "version"), V1_AND_V2, ids=str)
@given(data=st.data())
@few
def test_gptqmodels_torch_kernel_dequantizes_what_is_written(scheme, version, data):
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module

    weight = drawn(data, scheme, act_order=True)
    tensors = written("gptq", weight, scheme, variant=version)
    rows, columns = weight.shape
    config = gptq.quantization_config([module_of(weight, scheme, variant=version)], [], None)[
        "quantize_config.json"
    ]
    options = {key: config[key] for key in ("bits", "group_size", "sym", "desc_act")}
    kernel = TorchLinear(
        **options, in_features=columns, out_features=rows, register_buffers=True, format=version
    )
    for name, tensor in tensors.items():
        assert getattr(kernel, name).shape == tensor.shape
        setattr(kernel, name, tensor.clone())
    if version == "gptq":
        convert_gptq_v1_to_v2_format_module(kernel, scheme.weights.bits, torch.int32)
    found = kernel.eval().dequantize_weight().T  # in the dtype of the scales
    assert torch.equal(found, dequantize(weight, weight.scale.dtype))


@pytest.mark.parametrize(("scheme", "version"), V1_AND_V2, ids=str)
@given(data=st.data())
@few
def test_gptq_files_mean_code_minus_zero_times_scale_by_the_plain_formula(scheme, version, data):
    weight, bits = drawn(data, scheme, act_order=True), scheme.weights.bits
    tensors = written("gptq", weight, scheme, variant=version)

    def numbers(words):  # each row of words is one long number, its lowest bits the first code
        return [
            sum((word & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(row))
            for row in words.tolist()
        ]

    def codes(rows, count):
        return torch.tensor(
            [[row >> (bits * i) & (2**bits - 1) for i in range(count)] for row in rows]
        )

    (count, columns), rows = (len(tensors["scales"]), weight.shape[1]), weight.shape[0]
    rows = min(rows, 32)  # as many rows as fill a word in every width; Python's integers are slow
    q = codes(numbers(tensors["qweight"].T[:rows]), columns).T
    zeros = numbers(tensors["qzeros"])
    if version == "gptq" and bits != 3:  # each word holds zero - 1 in every field, and borrows
        one = sum(1 << (bits * i) for i in range(32 // bits))
        zeros = [
            sum(
                ((number >> (32 * i)) + one & 0xFFFFFFFF) << (32 * i)
                for i in range(tensors["qzeros"].shape[1])
            )
            for number in zeros
        ]
    z = codes(zeros, rows)
    if version == "gptq" and bits == 3:
        z = (z + 1) % 8
    group = tensors["g_idx"].long()
    assert int(group.max()) < count
    expected = (q - z[group]).float() * tensors["scales"].float()[group, :rows]
    assert torch.equal(expected.T, dequantize(weight)[:rows])


AWQ = [
    Scheme(Weights("int4", "group", size, symmetric=symmetric))
    for size in (16, 32, 128)
    for symmetric in (True, False)
]


@pytest.mark.parametrize(
    "scheme", [*AWQ, Scheme(Weights("int4", "channel", symmetric=False))], ids=str
)
@given(data=st.data())
@few
def test_autoawqs_dequantization_reads_what_is_written(scheme, data):
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm  # AutoAWQ's own

    weight = drawn(data, scheme)
    tensors = written("awq", weight, scheme)
    found = dequantize_gemm(
        tensors["qweight"],
        tensors["qzeros"],
        tensors["scales"],
        4,
        scheme.weights.group_size or weight.shape[1],
    )
    # in the dtype of the scales
    assert torch.equal(found.T, dequantize(weight, weight.scale.dtype))


def by_fp8(tensors, shape, block):
    from modelopt.torch.quantization.qtensor import FP8QTensor

    scale, options = tensors["weight_scale"].float(), {}
    if block:
        scale = scale.reshape(scale.shape[0], -1) if scale.dim() == 4 else scale
        options = {"block_sizes": {-1: block[1], -2: block[0]}}
    elif scale.dim() == 1:
        scale = scale[:, None]
    return FP8QTensor(shape, torch.float32, tensors["weight"]).dequantize(scale=scale, **options)


def by_int8(tensors, shape, block):
    from modelopt.torch.quantization.qtensor import INT8QTensor

    return INT8QTensor(shape, torch.float32, tensors["weight"]).dequantize(
        scale=tensors["weight_scale"].float()[:, None]
    )


def by_nvfp4(tensors, shape, block):
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    size = shape[1] // tensors["weight_scale"].shape[1]
    scales = {
        "scale": tensors["weight_scale"],
        "double_scale": tensors["weight_scale_2"],
        "block_sizes": {-1: size},
    }
    return NVFP4QTensor(shape, torch.float32, tensors["weight"]).dequantize(**scales)


def by_mxfp4(tensors, shape, block):
    from modelopt.torch.quantization.qtensor import MXFP4QTensor

    return MXFP4QTensor(shape, torch.float32, tensors["weight"]).dequantize(
        scale=tensors["weight_scale"], block_sizes={-1: 32}
    )


def by_mxfp8(tensors, shape, block):
    from modelopt.torch.quantization.qtensor import MXFP8QTensor

    return MXFP8QTensor(shape, torch.float32, tensors["weight"]).dequantize(
        scale=tensors["weight_scale"]
    )


MODELOPT = {
    **dict.fromkeys(("FP8", "FP8_DYNAMIC", "FP8_BLOCK", "FP8_BLOCK_W8A16"), by_fp8),
    **dict.fromkeys(("W8A8_STATIC", "W8A16_CHANNEL"), by_int8),
    **dict.fromkeys(("NVFP4", "NVFP4A16", "NVFP4AFP8"), by_nvfp4),
    **dict.fromkeys(("MXFP4", "MXFP4AFP8"), by_mxfp4),
    "MXFP8": by_mxfp8,
}


@pytest.mark.parametrize("name", MODELOPT)
@given(data=st.data())
@few
def test_modelopts_tensor_classes_dequantize_what_is_written(name, data):
    scheme = SCHEMES[name]
    weight = drawn(data, scheme)
    found = MODELOPT[name](written("modelopt", weight, scheme), weight.shape, scheme.weights.block)
    assert torch.equal(found, dequantize(weight))


@given(data=st.data())
@few
def test_modelopts_export_packs_int4_into_the_same_bytes(data):
    """Its INT4QTensor packs along the inputs, high nibble first, and never reaches a checkpoint:
    the export packs along the outputs.
    """
    from modelopt.torch.export.quant_utils import to_quantized_weight

    scheme = SCHEMES["W4A16"]
    weight = drawn(data, scheme)
    tensors = written("modelopt", weight, scheme)
    packed = to_quantized_weight(
        dequantize(weight), weight.scale.float(), "int4_awq", None, scheme.weights.group_size
    )
    assert torch.equal(packed, tensors["weight"])


BLOCKS = [
    SCHEMES["FP8_BLOCK"],
    Scheme(
        Weights("fp8", "block", block=(64, 32)),
        replace(SCHEMES["FP8_BLOCK"].activations, group_size=32),
    ),
]


@pytest.mark.parametrize("scheme", BLOCKS, ids=str)
@given(data=st.data())
@few
def test_weight_scale_inv_multiplies_whatever_its_name_says(scheme, data):
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    weight = drawn(data, scheme)
    tensors = written("fp8_block", weight, scheme)
    theirs = FP8BlockDequantizer(
        weight_block_size=scheme.weights.block, dtype=torch.float32
    )._create_dequantized_weight(**tensors)
    assert torch.equal(theirs, dequantize(weight))
    if weight.block is None:  # transformers wants whole blocks
        theirs = Fp8Dequantize(None)._dequantize_one(
            tensors["weight"], tensors["weight_scale_inv"], torch.float32
        )
        assert torch.equal(theirs, dequantize(weight))


@pytest.mark.parametrize(
    ("method", "scheme"), [("tensor", "FP8_DYNAMIC"), ("row", "FP8_W8A16"), ("block", "FP8_BLOCK")]
)
def test_gptqmodels_weight_scale_inv_is_a_true_reciprocal(method, scheme):
    from gptqmodel.nn_modules.qlinear.fp8 import quantize_fp8_weight
    from gptqmodel.quantization.dtype import dequantize_fp8

    original = torch.randn(128, 256, generator=torch.Generator().manual_seed(0)) * 0.02
    data, scale = quantize_fp8_weight(
        original,
        weight_scale_method=method,
        weight_block_size=(128, 128) if method == "block" else None,
    )
    chosen = Scheme(Weights("fp8", "tensor")) if method == "tensor" else SCHEMES[scheme]
    module = QuantizedModule("layer", chosen, (128, 256), {}, fp8_block.INVERSE)
    weight = fp8_block.read(module, {"weight": data, "weight_scale_inv": scale})
    axis = None if method == "block" else 0
    # divides; a reciprocal is rounded first
    theirs = dequantize_fp8(data, scale_inv=scale, axis=axis, target_dtype=torch.float32)
    torch.testing.assert_close(dequantize(weight), theirs, rtol=2**-22, atol=0)
    assert (original - dequantize(weight)).norm() < 0.05 * original.norm()


@given(st.integers(2, 3), st.integers(1, 3), st.sampled_from([32, 64]), st.integers(0, 99))
@few
def test_transformers_converts_the_stacked_experts_of_gpt_oss_to_the_same_weights(
    experts, groups, rows, seed
):
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    scheme = SCHEMES["MXFP4A16"]
    weight = quantize(
        torch.randn(experts * rows, 32 * groups, generator=torch.Generator().manual_seed(seed)),
        scheme,
    )
    module = QuantizedModule(
        "model.layers.0.mlp.experts.gate_up_proj", scheme, weight.shape, {}, experts=experts
    )
    tensors = mxfp4.write(module, weight)
    # [experts, inputs, outputs]
    found = convert_moe_packed_tensors(tensors["_blocks"], tensors["_scales"], dtype=torch.float32)
    assert torch.equal(found.transpose(1, 2).reshape(weight.shape), dequantize(weight))


@pytest.mark.parametrize("name", ["W8A16_CHANNEL", "FP8_W8A16"])
@given(data=st.data())
@few
def test_torchaos_tensors_dequantize_to_the_same_weights(name, data):
    """Torchao's format is only read: its tensor class is given the codes and scales of a weight,
    and both say what they mean.
    """
    from torchao.quantization import Float8Tensor, Int8Tensor

    weight = drawn(data, SCHEMES[name])
    module = module_of(weight, SCHEMES[name])
    read = torchao.read(module, {torchao.DATA: weight.data, torchao.SCALE: weight.scale})
    if name == "FP8_W8A16":
        theirs = Float8Tensor(
            weight.data, weight.scale.float(), [1, weight.shape[1]], dtype=torch.float32
        )
    else:
        theirs = Int8Tensor(weight.data, weight.scale.float(), [1, weight.shape[1]], torch.float32)
    assert torch.equal(theirs.dequantize(), dequantize(read))


# Rounding to nearest. Both sides start from f32 tensors that bf16 could hold: given bf16,
# compressed-tensors divides in bf16 and rounds twice.


def rounded_by_compressed_tensors(tensor, scheme):
    """Return (codes as f32, scale, zero, divisor) by the library's own observer arithmetic, for f32
    ``tensor``.
    """
    group, weights, (rows, columns) = parsed(scheme), scheme.weights, tensor.shape
    height, width = weights.block or (
        (rows, columns) if weights.granularity == "tensor" else (1, weights.group_size or columns)
    )
    tiles = tensor.reshape(rows // height, height, columns // width, width)
    divisor = generate_gparam(*torch.aminmax(tensor)) if weights.scale == "e4m3" else None
    scale, zero = calculate_qparams(
        tiles.amin((1, 3)), tiles.amax((1, 3)), group.weights, global_scale=divisor
    )
    if weights.granularity == "tensor":
        scale, zero = scale.reshape(1), zero.reshape(1)
    codes = round_to_codes(
        tensor, scale, None if weights.symmetric else zero, group.weights, global_scale=divisor
    )
    return (
        codes.float(),
        scale.float().expand(rows, -1) if weights.granularity == "tensor" else scale.float(),
        zero,
    )


def random_weight(seed, size=0.02, shift=0.0):
    return (
        (torch.randn(128, 256, generator=torch.Generator().manual_seed(seed)) * size + shift)
        .bfloat16()
        .float()
    )


random_weights = given(
    st.integers(0, 999), st.sampled_from([1e-3, 0.02, 3.0]), st.sampled_from([0.0, 0.01])
)
SYMMETRIC = [scheme for scheme in [*ROWS, *INTEGERS] if scheme.weights.symmetric]
ASYMMETRIC = [scheme for scheme in [*ROWS, *INTEGERS] if not scheme.weights.symmetric]
FLOATS = ("FP8", "FP8_DYNAMIC", "FP8_BLOCK", "MXFP4", "MXFP8")


@pytest.mark.parametrize(
    "scheme",
    [*SYMMETRIC, *OTHERS[:2], OTHERS[3], *(SCHEMES[name] for name in ("W4A16", *FLOATS))],
    ids=str,
)
@random_weights
@few
def test_rounding_to_nearest_gives_the_codes_and_scales_of_compressed_tensors(
    scheme, seed, size, shift
):
    tensor = random_weight(seed, size, shift)
    weight = quantize(tensor, scheme)
    codes, scale, _ = rounded_by_compressed_tensors(tensor, scheme)
    assert torch.equal(weight.scale.float(), scale)
    assert torch.equal(codes_to_values(weight.data, weight.scale.dtype), codes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["W8A16_CHANNEL", "W4A16", "FP8_DYNAMIC", "FP8_BLOCK"])
def test_scales_of_16_bits_are_those_of_compressed_tensors(name, dtype):
    tensor = random_weight(0, 2e-4).to(dtype)
    codes, scale, _ = rounded_by_compressed_tensors(tensor, SCHEMES[name])
    weight = quantize(tensor, SCHEMES[name])
    assert torch.equal(weight.scale.float(), scale)
    # it divides in 16 bits
    assert (codes_to_values(weight.data, weight.scale.dtype) - codes).abs().max() <= (
        32 if "FP8" in name else 1
    )


@pytest.mark.parametrize("scheme", ASYMMETRIC, ids=str)
@random_weights
@few
def test_asymmetric_codes_are_those_of_compressed_tensors_but_for_ties(scheme, seed, size, shift):
    """It rounds x / scale + zero and qtool rounds x / scale: halfway between two codes, to f32's
    precision, they may choose differently.
    """
    tensor = random_weight(seed, size, shift)
    weight = quantize(tensor, scheme)
    codes, scale, zero = rounded_by_compressed_tensors(tensor, scheme)
    assert torch.equal(weight.scale, scale)
    assert torch.equal(weight.zero, zero)
    ours = codes_to_values(weight.data, weight.scale.dtype)
    at = codes != ours
    assert torch.equal(codes[at], ours[at] + torch.sign(codes - ours)[at])
    spread = partial(torch.repeat_interleave, repeats=weight.tile[1], dim=1)
    position = tensor / spread(weight.scale) + spread(weight.zero.float())
    torch.testing.assert_close(position[at], (codes + ours)[at] / 2, rtol=0, atol=1e-4)
    assert at.float().mean() < 0.01


@given(st.integers(0, 999))
@few
def test_nvfp4_scales_and_codes_are_those_of_compressed_tensors_but_for_ties(seed):
    """It multiplies by 2688 / amax where qtool divides by amax / 2688: halfway between two numbers,
    in f32, they may choose differently.
    """
    tensor = random_weight(seed)
    weight = quantize(tensor, SCHEMES["NVFP4"])
    codes, scale, _ = rounded_by_compressed_tensors(tensor, SCHEMES["NVFP4"])
    differ = scales_differ_only_halfway(tensor, weight, scale)
    apart = (codes_to_values(weight.data, weight.scale.dtype) != codes) & ~differ.repeat_interleave(
        16, dim=1
    )
    theirs = codes * scale.repeat_interleave(16, dim=1) * weight.scale2[:, None]
    torch.testing.assert_close(
        (dequantize(weight) + theirs)[apart], 2 * tensor[apart], rtol=1e-5, atol=0
    )
    assert apart.float().mean() < 0.01


@given(st.integers(0, 999))
@few
def test_nvfp4_scales_and_codes_are_those_of_modelopt_but_for_ties(seed):
    """Its scales are amax / (6 * scale2), qtool's amax / 6 / scale2; where they agree the codes are
    equal.
    """
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    tensor = random_weight(seed)
    weight = quantize(tensor, SCHEMES["NVFP4"])
    theirs, scale, scale2 = NVFP4QTensor.quantize(tensor.clone(), 16)
    assert torch.equal(weight.scale2, scale2.expand(128))
    same = ~scales_differ_only_halfway(tensor, weight, scale.float())
    ours, theirs = (
        codes_to_values(data, weight.scale.dtype).reshape(128, 16, 16)
        for data in (weight.data, theirs._quantized_data)
    )
    assert torch.equal(ours[same], theirs[same])


def scales_differ_only_halfway(tensor, weight, scale):
    """Return where ``scale`` is not that of ``weight``, having checked that what both round lies in
    the middle.
    """
    differ = weight.scale.float() != scale
    exact = tensor.reshape(128, 16, 16).abs().amax(2) / 6 / weight.scale2[:, None]
    torch.testing.assert_close(
        (weight.scale.float() + scale)[differ], 2 * exact[differ], rtol=1e-5, atol=0
    )
    return differ


def test_fp4_weights_of_fp8_inputs_fit_into_fp8_before_their_second_scale():
    """Source: modelopt 0.47, `export/quant_utils.py`, get_weight_scaling_factor_2: amax / 448, as
    kernels dequantize to fp8.
    """
    weight = quantize(random_weight(0), SCHEMES["NVFP4AFP8"])
    assert dequantize(replace(weight, scale2=None)).abs().max() <= 448
