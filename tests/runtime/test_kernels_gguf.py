"""The types of GGUF in every kernel that takes them: codes with a float minimum, scales of groups of
16 and 32, negative ones among them.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType as Type
from gguf.quants import dequantize as expected
from support.gguf_files import BLOCK_SCALES, TYPES, blocks
from test_kernels_cpu import CPU, HERE, relative_error, why_not

from qtool.formats.gguf import TYPE_SCHEMES, read
from qtool.formats.layout import QuantizedModule
from qtool.runtime.kernels import KERNELS, TAKE_OFFSETS, Choice, LinearSpec, choose, no_offset
from qtool.runtime.linear import QuantizedLinear
from qtool.weight import QuantizedWeight

QUANTIZED = [type for type in TYPES if type in TYPE_SCHEMES]
SCALES_AT = {**BLOCK_SCALES, **dict.fromkeys(("Q8_0", "Q4_0", "Q5_0", "Q4_1", "Q5_1"), (0,))}


def sample(type: str, shape: tuple[int, int]) -> tuple[QuantizedWeight, torch.Tensor]:
    """Return a weight in blocks of ``type``, half of its scales negative, and what gguf makes of it."""
    values = np.random.default_rng(0).normal(0, 0.02, shape).astype(np.float32)
    data = blocks(values, type)
    size = data.shape[-1] // (shape[1] // (256 if type.endswith("K") else 32))
    each = data.reshape(shape[0], -1, size)
    for at in SCALES_AT.get(type, ()):
        each[::2, :, at + 1] ^= 0x80  # the sign of an f16
    tensors = {"weight": torch.from_numpy(data.copy())}
    module = QuantizedModule("layer", TYPE_SCHEMES[type], shape, {}, variant=type)
    return read(module, tensors), torch.from_numpy(expected(data, Type[type]).copy())


def spec_of(type: str, shape: tuple[int, int]) -> LinearSpec:
    return LinearSpec(TYPE_SCHEMES[type], shape, torch.bfloat16)


def takes(kernel: str, type: str) -> bool:
    spec = spec_of(type, (72, 256))
    return no_offset(kernel, spec) is None and why_not(kernel, spec) is None


@pytest.mark.parametrize("shape", [(72, 256), (40, 1280)])
@pytest.mark.parametrize(
    ("kernel", "type"),
    [(kernel, type) for kernel in HERE for type in QUANTIZED if takes(kernel, type)],
)
def test_a_kernel_that_takes_a_type_multiplies_with_what_it_stands_for(kernel, type, shape):
    weight, dense = sample(type, shape)
    spec = spec_of(type, shape)
    x = torch.randn(9, shape[1], generator=torch.Generator().manual_seed(0)).bfloat16()
    bias = torch.linspace(-1, 1, shape[0])
    found = QuantizedLinear(spec, Choice(kernel, {}), weight, bias)(x)
    exact = x.double() @ dense.double().T + bias.bfloat16().double()
    assert relative_error(found, exact) <= 1e-2


def test_kernels_without_offsets_refuse_them_by_name():
    spec = spec_of("Q4_K", (256, 256))
    refused = choose(spec, CPU).refused
    assert all(refused[name].startswith("offset") for name in set(refused) - TAKE_OFFSETS)
    others = set(KERNELS["cpu"]) - {"native", "reference"}
    assert choose(spec, CPU).kernel == "native" or others <= set(refused)
