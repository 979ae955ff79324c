"""The Gluon kernel of 8 by 8 bits: compiled for sm_90, and compared with the plain product where
there is a GPU.

Each in a process of its own (`python tests/runtime/test_kernels_gluon.py compile|compare`),
as in test_kernels_triton.py. The interpreter knows no Gluon.
"""

from __future__ import annotations

import re
import sys

import pytest
import torch

if __name__ != "__main__":
    pytest.importorskip("triton", reason="triton is for Linux only")

# tokens, outputs, inputs: whole 16 bytes a row, few of whole tiles
SHAPES = (
    (1, 72, 144),
    (100, 264, 400),
    (300, 520, 272),
    (129, 256, 128),
)
SCHEMES = ("W8A8", "W8A8_STATIC", "FP8_DYNAMIC", "FP8")
BLOCK_SHAPES = ((1, 72, 128), (300, 576, 384), (129, 256, 1024))


def test_the_kernel_compiles_for_hopper_without_spills(run_here):
    assert "compiled" in run_here("compile")


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9,
    reason="needs a Hopper GPU",
)
def test_the_kernel_multiplies_right_on_a_gpu(run_here):
    assert "compared" in run_here("compare")


def compare() -> None:
    from dataclasses import replace

    from qtool.runtime.kernels import LinearSpec, triton_w8a8
    from qtool.runtime.triton.tiles import Tile
    from qtool.scheme import SCHEMES as ALL
    from qtool.weight import Activation, dequantize, fake_quantize_input, quantize

    tiles = (
        Tile(256, 128, 128, 3, 8, 4, bulk=True),
        Tile(128, 128, 128, 3, 8, 3, bulk=True),
        Tile(128, 256, 64, 3, 8, 4, bulk=True),
    )
    shapes = [(name, number, shape) for number, shape in enumerate(SHAPES) for name in SCHEMES]
    shapes += [("FP8_BLOCK", 1, shape) for shape in BLOCK_SHAPES]
    for name, number, (tokens, rows, columns) in shapes:
        for dtype, biased in ((torch.bfloat16, True), (torch.float16, False)):
            scheme, tile = ALL[name], tiles[number % len(tiles)]
            static = not scheme.activations.dynamic
            weight = quantize((torch.randn(rows, columns, device="cuda") * 0.02).to(dtype), scheme)
            if static:
                scale = torch.tensor(
                    3 / (448 if scheme.weights.format == "fp8" else 127), device="cuda"
                )
                weight = replace(weight, activation=Activation(scheme.activations, scale))
            spec = LinearSpec(scheme, (rows, columns), dtype, static)
            x = torch.randn(tokens, columns, device="cuda").to(dtype)
            bias = torch.randn(rows, device="cuda").to(dtype) if biased else None
            result = triton_w8a8.multiply(spec, x, triton_w8a8.pack(spec, weight), bias, tile)
            rounded = fake_quantize_input(
                x.float(), scheme.activations, weight.activation.scale if static else None
            )
            wanted = (
                rounded.double()
                @ dequantize(replace(weight, scale=weight.scale.float())).double().t()
            )
            wanted = wanted + bias.double() if biased else wanted
            error = float((result.double() - wanted).norm() / wanted.norm())
            assert error < 4e-3, (
                f"{name} {tokens} tokens, {rows} x {columns}, {dtype}, bias {biased}: {error}"
            )
    print("compared")


def compile_all() -> None:
    from support import triton_cpu

    from qtool.runtime.kernels import LinearSpec, triton_w8a8
    from qtool.scheme import SCHEMES as ALL

    compiled: list = []
    triton_cpu.compile_only(compiled)
    for name in ("W8A8", "FP8_DYNAMIC", "FP8_BLOCK"):
        whole = LinearSpec(ALL[name], (4096, 4096), torch.bfloat16)
        tiles = {tile for tile in triton_w8a8.tiles(whole).values() if tile.bulk}
        assert tiles
        in_blocks = triton_w8a8.in_blocks(whole)
        # rows of 4088 bytes are not whole 16 bytes
        for columns, gluon in (
            (4096, True),
            (4096, False),
            (4088, True),
        ):
            triton_w8a8.GLUON = gluon  # False: as with another Triton
            by_pointers = columns % 16 or not gluon
            if in_blocks and by_pointers:
                continue  # pointers then have a tile of their own
            spec = LinearSpec(ALL[name], (4096, columns), torch.bfloat16)
            packed = triton_cpu.empty_packed("triton_w8a8", spec)
            for tile in tiles:
                triton_w8a8.multiply(
                    spec,
                    torch.empty(2048, columns, dtype=torch.bfloat16, device="meta"),
                    packed,
                    None,
                    tile,
                )
                used, code = triton_cpu.resources(compiled[-1]), compiled[-1].asm["ptx"]
                print(name, columns, gluon, tile, used)
                few = 256 if in_blocks else 0  # two sums and a product fill the registers
                assert used["stack"] <= few or columns % 16, (
                    f"{name} {tile} spills registers: {used}"
                )
                assert used["shared"] <= 232448, (
                    f"{name} {tile} takes more shared memory than a block can have: {used}"
                )
                loads = re.findall(r"cp\.async\.bulk\.tensor\S*shared::cluster\.global", code)
                assert bool(loads) != bool(by_pointers), (
                    f"{name} {tile}, {columns} columns: {len(loads)} loads of whole tiles"
                )
                waits = re.findall(r"wgmma\.wait_group\.sync\.aligned (\d)", code)
                assert by_pointers or in_blocks or "1" in waits, (
                    f"{name} {tile} waits for each product: {waits}"
                )
    print(f"{len(compiled)} compiled")


if __name__ == "__main__":
    {"compile": compile_all, "compare": compare}[sys.argv[1]]()
