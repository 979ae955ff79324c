"""GGUF's blocks: unpacked, packed and rounded to as the gguf package does it."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from qtool.codes import FP4_VALUES
from qtool.errors import CheckpointRefused
from qtool.formats.gguf_blocks import TYPES, Blocks, BlockType, pack, unpack
from qtool.formats.gguf_rounding import quantize
from qtool.weight import spread

COLUMNS = 512
EXACT = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4")
# root mean square error on normal numbers of deviation 1, by llama.cpp's own functions
LLAMA_CPP_ERRORS = {
    "Q2_K": 0.2966,
    "Q3_K": 0.1510,
    "Q4_K": 0.0713,
    "Q5_K": 0.0361,
    "Q6_K": 0.0177,
    "IQ4_NL": 0.0761,
}
all_types = pytest.mark.parametrize("type", TYPES.values(), ids=list(TYPES))


def reference_type(type: BlockType) -> gguf.GGMLQuantizationType:
    return gguf.GGMLQuantizationType[type.name]


def random_blocks(type: BlockType) -> torch.Tensor:
    """Blocks of random bytes, their f16 scales finite."""
    data = np.random.default_rng(0).integers(0, 256, (8, type.row_bytes(COLUMNS)), dtype=np.uint8)
    blocks = torch.from_numpy(data).view(-1, type.size_bytes)
    for section, stored in type.cut(blocks):
        if section in ("d", "low"):
            stored[:, 1] &= 0b1011_1111
        if section == "e8m0":
            stored[0], stored[1], stored[2:] = 0, 1, stored[2:].clamp(max=253)
    return blocks.view(8, -1)


def dequantized(blocks: Blocks) -> torch.Tensor:
    type = blocks.type
    values = blocks.values.float()
    codebook = FP4_VALUES if type.name == "MXFP4" else type.codebook
    if codebook:
        values = torch.tensor(codebook, dtype=torch.float32)[blocks.codes.long()]
    columns = values.shape[1]
    weight = values * spread(blocks.scale.float(), columns, type.group, dim=1)
    if blocks.offset is None:
        return weight
    return weight + spread(blocks.offset.float(), columns, type.group, dim=1)


def normal_numbers(rows: int = 32) -> torch.Tensor:
    return torch.randn(rows, 2048, generator=torch.Generator().manual_seed(0))


@all_types
def test_a_block_has_the_size_that_the_package_says(type):
    sizes = gguf.GGML_QUANT_SIZES[reference_type(type)]
    assert (type.inputs, type.size_bytes) == sizes


@all_types
def test_blocks_mean_what_the_package_reads_bit_for_bit(type):
    data = random_blocks(type)
    expected = gguf.quants.dequantize(data.numpy(), reference_type(type))
    assert torch.equal(dequantized(unpack(type, data)), torch.from_numpy(expected))


@all_types
def test_packing_gives_the_same_bytes_again(type):
    data = random_blocks(type)
    assert torch.equal(pack(unpack(type, data)), data)


@pytest.mark.parametrize("name", EXACT)
def test_numbers_are_rounded_to_the_bytes_of_the_package(name):
    numbers = normal_numbers()
    numbers[0, :64] = 0
    numbers[1] = 0.25 * torch.arange(2048).remainder(29) - 3.5  # ties
    expected = gguf.quants.quantize(numbers.numpy(), reference_type(TYPES[name]))
    assert torch.equal(quantize(TYPES[name], numbers), torch.from_numpy(expected))


@pytest.mark.parametrize("name", LLAMA_CPP_ERRORS)
def test_searched_scales_come_as_near_as_those_of_llama_cpp(name):
    type = TYPES[name]
    numbers = normal_numbers()
    error = dequantized(unpack(type, quantize(type, numbers))) - numbers
    assert error.square().mean().sqrt() < 1.03 * LLAMA_CPP_ERRORS[name]


@all_types
def test_zeros_stay_zeros(type):
    numbers = torch.zeros(2, COLUMNS)
    assert torch.equal(dequantized(unpack(type, quantize(type, numbers))), numbers)


@all_types
def test_rounding_what_is_in_blocks_changes_little(type):
    blocks = quantize(type, normal_numbers(2)[:, :COLUMNS])
    once = dequantized(unpack(type, blocks))
    twice = dequantized(unpack(type, quantize(type, once)))
    step = once.abs().max() / 2 ** (type.bits - 1)
    assert (once - twice).abs().max() <= step


@pytest.mark.parametrize("name", [name for name in TYPES if name != "MXFP4"])
def test_a_scale_beyond_16_bits_is_refused(name):
    with pytest.raises(CheckpointRefused, match="too large") as caught:
        quantize(TYPES[name], torch.full((1, COLUMNS), 1e10).mul_(torch.arange(COLUMNS)))
    assert caught.value.code == "E_VALUES"
