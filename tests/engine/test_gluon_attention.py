"""The Gluon kernels of attention, from chunks and of decodes over FP8 pages: compiled for sm_90, and
compared with float64 and with the Triton kernels where there is a GPU.

Each in a process of its own (`python tests/engine/test_gluon_attention.py compile|interpret|compare`), as in
test_kernels_gluon.py. `latents` compares and times keys and values that are made of latents.
"""

from __future__ import annotations

import math
import re
import sys
from functools import partial
from itertools import product
from pathlib import Path

import pytest
import torch

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parents[level]) for level in (1, 2)]
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
else:
    pytest.importorskip("triton", reason="triton is for Linux only")

SHAPES = (  # query heads, KV heads, their size, dtype
    (32, 8, 128, torch.bfloat16),
    (4, 4, 128, torch.float16),
    (16, 2, 128, torch.bfloat16),
    (14, 2, 128, torch.bfloat16),  # 7 share a KV head: no power of two
    (8, 2, 64, torch.bfloat16),
)
# query heads, KV heads
DECODED_HEADS = ((32, 8), (8, 8), (14, 2), (16, 2))
CHUNKS = {  # name -> (tokens before, new tokens)
    "one": [(0, 31)],
    "fresh": [(0, length) for length in (1, 5, 17, 64, 100, 300, 2048)],
    "after others": [
        (1024, 1024),
        (33, 1),
        (15, 17),
        (4000, 200),
        (127, 1),
        (128, 128),
        (1, 2),
        (16, 300),
        (100, 28),
        (111, 17),
    ],
    # the first three count as decodes
    "many": [
        (7, 1),
        (130, 1),
        (0, 1),
        *((number * 7 % 300, number % 40 + 1) for number in range(70)),
    ],
}
MEASURED = ([(0, 2048)] * 4, [(1024, 1024)] * 8, [(0, 8192)], [(500, 100)] * 8, [(0, 100)])
# keys of a step, stages, turns
VARIANTS = (
    (128, 2, True),
    (128, 2, False),
    (64, 4, True),
    (64, 4, False),
)


def test_the_kernel_compiles_for_hopper_without_spills(run_here):
    assert "compiled" in run_here("compile")


def test_parts_of_sequences_are_added_as_float64_does(run_here):
    assert "added" in run_here("interpret")


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9,
    reason="needs a Hopper GPU",
)
def test_the_kernel_attends_right_on_a_gpu(run_here):
    assert "compared" in run_here("compare")


def compile_all() -> None:
    from support import triton_cpu

    from qtool.engine.attention import gluon_prefill, triton_paged
    from qtool.engine.attention.pages import PAGE, KVPages, Packed

    compiled: list = []
    triton_cpu.compile_only(compiled)

    def empty(*shape: int, dtype=torch.int32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    plain = (gluon_prefill.KEYS, gluon_prefill.STAGES, gluon_prefill.TURNS)
    for (heads, kv_heads, head_dim, dtype), variants in (
        (SHAPES[0], VARIANTS),
        (SHAPES[3], [plain]),
        (SHAPES[4], [plain]),
    ):
        for variant in variants:
            gluon_prefill.KEYS, gluon_prefill.STAGES, gluon_prefill.TURNS = variant
            kv = KVPages(*(empty(100, kv_heads, PAGE, head_dim, dtype=dtype) for _ in "kv"))
            q = empty(300, heads, head_dim, dtype=dtype)
            packed = Packed(empty(300, 512), empty(300), empty(300), 0, empty(3), 150)
            triton_paged.prefill(q, kv, packed, q, 0.1, None, None)
            used, code = triton_cpu.resources(compiled[-1]), compiled[-1].asm["ptx"]
            what = f"{heads} heads, {kv_heads} KV heads of {head_dim}, {variant}: {used}"
            print(what)
            assert used["stack"] == 0, f"{what} spills registers"
            assert used["shared"] <= 232448, (
                f"{what} takes more shared memory than a block can have"
            )
            assert re.search(r"cp\.async\.bulk\.tensor\S*shared::cluster\.global", code), (
                f"{what} is another kernel"
            )
            assert "1" in re.findall(r"wgmma\.wait_group\.sync\.aligned (\d)", code), (
                f"{what} waits for each product"
            )
    for changed in ({"window": 100}, {"softcap": 30.0}):
        triton_paged.prefill(q, kv, packed, q, 0.1, changed.get("window"), changed.get("softcap"))
        assert "cp.async.bulk.tensor" not in compiled[-1].asm["ptx"], (
            f"the kernel knows no {changed}"
        )
    compile_decodes(compiled)
    print(f"{len(compiled)} compiled")


def compile_decodes(compiled: list) -> None:
    from support import triton_cpu

    from qtool.engine.attention import triton_paged
    from qtool.engine.attention.pages import PAGE, KVPages, Packed

    def empty(*shape: int, dtype=torch.int32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    for (heads, kv_heads), tokens in product(DECODED_HEADS, (1, 2, 4, 8, 16, 64)):
        pages = empty(100, kv_heads, PAGE, 128, dtype=torch.float8_e4m3fn)
        q = empty(300, heads, 128, dtype=torch.bfloat16)
        packed = Packed(empty(300, 512), empty(300), empty(300), tokens)
        triton_paged.decode(q, KVPages(pages, pages), packed, q, 0.1, None, None)
        both = [triton_cpu.resources(kernel) for kernel in compiled[-2:]]
        what = f"{tokens} decodes of {heads} heads, {kv_heads} KV heads"
        print(f"{what}: {both}")
        assert [used["stack"] for used in both] == [0, 0], f"{what} spill registers"
        code = compiled[-2].asm["ptx"].split("mma.sync")
        assert len(code) == 33, "two products of 32 keys and eight queries are 32 instructions"
        assert "bar.sync" not in "".join(code[1:-1]), "warps wait for each other"


def interpret() -> None:
    """Add random parts of sequences of several lengths, with room for more parts than they have."""
    from support import triton_cpu

    from qtool.engine.attention import gluon_decode

    triton_cpu.repair()
    torch.manual_seed(0)
    lengths, heads, parts = (1, 33, 200, 300, 4000), 2, 12
    keys, least = gluon_decode.KEYS, gluon_decode.MIN_STEPS
    for shared in (4, 7):
        partial = torch.randn(len(lengths), heads, parts, shared, 128)
        sums = torch.randn(2, len(lengths), heads, parts, shared)
        sums[0] = sums[0].exp()
        out = torch.full((len(lengths), heads * shared, 128), math.nan)
        wanted = out.double()
        for number, length in enumerate(lengths):
            steps = -(-length // keys)
            count = max(1, min(parts, steps // least))
            weight = sums[1, number, :, :count].double().exp2()[..., None]
            total = (sums[0, number, :, :count, :, None] * weight).sum(1)
            added = (partial[number, :, :count] * weight).sum(1) / total
            wanted[number] = 0.5 * added.flatten(0, 1)
            partial[number, :, count:], sums[:, number, :, count:] = math.nan, math.nan
        for channels in (gluon_decode.CHANNELS, gluon_decode.FEW_CHANNELS):
            gluon_decode._sum_parts[(heads, len(lengths), 128 // channels)](
                partial=partial,
                sums=sums,
                positions=torch.tensor(lengths, dtype=torch.int32) - 1,
                out=out.fill_(math.nan),
                parts=parts,
                least=least,
                v_scale=0.5,
                SHARED=shared,
                SHARED_PADDED=8 if shared > 4 else 4,
                DV=128,
                KEYS=keys,
                TOGETHER=16,
                WIDTH=channels,
                PDL=False,
            )
            torch.testing.assert_close(out.double(), wanted, rtol=1e-5, atol=1e-5)
    print("added")


def compare() -> None:
    from test_attention import Batch

    from qtool.engine.attention import gluon_prefill, triton_paged
    from qtool.engine.attention import interface as attention
    from qtool.engine.attention.pages import new_counters

    counters = new_counters(1000, 32, torch.device("cuda"))
    for heads, kv_heads, head_dim, dtype in SHAPES:
        for name, chunks in CHUNKS.items():
            torch.manual_seed(0)
            batch = Batch(
                chunks,
                heads=heads,
                kv_heads=kv_heads,
                head_dim=head_dim,
                dtype=dtype,
                device="cuda",
            )
            # what is never to be read
            for row, (before, new) in zip(batch.row_of, chunks, strict=True):
                batch.table[row, -(-(before + new) // attention.PAGE) :] = 1 << 30
            decodes = 3 if name == "many" else 0
            packed = batch.packed(decodes, counters=None if name == "one" else counters)
            q = torch.cat(batch.q)
            if name == "after others":  # the queries are part of a wider tensor
                q = torch.cat([q, torch.full_like(q, math.nan)], 1)[:, :heads]
            k, v = (
                torch.cat([part[before:] for (before, _), part in zip(chunks, parts, strict=True)])
                for parts in (batch.k, batch.v)
            )
            attention.write(batch.kv, k, v, packed)
            out = torch.full((q.shape[0], heads, head_dim), math.nan, dtype=dtype, device="cuda")
            other, again = out.clone(), out.clone()
            scaling = 1.5 * head_dim**-0.5
            assert gluon_prefill.applies(q, batch.kv, out, None, None)
            triton_paged.prefill(q, batch.kv, packed, out, scaling, None, None)
            triton_paged.prefill(
                q,
                batch.kv,
                packed,
                other,
                scaling,
                None,
                None,
                tile=triton_paged.prefill_tile(head_dim, 2),
            )
            triton_paged.prefill(q, batch.kv, packed, again, scaling, None, None)
            torch.cuda.synchronize()
            what = f"{heads} heads, {kv_heads} KV heads of {head_dim}, {dtype}, {name}"
            assert not counters.any(), f"{what}: counters are left"
            wanted = batch.expected(scaling=scaling)
            worst = 0.0
            sizes = [new for _, new in chunks]
            parts = zip(
                chunks,
                *(
                    part.split(sizes)
                    for part in (out.double(), other.double(), again.double(), wanted)
                ),
                strict=True,
            )
            for (before, new), own, triton_s, second, right in list(parts)[decodes:]:
                error, usual = (
                    float((part - right).norm() / right.norm()) for part in (own, triton_s)
                )
                assert error < max(1.5 * usual, 4e-3), (
                    f"{what}: {before} + {new} tokens: {error}, and {usual} in Triton"
                )
                assert torch.equal(own, second), f"{what}: {before} + {new} tokens: two runs differ"
                worst = max(worst, error)
            assert out[:decodes].isnan().all(), f"{what}: it wrote to the tokens before the chunks"
            print(f"{what}: largest relative error {worst:.2g}", flush=True)
    compare_decodes()
    print("compared", flush=True)


def compare_decodes() -> None:
    from test_attention import FP8, Batch

    from qtool.engine.attention import gluon_decode, triton_paged
    from qtool.engine.attention import interface as attention
    from qtool.engine.attention.triton_paged import Tile

    lengths = (1, 2, 15, 16, 17, 31, 32, 33, 64, 100, 129, 1000, 4097, 20000)
    for heads, kv_heads in DECODED_HEADS:
        for chunks in ([(20000, 1)], [(length - 1, 1) for length in lengths], [(300, 1)] * 300):
            torch.manual_seed(0)
            batch = Batch(
                chunks,
                heads=heads,
                kv_heads=kv_heads,
                head_dim=128,
                kv=FP8,
                dtype=torch.bfloat16,
                device="cuda",
            )
            for row, (before, new) in zip(batch.row_of, chunks, strict=True):
                batch.table[row, -(-(before + new) // attention.PAGE) :] = 1 << 30
            q = torch.cat(batch.q)
            packed = batch.packed(len(chunks))
            k, v = (torch.cat([part[-1:] for part in parts]) for parts in (batch.k, batch.v))
            attention.write(batch.kv, k, v, packed)
            out, again, other = (torch.full_like(q, math.nan) for _ in range(3))
            assert gluon_decode.applies(q, batch.kv, None, None, None)
            triton_paged.decode(q, batch.kv, packed, out, 0.1, None, None)
            triton_paged.decode(q, batch.kv, packed, again, 0.1, None, None)
            tile = Tile(64, 4, 2, parts=4)
            triton_paged.decode(q, batch.kv, packed, other, 0.1, None, None, tile=tile)
            torch.cuda.synchronize()
            wanted = batch.expected(scaling=0.1)
            error, usual = (
                float(((part.double() - wanted).norm(dim=-1) / wanted.norm(dim=-1)).max())
                for part in (out, other)
            )
            what = f"{heads} heads, {kv_heads} KV heads, {len(chunks)} decodes"
            print(f"{what}: {error:.2g}, in Triton {usual:.2g}", flush=True)
            assert error < max(1.5 * usual, 4e-3), f"{what}: {error}, and {usual} in Triton"
            assert torch.equal(out, again), f"{what}: two runs differ"


# heads, key width, value width, dtype, of pages; DeepSeek-V2-Lite's, V3's in part, GLM-4.7-Flash's
LATENTS = (
    (16, 128, 128, torch.bfloat16, None),
    (16, 128, 128, torch.bfloat16, torch.float8_e4m3fn),
    (24, 128, 128, torch.float16, None),
    (20, 192, 256, torch.bfloat16, None),
)


def latent_batch(chunks, heads: int, key: int, value: int, dtype, kv):
    from test_attention import ExpandedBatch

    shape = {"heads": heads, "key": key, "value": value, "rank": 512, "rotary": 64}
    return ExpandedBatch(chunks, **shape, dtype=dtype, kv=kv, device="cuda")


def compare_latents() -> None:
    """Compare with float64: all chunks, by both kernels, twice, some heads at a time; decodes and
    small chunks before them; a CUDA graph of prompts that were cut otherwise when it was captured.
    """
    from qtool.engine.attention import latents as module
    from qtool.engine.attention import triton_latent, triton_paged
    from qtool.engine.attention.pages import new_counters

    counters, workspace = new_counters(1000, 32, torch.device("cuda")), module.WORKSPACE_BYTES
    for heads, key, value, dtype, kv in LATENTS:
        for name, chunks in CHUNKS.items():
            torch.manual_seed(0)
            batch = latent_batch(chunks, heads, key, value, dtype, kv)
            first = 3 if name == "many" else 0
            packed = batch.packed(first, expands=len(chunks) - first, counters=counters)
            (q, q_rope), scaling = batch.queries(), 1.5 * (key + 64) ** -0.5
            batch.write_new(packed)
            out = q.new_full((len(q), heads, value), math.nan)
            other, again = out.clone(), out.clone()
            module.attend_expanded(batch.latent, q, q_rope, batch.kv, packed, out, scaling)
            module.WORKSPACE_BYTES = 4 * packed.expanded.keys * (key + value) * dtype.itemsize
            module.attend_expanded(batch.latent, q, q_rope, batch.kv, packed, again, scaling)
            module.WORKSPACE_BYTES = workspace
            latents = triton_latent.gather(batch.kv, packed, dtype)
            both = latents[:, :512] @ batch.latent.weight.flatten(0, 1).T
            tile = triton_paged.prefill_tile(max(key, value), 2)
            triton_latent.prefill_expanded(q, q_rope, both, latents, packed, other, scaling, tile)
            torch.cuda.synchronize()
            what = f"latents, {heads} heads of {key} and {value}, {dtype}, pages {kv}, {name}"
            assert not counters.any(), f"{what}: counters are left"
            assert out[:first].isnan().all(), f"{what}: it wrote to the tokens before the chunks"
            wanted = batch.expected(scaling=scaling)
            error, usual, some = (
                float((part[first:].double() - wanted[first:]).norm() / wanted[first:].norm())
                for part in (out, other, again)
            )
            print(f"{what}: relative errors {error:.2g}, in Triton {usual:.2g}", flush=True)
            for found in (error, usual, some):
                assert found < 1e-2, f"{what}: {error}, in Triton {usual}, by heads {some}"
            per_token = (out.double() - wanted)[first:].norm(dim=(1, 2))
            per_token /= wanted[first:].norm(dim=(1, 2))
            assert float(per_token.max()) < 5e-2, f"{what}: {per_token.argmax()} is wrong"
            # the last alone, beside decodes and chunks that attend to latents
            packed = batch.packed(first, expands=1, counters=counters)
            found = batch.run(packed, scaling=scaling).double()
            error = float((found - wanted).norm() / wanted.norm())
            assert error < 2e-2, f"{what}: beside others {error}"
    compare_graph(counters)
    print("compared latents", flush=True)


def compare_graph(counters: torch.Tensor) -> None:
    from dataclasses import replace

    from qtool.engine.attention.interface import attend_latents
    from qtool.engine.attention.pages import Expanded

    batch = latent_batch([(0, 300), (0, 212)], *LATENTS[0])
    packed = batch.packed(0, counters=counters)
    starts = torch.cat([packed.starts, packed.starts[-1:]])  # and an empty one
    packed = replace(
        packed, starts=starts, longest=512, expanded=Expanded(3, 0, starts, keys=512, longest=512)
    )
    batch.run(packed, scaling=0.1)
    inputs = (packed.rows, packed.positions, starts)
    kept = [part.clone() for part in inputs]
    packed.rows.fill_(batch.row_of[0])
    packed.positions.copy_(torch.arange(512))
    starts.copy_(torch.tensor([0, 512, 512, 512]))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend_latents(batch.latent, *batch.queries(), batch.kv, packed, scaling=0.1)
    for part, old in zip(inputs, kept, strict=True):
        part.copy_(old)
    graph.replay()
    wanted = batch.expected(scaling=0.1)
    error = float((out.double() - wanted).norm() / wanted.norm())
    assert error < 1e-2, f"in a CUDA graph: {error}"


def measure_latents() -> None:
    """Print microseconds of a layer of DeepSeek-V2-Lite with latents, and with keys and values made
    of them; and how far the last tokens of the first chunk are from float64.
    """
    from dataclasses import replace

    from gemm import microseconds
    from test_attention import expected

    from qtool.engine.attention import gluon_prefill, triton_latent, triton_paged
    from qtool.engine.attention import latents as module
    from qtool.engine.attention.interface import attend_latents
    from qtool.engine.attention.pages import new_counters

    heads, key, value, scaling = 16, 128, 128, 192**-0.5
    measured = ([(0, 512)], [(0, 2048)], [(0, 2048)] * 64, [(32768, 8192)], [(32768, 256)])
    for chunks in (*measured, [(2048, 512)] * 8, [(2048, 64)]):
        torch.manual_seed(0)
        batch = latent_batch(chunks, heads, key, value, torch.bfloat16, None)
        counters = new_counters(1, 16, torch.device("cuda"))
        packed = batch.packed(0, expands=len(chunks), counters=counters)
        batch.write_new(packed)
        q, q_rope = batch.queries()
        runs = {
            "latents": partial(attend_latents, packed=replace(packed, expanded=None)),
            "keys and values": partial(attend_latents, packed=packed),
        }
        new, kept = min(chunks[0][1], 64), batch.k[0][:, 0].double()
        both = kept[:, :512] @ batch.latent.weight.flatten(0, 1).T.double()
        both = both.view(len(kept), heads, -1)
        rotary = kept[:, None, 512:].expand(-1, heads, -1)
        keys = torch.cat([both[..., :key], rotary], -1)
        last = slice(chunks[0][1] - new, chunks[0][1])
        wanted = expected(torch.cat([q, q_rope], -1)[last], keys, both[..., key:], scaling=scaling)
        found = []
        for name, run in runs.items():
            run = partial(run, batch.latent, q, q_rope, batch.kv, scaling=scaling)
            error = float((run()[last].double() - wanted).norm() / wanted.norm())
            found.append(f"{name} {microseconds(run, 7):.1f} us (error {error:.1g})")
        latents = triton_latent.gather(batch.kv, packed, torch.bfloat16)
        some = module._heads_at_once(batch.latent.weight, packed.expanded.keys)
        weight, out = batch.latent.weight[:some].flatten(0, 1), q.new_empty(len(q), some, value)
        made = latents[:, :512] @ weight.T
        attend = partial(
            triton_latent.prefill_expanded,
            *(q[:, :some], q_rope[:, :some], made, latents, packed, out, scaling),
        )
        pairs = sum(before * new + new * (new + 1) / 2 for before, new in chunks)
        tile = triton_paged.prefill_tile(value, 2)
        parts = {
            "gather": partial(triton_latent.gather, batch.kv, packed, torch.bfloat16),
            f"matmul of {some} heads": partial(torch.mm, latents[:, :512], weight.T, out=made),
            f"attention of {some} heads": attend,
            "the same in Triton": partial(attend, tile),
        }
        for name, run in parts.items():
            us = microseconds(run, 7)
            rate = f", {pairs * some * 640 / us / 1e6:.0f} TFLOP/s" if run.args[3:] else ""
            found.append(f"{name} {us:.1f} us{rate}")
        plain = (gluon_prefill.KEYS, gluon_prefill.STAGES, gluon_prefill.TURNS)
        for variant in ((128, 2, False), (64, 3, True), (64, 3, False)):
            gluon_prefill.KEYS, gluon_prefill.STAGES, gluon_prefill.TURNS = variant
            found.append(f"Gluon {variant} {microseconds(attend, 7):.1f} us")
        gluon_prefill.KEYS, gluon_prefill.STAGES, gluon_prefill.TURNS = plain
        print(f"{len(chunks)} x {chunks[0]}: " + "; ".join(found), flush=True)
        del batch, q, q_rope, latents, made, out, keys, both
        torch.cuda.empty_cache()
    measure_values()


def measure_values() -> None:
    """Print microseconds of the matmuls around latents for decodes, with weights as they lie and
    as they would lie by themselves.
    """
    from gemm import microseconds

    for heads, tokens in ((16, 1), (16, 64), (128, 1), (128, 64)):
        weight = torch.randn(heads, 256, 512, device="cuda").bfloat16()
        q = torch.randn(heads, tokens, 128, device="cuda").bfloat16()
        gathered = torch.randn(heads, tokens, 512, device="cuda").bfloat16()
        to_latents, to_values = weight[:, :128], weight[:, 128:].mT
        times = [
            microseconds(partial(torch.bmm, x, part), 15)
            for x, matrix in ((q, to_latents), (gathered, to_values))
            for part in (matrix, matrix.contiguous())
        ]
        shown = ", ".join(f"{us:.1f}" for us in times)
        print(f"{heads} heads, {tokens} tokens: to latents, alone, to values, alone: {shown} us")


def measure() -> None:
    """Print microseconds beside the Triton kernel's, for a layer of Llama-3.1-8B."""
    from gemm import microseconds
    from test_attention import Batch

    from qtool.engine.attention import gluon_prefill, triton_paged
    from qtool.engine.attention.pages import new_counters

    for chunks in MEASURED:
        batch = Batch(
            chunks, heads=32, kv_heads=8, head_dim=128, dtype=torch.bfloat16, device="cuda"
        )
        packed = batch.packed(0, counters=new_counters(1, 8, torch.device("cuda")))
        batch.kv.k.normal_()
        batch.kv.v.normal_()
        q = torch.cat(batch.q)
        run = partial(
            triton_paged.prefill, q, batch.kv, packed, torch.empty_like(q), 128**-0.5, None, None
        )
        times = {"Triton": microseconds(partial(run, tile=triton_paged.prefill_tile(128, 2)), 7)}
        for variant in VARIANTS:
            gluon_prefill.KEYS, gluon_prefill.STAGES, gluon_prefill.TURNS = variant
            times[f"Gluon {variant}"] = microseconds(run, 7)
        work = sum(before * new + new * (new + 1) / 2 for before, new in chunks) * 32 * 128 * 4
        found = (f"{name} {us:.1f} us, {work / us / 1e6:.0f} TFLOP/s" for name, us in times.items())
        print(f"{len(chunks)} x {chunks[0]}: " + "; ".join(found), flush=True)


if __name__ == "__main__":
    with torch.inference_mode():
        steps = {
            "compile": [compile_all],
            "interpret": [interpret],
            "compare": [compare, compare_latents, measure],
            "measure": [measure],
            "latents": [compare_latents, measure_latents],
        }
        for step in steps[sys.argv[1]]:
            step()
