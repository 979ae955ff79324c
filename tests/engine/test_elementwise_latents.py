"""The kernel of `FusedLatentAttention`: beside torch, by Triton's interpreter or on a GPU, and
compiled for sm_90.

They need a process of their own (`python tests/engine/test_elementwise_latents.py
interpret|gpu|compile`): triton reads TRITON_INTERPRET when it is imported.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch

from qtool.engine.attention.pages import PAGE, KVPages, Packed
from qtool.engine.fused_attention import Rotary
from qtool.engine.fused_latents import rotate_and_write
from qtool.engine.norm_kind import NormKind
from qtool.engine.norms import Norm

BF16, F32, FP8 = torch.bfloat16, torch.float32, torch.float8_e4m3fn
CASES = [  # heads, key width, rank, rotary part, dtype, of pages, angles
    (6, 16, 32, 16, F32, F32, "parted"),
    (20, 24, 64, 16, BF16, BF16, "complex"),
    (5, 16, 32, 32, BF16, FP8, "twice"),
    (3, 16, 32, 16, BF16, BF16, None),
]


def test_the_kernel_computes_what_torch_does(run_here):
    assert "compared" in run_here("interpret")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_kernel_on_a_gpu(run_here):
    assert "compared" in run_here("gpu")


@pytest.mark.exhaustive
def test_the_kernel_compiles_for_hopper_without_spills(run_here):
    assert "compiled" in run_here("compile")


def rotary_of(angles, tokens: int, turning: int, dtype: torch.dtype) -> Rotary | None:
    if angles is None:
        return None
    cos, sin = torch.randn(2, tokens, turning // 2)
    if angles == "complex":
        return Rotary(cos, sin, angles)
    return Rotary(cos.repeat(1, 2).to(dtype), sin.repeat(1, 2).to(dtype), angles)


@torch.no_grad()
def compare(device: str) -> None:
    torch.manual_seed(0)
    for heads, key, rank, turning, dtype, stored, angles in CASES:
        table = torch.tensor([[1, 2], [3, 4]], dtype=torch.int32)
        rows, positions = torch.tensor([[0, 1, 1, 1, 0], [17, 14, 15, 16, 3]], dtype=torch.int32)
        packed = Packed(table, rows, positions, 5)
        norm = Norm(torch.nn.Parameter(torch.randn(rank).to(dtype)), NormKind(1e-6))
        both = torch.randn(5, heads * (key + turning) + rank + turning + 3).to(dtype)
        rotary = rotary_of(angles, 5, turning, dtype)
        results = []
        for there in ("cpu", device):
            pages = torch.zeros(5, 1, PAGE, rank + turning).to(stored).to(there)
            scale = 0.02 if stored == FP8 else 1.0
            kv = KVPages(pages, pages[..., :rank], scale, scale, keeps_latents=True)
            queries = torch.zeros(5, heads, rank + turning, dtype=dtype, device=there)
            where = replace(
                packed, table=table.to(there), rows=rows.to(there), positions=positions.to(there)
            )
            x = both.to(there)
            q, latents = x[:, 3:].split([heads * (key + turning), rank + turning], dim=1)
            there_rotary = rotary and replace(
                rotary, cos=rotary.cos.to(there), sin=rotary.sin.to(there)
            )
            on_gpu = there != "cpu" or len(results) == 1
            if on_gpu:
                torch.Tensor.is_cuda = property(lambda self: True)
            try:
                q_rope = queries[..., rank:]
                rotate_and_write(q, latents, q_rope, norm.to(there), there_rotary, kv, where)
            finally:
                if on_gpu:
                    del torch.Tensor.is_cuda
            results.append((queries.cpu().float(), kv.k.cpu().float()))
        for name, one, other in zip(("queries", "pages"), *reversed(results), strict=True):
            error = float((one - other).norm() / other.norm())
            limit = 1e-6 if dtype == F32 else 1.5e-2 if stored == FP8 else 4e-3
            assert other.any() and error <= limit, f"{name}, {angles}: {error}"
    print("compared")


def compile_all() -> None:
    from support import triton_cpu

    from qtool.engine import elementwise, elementwise_latents

    compiled: list = []
    triton_cpu.compile_only(compiled)
    elementwise._starts_early = lambda device: True

    def empty(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    for stored, parted in ((BF16, True), (FP8, False)):
        elementwise_latents.rotate_and_write(
            empty(8, 128 * 192),
            empty(8, 2112)[:, 1536:],
            empty(8, 128, 576)[..., 512:],
            512,
            empty(512),
            1e-6,
            (False, False, False),
            (empty(8, 64), empty(8, 64)),
            empty(9, 1, PAGE, 576, dtype=stored),
            1.0,
            empty(4, 64, dtype=torch.int32),
            *(empty(8, dtype=torch.int32) for _ in range(2)),
            interleaved=True,
            parted=parted,
        )
    for kernel in compiled:
        assert triton_cpu.resources(kernel)["stack"] == 0, kernel.metadata.name
    print(f"{len(compiled)} compiled")


def interpret() -> None:
    from support import triton_cpu

    triton_cpu.repair()
    compare("cpu")


if __name__ == "__main__":
    {"interpret": interpret, "gpu": lambda: compare("cuda"), "compile": compile_all}[sys.argv[1]]()
