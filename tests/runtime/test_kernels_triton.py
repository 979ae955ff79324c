"""Our Triton kernels without a GPU: the interpreter runs them, against the plain kernel and
float64; and all compile for sm_90.

Both need a process of their own (`python tests/runtime/test_kernels_triton.py interpret|compile`):
triton reads TRITON_INTERPRET when it is imported.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest

if __name__ != "__main__":
    pytest.importorskip("triton", reason="triton is for Linux only")


@pytest.mark.exhaustive
def test_every_triton_kernel_multiplies_as_the_plain_one_does(run_here):
    assert "compared" in run_here("interpret")


@pytest.mark.exhaustive
def test_every_triton_kernel_compiles_for_hopper_without_spills(run_here):
    assert "compiled" in run_here("compile")


def interpret() -> None:
    import torch
    from support import triton_cpu
    from test_kernels_gguf import QUANTIZED, sample

    from qtool.codes import pack_pairs
    from qtool.formats.gguf import TYPE_SCHEMES
    from qtool.runtime.kernels import Device, LinearSpec, load_kernel
    from qtool.runtime.kernels import reference as plain
    from qtool.runtime.triton import row_quantize
    from qtool.runtime.triton.tiles import Tile
    from qtool.scheme import CODEBOOKS, SCHEMES, Activations, Scheme, Weights
    from qtool.weight import Activation, QuantizedWeight, fake_quantize_input, quantize

    triton_cpu.repair()
    torch.manual_seed(0)

    for format in ("fp8", "int8"):
        for static in (None, torch.tensor(0.01)):
            x = torch.randn(7, 333, dtype=torch.bfloat16)
            x[3] = 0
            codes, scale = row_quantize.quantize_rows(x, format, static)
            rounded = fake_quantize_input(
                x.float(),
                Activations(format, "tensor" if static else "token", dynamic=static is None),
                static,
            )
            assert torch.equal(codes.float() * scale, rounded), (
                f"quantize_rows {format}, static {static}"
            )

    def compare(
        module: str,
        scheme: Scheme,
        shape: tuple[int, int],
        tokens: int,
        tile: Tile,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        kernel, what = (
            load_kernel(module),
            f"{module}, {scheme.name}, {shape}, {tokens} tokens, {tile}, {dtype}",
        )
        weight = quantize((torch.randn(shape) * 0.02).to(dtype), scheme)
        static = bool(scheme.activations and not scheme.activations.dynamic)
        if static:
            weight = replace(
                weight,
                activation=Activation(
                    scheme.activations,
                    torch.tensor(3 / (448 if scheme.weights.format == "fp8" else 127)),
                ),
            )
        spec = LinearSpec(scheme, shape, dtype, static)
        assert kernel.unsupported_reason(spec, Device("cuda", 90)) is None, what
        x, bias = torch.randn(tokens, shape[1]).to(dtype), torch.randn(shape[0]).to(dtype)
        packed = kernel.pack(spec, weight)
        result = kernel.multiply(spec, x, packed, bias, tile)
        inputs = (
            fake_quantize_input(x.float(), scheme.activations, weight.activation.scale)
            if scheme.activations
            else x
        )
        exact = inputs.double() @ plain.dequantize(weight).double().t() + bias.double()
        wanted = plain.apply(spec, x, plain.pack(spec, weight), bias)
        for name, expected in (("float64", exact), ("reference", wanted.double())):
            error = float((result.double() - expected).norm() / expected.norm())
            assert error <= 1e-2, f"{what}: relative error {error} against {name}"
        assert not packed["counters"].any(), f"{what}: counters are left"

    def group(size: int | None, **options: object) -> Scheme:
        granularity = "group" if size else "channel"
        return Scheme(Weights("int4", granularity, size, **options))  # type: ignore[arg-type]

    def check_fp4(name: str, dtype: torch.dtype, scales: tuple[float, ...]) -> None:
        scheme, kernel = SCHEMES[name], load_kernel("triton_weight_only")
        columns = scheme.weights.group_size * len(scales)
        codes = (torch.arange(columns) + torch.arange(40)[:, None]) % 16
        scale = torch.stack([torch.tensor(scales).roll(row) for row in range(40)])
        e4m3 = scheme.weights.scale == "e4m3"
        stored = scale.to(torch.float8_e4m3fn if e4m3 else torch.float8_e8m0fnu)
        weight = QuantizedWeight(
            pack_pairs(codes.to(torch.uint8)), stored, torch.ones(40) if e4m3 else None
        )
        spec = LinearSpec(scheme, (40, columns), dtype, False)
        result = kernel.multiply(
            spec,
            torch.eye(columns, dtype=dtype),
            kernel.pack(spec, weight),
            None,
            Tile(32, 16, 256),
        )
        assert torch.equal(result.t().float(), plain.dequantize(weight).float()), (
            f"{name}, {dtype}, scales {scales}: a weight is not exact"
        )

    for dtype in (torch.bfloat16, torch.float16):
        check_fp4(
            "NVFP4A16",
            dtype,
            (0.0, 2**-9, 7 * 2**-9, 2**-6, 15 * 2**-9, 0.875, 1.0, 240.0, 416.0, 448.0),
        )
        check_fp4("MXFP4A16", dtype, (2**-14, 2**-10, 1.0, 2**9))
    check_fp4("MXFP4A16", torch.bfloat16, (2**-127, 2**-64, 1.0))
    check_fp4("MXFP4A16", torch.bfloat16, (2**-3, 2**100, 2**120))

    def check_gguf(type: str, dtype: torch.dtype, tile: Tile) -> None:
        """With the weights scaled (many tokens) and with the sums (few)."""
        weight, dense = sample(type, (72, 256))
        spec = LinearSpec(TYPE_SCHEMES[type], (72, 256), dtype)
        kernel = load_kernel("triton_weight_only")
        what = f"{type}, {dtype}, {tile}"
        assert kernel.unsupported_reason(spec, Device("cuda", 90)) is None, what
        x = torch.randn(5, 256).to(dtype)
        found = kernel.multiply(spec, x, kernel.pack(spec, weight), None, tile).double()
        exact = x.double() @ dense.double().T
        error = float((found - exact).norm() / exact.norm())
        assert error <= 1e-2, f"{what}: relative error {error}"

    for type in QUANTIZED:
        for dtype in (torch.bfloat16, torch.float16):
            for tile in (Tile(32, 16, 256), Tile(32, 64, 256)):
                check_gguf(type, dtype, tile)

    def check_codebook(format: str, dtype: torch.dtype) -> None:
        """Every place, in every run and either word of a register."""
        scheme, kernel = Scheme(Weights(format, "group", 64)), load_kernel("triton_weight_only")
        codes = (torch.arange(256) * 7 + torch.arange(40)[:, None] * 3) % 16
        scale = torch.tensor([1.0, 2.0, 0.0, 0.5]).repeat(40, 1)
        values = torch.tensor(CODEBOOKS[format])
        weight = QuantizedWeight(pack_pairs(codes.to(torch.uint8)), scale, codebook=values)
        spec = LinearSpec(scheme, (40, 256), dtype, False)
        packed, identity = kernel.pack(spec, weight), torch.eye(256, dtype=dtype)
        for tile in (Tile(32, 16, 256), Tile(32, 64, 128)):
            result = kernel.multiply(spec, identity, packed, None, tile)
            wanted = values.to(dtype)[codes] * scale.repeat_interleave(64, 1).to(dtype)
            assert torch.equal(result.t(), wanted), f"{format}, {dtype}: a weight is not exact"

    for format in CODEBOOKS:
        for dtype in (torch.bfloat16, torch.float16):
            check_codebook(format, dtype)

    whole, cut = Tile(64, 64, 256), Tile(32, 8, 128, programs=32)
    weight_only = [
        *(
            SCHEMES[name]
            for name in (
                "W4A16",
                "W4A16_ASYM",
                "W8A16",
                "W8A16_CHANNEL",
                "FP8_W8A16",
                "NVFP4A16",
                "MXFP4A16",
                "MXFP8A16",
            )
        ),
        *(
            group(size, symmetric=symmetric)
            for size in (16, 32, 48, 64, 336, None)
            for symmetric in (True, False)
        ),
        Scheme(Weights("int8", "group", 32, symmetric=False)),
        Scheme(Weights("fp8", "tensor")),
        *(Scheme(Weights("nf4", "group", size)) for size in (16, 64, 336)),
        Scheme(Weights("bnb_fp4", "group", 128)),
    ]
    count = 0
    for index, scheme in enumerate(weight_only):
        cases = (
            ((70, 336), 1, cut, torch.bfloat16),
            ((72, 336), 33, whole, torch.float16),
            ((40, 592), 5, cut, torch.float16),
            ((100, 336), 16, whole, torch.bfloat16),
        )
        for shape, tokens, tile, dtype in cases[index % 4 :: 2 if index < 8 else 4]:
            compare("triton_weight_only", scheme, shape, tokens, tile, dtype)
            count += 1
    for index, name in enumerate(("FP8", "FP8_DYNAMIC", "W8A8", "W8A8_STATIC")):
        cases = (
            ((100, 337), 1, cut, torch.bfloat16),
            ((100, 337), 1, whole, torch.float16),
            ((72, 592), 5, replace(cut, pdl=True), torch.float16),
            ((136, 208), 33, whole, torch.bfloat16),
        )
        for shape, tokens, tile, dtype in cases[index % 2 :: 2]:
            compare("triton_w8a8", SCHEMES[name], shape, tokens, tile, dtype)
            count += 1
    for shape, tokens, tile in (
        ((264, 384), 5, Tile(64, 16, 128, programs=8, pdl=True)),
        ((200, 256), 33, Tile(256, 64, 128)),
    ):
        compare("triton_w8a8", SCHEMES["FP8_BLOCK"], shape, tokens, tile)
        count += 1
    # more than one band of tiles
    compare(
        "triton_weight_only", SCHEMES["W4A16"], (40, 128), 150, Tile(32, 16, 128), torch.bfloat16
    )
    print(f"{count + 1} compared")


def compile_all() -> None:
    import torch
    from support import triton_cpu

    from qtool.runtime.kernels import LinearSpec, load_kernel
    from qtool.runtime.triton import tiles as triton_tiles
    from qtool.scheme import SCHEMES

    compiled: list = []
    triton_cpu.compile_only(compiled)
    schemes = {
        "triton_weight_only": (
            "W4A16",
            "W4A16_ASYM",
            "NF4",
            "NVFP4A16",
            "MXFP4A16",
            "W8A16_CHANNEL",
            "FP8_W8A16",
        ),
        "triton_w8a8": ("FP8_DYNAMIC", "W8A8", "FP8", "FP8_BLOCK"),
    }
    for module, names in schemes.items():
        kernel = load_kernel(module)
        for name in names:
            scheme = SCHEMES[name]
            spec = LinearSpec(
                scheme,
                (4096, 4096),
                torch.bfloat16,
                bool(scheme.activations and not scheme.activations.dynamic),
            )
            packed = triton_cpu.empty_packed(module, spec)
            size = sum(tensor.nbytes for tensor in packed.values()) / scheme.weights.size_bytes(
                *spec.shape
            )
            least = 4.25 / 4.5 if name == "NF4" else 1  # scales of 16 bits
            assert least <= size < 1.03, f"{name}: {size} times the size that `load` makes room for"
            for tokens in (1, 64, 2048):
                tile = triton_tiles.pick(kernel.tiles(spec), tokens, *spec.shape)
                kernel.multiply(
                    spec,
                    torch.empty(tokens, 4096, dtype=torch.bfloat16, device="meta"),
                    packed,
                    None,
                    tile,
                )
                used = triton_cpu.resources(compiled[-1])
                print(name, tokens, tile, used)
                # codes of a codebook lie for registers that hold neighbouring inputs
                lookups = [
                    line for line in compiled[-1].asm["ttgir"].splitlines() if "prmt" in line
                ]
                assert bool(lookups) == (name == "NF4"), (name, lookups[:2])
                assert all("kWidth = 2" in line for line in lookups), lookups
                assert used["stack"] == 0, f"{name} {tile} spills registers: {used}"
                assert used["shared"] <= 232448, (
                    f"{name} {tile} takes more shared memory than a block can have: {used}"
                )
    print(f"{len(compiled)} compiled")


if __name__ == "__main__":
    {"interpret": interpret, "compile": compile_all}[sys.argv[1]]()
