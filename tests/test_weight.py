"""What codes and scales mean: each numeric trap of the formats once, then every sample against the
library that made it.
"""

import json

import pytest
import torch
from bitsandbytes import functional as bitsandbytes
from safetensors.torch import load_file, save_file
from support import EXAMPLE
from support.sample_names import ALL
from support.samples import WATCHED

from qtool.checkpoint import open_checkpoint
from qtool.codes import from_fp8, mx_scale, pack_pairs, to_fp4, unpack_pairs
from qtool.formats import detect, read
from qtool.formats.layout import QuantizedModule
from qtool.formats.packing import permutation, unpack_bits
from qtool.scheme import CODEBOOKS, SCHEMES, Activations, Scheme, Weights
from qtool.weight import QuantizedWeight, dequantize, fake_quantize_input, quantize

pytest_plugins = ["support.sample_plugin"]
pytestmark = pytest.mark.usefixtures("one_thread")

MODELOPT_DECIBELS = {
    **{
        "FP8": 31,
        "FP8_KV": 31,
        "FP8_PC_PT": 31,
        "FP8_PB_WO": 31,
        "MXFP8": 31,
        "INT8": 42,
        "INT8_WO": 42,
        "INT8_SQ": 34,
        "INT4": 18,
        "MIXED": 21,
    },
    **{
        "INT4_AWQ": 17.5,
        "W4A8_AWQ": 17.5,
        "NVFP4": 20,
        "W4A16_NVFP4": 20,
        "W4A8_NVFP4_FP8": 19,
        "MXFP4": 18,
        "W4A8_MXFP4_FP8": 18,
    },
}
EXACT_INPUTS = (
    *(
        "ct/FP8",
        "ct/FP8_DYNAMIC",
        "ct/FP8_BLOCK",
        "ct/W4AFP8",
        "ct/MXFP4",
        "ct/MXFP8",
        "ct/NVFP4",
        "ct/W8A8_STATIC_ASYM",
    ),
    *("modelopt/INT8", "modelopt/INT8_SQ"),
)
ASYMMETRIC_V1 = {
    "quant_method": "gptq",
    "bits": 4,
    "group_size": 32,
    "sym": False,
    "checkpoint_format": "gptq",
}


@pytest.fixture
def read_layer(tmp_path):
    """A function: tensors of one layer and a quantization config, to its QuantizedWeight, by way of
    a file.
    """

    def read_back(config, **tensors):
        save_file(
            {f"layer.{suffix}": tensor for suffix, tensor in tensors.items()},
            tmp_path / "model.safetensors",
        )
        (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
        checkpoint = open_checkpoint(tmp_path)
        return read(checkpoint, detect(checkpoint), "layer")

    return read_back


def words(*values):
    return torch.tensor(values, dtype=torch.int64).to(torch.uint32).view(torch.int32)


def group(**weights):
    return {
        "quant_method": "compressed-tensors",
        "config_groups": {"0": {"targets": ["Linear"], "weights": weights}},
    }


NVFP4 = group(num_bits=4, type="float", strategy="tensor_group", group_size=16)


def test_compressed_tensors_nvfp4_global_scale_divides(read_layer):
    packed = torch.full((1, 8), 0x22, dtype=torch.uint8)  # all 1.0
    scale = torch.tensor([[3.0]]).to(torch.float8_e4m3fn)
    weight = read_layer(
        NVFP4, weight_packed=packed, weight_scale=scale, weight_global_scale=torch.tensor([4.0])
    )
    assert torch.equal(dequantize(weight), torch.full((1, 16), 0.75))


def test_modelopt_nvfp4_global_scale_multiplies(read_layer):
    packed = torch.full((1, 8), 0x22, dtype=torch.uint8)
    scale = torch.tensor([[3.0]]).to(torch.float8_e4m3fn)
    config = {"quant_method": "modelopt", "quant_algo": "W4A16_NVFP4"}
    weight = read_layer(config, weight=packed, weight_scale=scale, weight_scale_2=torch.tensor(4.0))
    assert torch.equal(dequantize(weight), torch.full((1, 16), 12.0))


def test_fp4_keeps_the_even_input_in_the_low_nibble(read_layer):
    packed = torch.full((1, 8), 0xD2, dtype=torch.uint8)
    scale = torch.ones(1, 1).to(torch.float8_e4m3fn)
    weight = read_layer(
        NVFP4, weight_packed=packed, weight_scale=scale, weight_global_scale=torch.ones(1)
    )
    assert dequantize(weight)[0, :2].tolist() == [1.0, -3.0]


def test_gptq_v1_zeros_get_one_added_to_the_whole_word(read_layer):
    zeros = [0, 0, 5, 15, 0, 8, 1, 0]
    word = sum(zero << (4 * i) for i, zero in enumerate(zeros))
    # a zero of 0 has borrowed from its neighbour
    stored = words((word - 0x11111111) % 2**32).reshape(1, 1)
    qweight = torch.zeros(4, 8, dtype=torch.int32)
    weight = read_layer(
        ASYMMETRIC_V1,
        qweight=qweight,
        qzeros=stored,
        scales=torch.ones(1, 8).half(),
        g_idx=torch.zeros(32, dtype=torch.int32),
    )
    assert dequantize(weight)[:, 0].tolist() == [-zero for zero in zeros]


def test_gptq_v2_zeros_are_stored_as_they_are(read_layer):
    config = {**ASYMMETRIC_V1, "checkpoint_format": "gptq_v2"}
    qweight, qzeros = words(*[0x87654321] * 32).reshape(4, 8), words(0x76543210).reshape(1, 1)
    weight = read_layer(config, qweight=qweight, qzeros=qzeros, scales=torch.ones(1, 8).half())
    assert dequantize(weight)[:, 0].tolist() == [1 - zero for zero in range(8)]
    assert dequantize(weight)[0, :8].tolist() == [1, 2, 3, 4, 5, 6, 7, 8]


def test_gptq_3_bit_v1_zeros_wrap_field_by_field(read_layer):
    stored = words(0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF).reshape(1, 3)  # 7 + 1 = 8 = 0
    config = {**ASYMMETRIC_V1, "bits": 3}
    weight = read_layer(
        config,
        qweight=torch.zeros(3, 32, dtype=torch.int32),
        qzeros=stored,
        scales=torch.ones(1, 32).half(),
    )
    assert dequantize(weight).abs().max() == 0


def test_gptq_act_order_scatters_the_groups_over_the_inputs(read_layer):
    g_idx = torch.arange(64, dtype=torch.int32) % 2
    scales = torch.tensor([[1.0], [10.0]]).expand(2, 8).half().contiguous()
    qweight, qzeros = (
        words(*[0x99999999] * 64).reshape(8, 8),
        words(0x77777777, 0x77777777).reshape(2, 1),
    )
    weight = read_layer(
        {**ASYMMETRIC_V1, "sym": True, "desc_act": True},
        qweight=qweight,
        qzeros=qzeros,
        scales=scales,
        g_idx=g_idx,
    )
    assert weight.perm.tolist() == [*range(0, 64, 2), *range(1, 64, 2)]
    assert dequantize(weight)[0].tolist() == [1.0, 10.0] * 32


def test_awq_interleaves_eight_outputs_in_a_word(read_layer):
    config = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 32,
        "zero_point": True,
        "version": "gemm",
    }
    qweight = words(*[0x86427531] * 32).reshape(32, 1)
    weight = read_layer(
        config, qweight=qweight, qzeros=words(0).reshape(1, 1), scales=torch.ones(1, 8).half()
    )
    assert dequantize(weight)[:, 0].tolist() == [1, 2, 3, 4, 5, 6, 7, 8]


def test_modelopt_int4_packs_two_outputs_in_a_byte(read_layer):
    config = {"quant_method": "modelopt", "quant_algo": "W4A16_AWQ"}
    weight = read_layer(
        config,
        weight=torch.full((1, 128), 0xE3, dtype=torch.uint8),
        weight_scale=torch.tensor([[1.0], [10.0]]),
    )
    assert dequantize(weight)[:, 5].tolist() == [3.0, -20.0]


def test_pre_quant_scale_multiplies_the_input(sample):
    """The original weight comes back as W * p where nothing was folded into the layer before."""
    name = "model.layers.1.mlp.down_proj"
    checkpoint = open_checkpoint(sample("modelopt/INT8_SQ"))
    weight = read(checkpoint, detect(checkpoint), name)
    original = load_file(EXAMPLE / "model.safetensors")[f"{name}.weight"].float()
    assert (
        sqnr(original, dequantize(weight) * weight.pre_scale.float())
        > 30
        > 15
        > sqnr(original, dequantize(weight))
    )


def test_compressed_tensors_packs_zero_points_along_the_outputs(read_layer):
    config = group(num_bits=4, type="int", strategy="group", group_size=8, symmetric=False)
    zeros = words(0x76543210, 0x88888888).reshape(1, 2)
    packed = words(*[0x88888888] * 16).reshape(8, 2)
    weight = read_layer(
        config,
        weight_packed=packed,
        weight_scale=torch.ones(8, 2),
        weight_zero_point=zeros,
        weight_shape=torch.tensor([8, 16]),
    )
    assert dequantize(weight)[:, 0].tolist() == [8, 7, 6, 5, 4, 3, 2, 1]
    assert dequantize(weight)[:, 8:].abs().max() == 0


@pytest.mark.parametrize(
    ("bits", "count", "code", "packed"),
    [
        (4, 8, lambda i: i + 1, [0x87654321]),
        (8, 4, lambda i: (129, 2, 255, 128)[i], [0x80FF0281]),
        (2, 16, lambda i: i % 4, [0xE4E4E4E4]),
        (3, 32, lambda i: i % 8, [0x88FAC688, 0xC688FAC6, 0xFAC688FA]),
        (3, 32, lambda i: i % 8, [0x08FAC688, 0x1A23EB1A, 0x2C688FAC, 0x0000003E]),
        (5, 32, lambda i: 3 * i % 32, [0x9EC49860, 0x40FB78AC, 0xDA706A8E, 0x6828BFCC, 0xEEAF48B9]),
    ],
    ids=["4", "8", "2", "3 dense", "3 padded", "5 dense"],
)
def test_packed_words_unpack_to_their_codes(bits, count, code, packed):
    assert unpack_bits(words(*packed).reshape(1, -1), bits, count).tolist() == [
        [code(i) for i in range(count)]
    ]


@pytest.mark.parametrize("bits", [3, 5, 6, 7])
@pytest.mark.parametrize("dense", [True, False])
def test_dense_and_padded_rows_of_odd_widths_unpack(bits, dense):
    codes = torch.randint(0, 2**bits, (5, 128), generator=torch.Generator().manual_seed(bits))
    per_word = 32 // bits
    rows = []
    for row in codes.tolist():
        if dense:
            number = sum(code << (i * bits) for i, code in enumerate(row))
            rows += [number >> shift & 0xFFFFFFFF for shift in range(0, 128 * bits, 32)]
        else:
            rows += [
                sum(code << (i * bits) for i, code in enumerate(row[at : at + per_word]))
                for at in range(0, 128, per_word)
            ]
    assert torch.equal(unpack_bits(words(*rows).reshape(5, -1), bits, 128).long(), codes)


def test_groups_in_order_need_no_permutation():
    module = QuantizedModule("layer", SCHEMES["W4A16"].with_group_size(16), (8, 64), {})
    assert permutation(module, torch.arange(64) // 16) is None
    assert permutation(module, torch.full((64,), -1)) is None  # "in order", as vLLM has it


def test_nibbles_round_trip():
    codes = torch.randint(0, 16, (3, 8), dtype=torch.uint8)
    assert torch.equal(unpack_pairs(pack_pairs(codes)), codes)


def test_blocks_may_be_short_at_the_edges():
    data = torch.ones(300, 200).to(torch.float8_e4m3fn)
    scale = torch.arange(6.0).reshape(3, 2)
    values = dequantize(QuantizedWeight(data, scale, block=(128, 128)))
    assert [
        values[row, column].item()
        for row, column in ((0, 0), (127, 127), (128, 128), (299, 199), (256, 0))
    ] == [0, 0, 3, 5, 4]


def test_fp4_rounds_ties_to_the_even_code():
    x = torch.tensor([0.25, 0.26, 0.75, 1.25, 1.26, 1.75, 2.5, 3.5, 5.0, 5.1, 100.0, -0.75])
    assert to_fp4(x).tolist() == [0, 1, 2, 2, 3, 4, 4, 6, 6, 7, 7, 10]


@pytest.mark.parametrize("group", [32, 1024])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("format", "quant_type"), [("nf4", "nf4"), ("bnb_fp4", "fp4")])
def test_codes_of_a_codebook_are_those_of_bitsandbytes(format, quant_type, dtype, group):
    """Codes, scales and numbers, bit by bit; the codebook itself and the middles between its
    numbers among them.
    """
    x = torch.randn(48, 4096, generator=torch.Generator().manual_seed(0))
    x[0, :64] = 0
    x[1, :64] = torch.tensor(CODEBOOKS[format]).repeat(4)  # the codebook itself
    x[2, :16] = torch.tensor(CODEBOOKS[format])
    x[2, 16:31] = (x[2, :16].sort().values[1:] + x[2, :16].sort().values[:-1]) / 2  # ties
    weight = quantize(x.to(dtype), Scheme(Weights(format, "group", group)))
    packed, state = bitsandbytes.quantize_4bit(
        x.to(dtype), blocksize=group, quant_type=quant_type, quant_storage=torch.uint8
    )
    assert torch.equal(weight.scale.flatten(), state.absmax)
    high_first = weight.data << 4 | weight.data >> 4
    assert torch.equal(high_first.flatten(), packed.flatten())
    expected = bitsandbytes.dequantize_4bit(packed, state)
    assert torch.equal(dequantize(weight, dtype), expected)
    assert torch.equal(weight.codebook, state.code)


def test_mx_scales_follow_compressed_tensors():
    assert mx_scale(torch.tensor([6.5, 7.0, 5.0, 0.0]), 6.0).tolist() == [1.0, 2.0, 1.0, 1.0]


@pytest.mark.parametrize("name", [name for name in ALL if name.startswith("ct/")])
def test_weights_equal_those_that_compressed_tensors_decompresses(sample, name):
    for weight, expected in pairs(sample(name)):
        if "NVFP4" in name:  # it computes these in bf16
            torch.testing.assert_close(dequantize(weight), expected, rtol=2**-7, atol=0)
        else:
            assert torch.equal(dequantize(weight), expected)


@pytest.mark.parametrize(
    "name", [name for name in ALL if name.startswith("gptq/") and "gemm" not in name]
)
def test_weights_equal_those_of_gptqmodels_kernel(sample, name):
    for weight, expected in pairs(sample(name)):  # it rounds scales and results to bf16
        torch.testing.assert_close(dequantize(weight), expected, rtol=2**-7, atol=0)


def test_awq_and_gptq_layouts_of_one_rounding_hold_the_same_weights(sample):
    gptq, awq = (dict(weights(sample(name))) for name in ("gptq/rtn4", "gptq/rtn_gemm"))
    for name, weight in awq.items():
        torch.testing.assert_close(dequantize(weight), dequantize(gptq[name]))


@pytest.mark.parametrize(
    ("name", "decibels"),
    MODELOPT_DECIBELS.items(),
)
def test_modelopt_weights_are_the_original_ones_but_for_rounding(sample, name, decibels):
    original = load_file(EXAMPLE / "model.safetensors")
    for layer, weight in weights(sample(f"modelopt/{name}")):
        # there it was folded into the norm before
        if not (weight.pre_scale is None and "AWQ" in name):
            restored = dequantize(weight) * (
                1 if weight.pre_scale is None else weight.pre_scale.float()
            )
            assert sqnr(original[f"{layer}.weight"].float(), restored) > decibels - 3


@pytest.mark.parametrize("name", EXACT_INPUTS)
def test_input_rounding_equals_that_of_the_library(sample, name):
    for weight, x, expected in watched(sample(name)):
        rounded = fake_quantize_input(
            x, weight.activation.format, weight.activation.scale, weight.activation.zero
        )
        assert (
            error(rounded @ dequantize(weight).T, expected)
            < 2e-3
            < error(x @ dequantize(weight).T, expected)
        )


@pytest.mark.parametrize("name", ["W8A8", "W4A8"])
def test_dynamic_int8_inputs_are_rounded_about_as_finely_as_by_the_library(sample, name):
    # it takes amax / 127.5 where engines take amax / 127
    for weight, x, expected in watched(sample(f"ct/{name}")):
        rounded = fake_quantize_input(x, weight.activation.format)
        assert (
            error(rounded @ dequantize(weight).T, expected)
            < 1.5 * error(x @ dequantize(weight).T, expected)
            < 0.03
        )


def test_asymmetric_dynamic_inputs_use_the_whole_range():
    x = torch.rand(4, 64) + 3
    rounded = fake_quantize_input(x, Activations("int8", "token", symmetric=False))
    assert (rounded - x).abs().max() <= 4 / 255 / 2 + 1e-6


@pytest.mark.parametrize("name", [name for name, scheme in SCHEMES.items() if scheme.activations])
def test_every_activation_format_keeps_shape_dtype_and_zeros(name):
    x = torch.randn(2, 3, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    x[0] = 0
    rounded = fake_quantize_input(x, SCHEMES[name].activations)
    assert (rounded.shape, rounded.dtype) == (x.shape, x.dtype)
    assert rounded[0].abs().max() == 0
    assert sqnr(x[1].float(), rounded[1].float()) > 17


def weights(folder):
    checkpoint = open_checkpoint(folder)
    layout = detect(checkpoint)
    return [(name, read(checkpoint, layout, name)) for name in layout.modules]


def pairs(folder):
    reference = load_file(f"{folder}.reference.safetensors")
    return [(weight, reference[f"weight:{name}"].float()) for name, weight in weights(folder)]


def watched(folder):
    reference = load_file(f"{folder}.reference.safetensors")
    for name, weight in weights(folder):
        if name in WATCHED:
            x = reference[f"input:{name}"].float()
            yield (
                weight,
                x if weight.pre_scale is None else x * weight.pre_scale.float(),
                reference[f"output:{name}"].float(),
            )


def sqnr(expected, found):
    return 10 * torch.log10(expected.square().sum() / (expected - found).square().sum()).item()


def error(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


def test_every_fp8_code_becomes_the_number_that_torch_makes_of_it():
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).reshape(2, 128).T
    assert torch.equal(from_fp8(codes).view(torch.int32), codes.float().view(torch.int32))
