"""Attention over pages: on a CPU against plain attention, in models against their own; the kernels
for CUDA by Triton's interpreter, and compiled.

The last two need a process of their own (`python tests/engine/test_attention.py
interpret|compile`): triton reads TRITON_INTERPRET when it is imported.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from qtool.engine.attention import latents as latents_module
from qtool.engine.attention import native_decode
from qtool.engine.attention.interface import attend, attend_latents, recording, running, write
from qtool.engine.attention.pages import (
    PAGE,
    Expanded,
    KVPages,
    LayerGeometry,
    Packed,
    new_counters,
)
from qtool.engine.latent_attention import LatentAttention
from qtool.errors import CheckpointRefused

FP8 = torch.float8_e4m3fn


def expected(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention in float64 of the last tokens, ``q`` [n, heads, D], of a sequence with keys ``k``
    and values ``v`` [length, kv_heads, ...].
    """
    q, k, v = q.double(), k.double(), v.double()
    shared, length = q.shape[1] // k.shape[1], k.shape[0]
    k, v = k.repeat_interleave(shared, dim=1), v.repeat_interleave(shared, dim=1)
    logits = torch.einsum("nhd,mhd->hnm", q, k) * scaling
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    own, seen = (
        torch.arange(length - len(q), length, device=q.device)[:, None],
        torch.arange(length, device=q.device)[None],
    )
    hidden = seen > own
    if window is not None:
        hidden |= seen <= own - window
    logits = logits.masked_fill(hidden, -math.inf)
    if sinks is not None:
        logits = torch.cat([logits, sinks.double()[:, None, None].expand(-1, len(q), 1)], -1)
    return torch.einsum("hnm,mhd->nhd", logits.softmax(-1)[..., :length], v)


class Batch:
    """Sequences whose earlier tokens are in pages: ``chunks`` are (tokens before, new tokens).
    Whatever the pages held before is NaN.
    """

    def __init__(
        self,
        chunks: Sequence[tuple[int, int]],
        *,
        heads=4,
        kv_heads=2,
        head_dim=64,
        v_head_dim=0,
        kv=None,
        dtype=torch.float32,
        device="cpu",
    ):
        v_head_dim = v_head_dim or head_dim
        total = [before + new for before, new in chunks]
        width = -(-max(total) // PAGE) + 2
        count = sum(-(-tokens // PAGE) for tokens in total) + 1
        fp8 = kv == FP8
        self.k_scale, self.v_scale = (0.03, 0.05) if fp8 else (1.0, 1.0)
        self.kv = KVPages(
            *(
                torch.full((count, kv_heads, PAGE, size), math.nan, dtype=torch.float32)
                .to(kv or dtype)
                .to(device)
                for size in (head_dim, v_head_dim)
            ),
            self.k_scale,
            self.v_scale,
        )
        order = (torch.randperm(count - 1) + 1).tolist()
        table = torch.zeros(len(chunks) + 2, width, dtype=torch.int32)
        self.row_of = torch.randperm(len(chunks) + 2)[: len(chunks)].tolist()
        for row, tokens in zip(self.row_of, total, strict=True):
            for column in range(-(-tokens // PAGE)):
                table[row, column] = order.pop()
        self.table = table.to(device)
        self.k, self.v = (
            [torch.randn(tokens, kv_heads, size, device=device).to(dtype) for tokens in total]
            for size in (head_dim, v_head_dim)
        )
        self.q = [torch.randn(new, heads, head_dim, device=device).to(dtype) for _, new in chunks]
        self.chunks, self.device = list(chunks), device
        for (before, _), row, k, v in zip(chunks, self.row_of, self.k, self.v, strict=True):
            if before:
                self.write(row, 0, k[:before], v[:before])

    def write(self, row: int, first: int, k: Tensor, v: Tensor) -> None:
        rows, positions = self.numbers([row] * len(k)), self.numbers(range(first, first + len(k)))
        write(self.kv, k, v, Packed(self.table, rows, positions, decodes=0))

    def numbers(self, values) -> Tensor:
        return torch.tensor(list(values), dtype=torch.int32, device=self.device)

    def packed(self, decodes: int | None = None, **options) -> Packed:
        """The new tokens; unless ``decodes`` says how many are, the first chunks of one token are
        decodes.
        """
        if decodes is None:
            decodes = next(
                (i for i, (before, new) in enumerate(self.chunks) if new > 1 or not before),
                len(self.chunks),
            )
        lengths = [new for _, new in self.chunks[decodes:]]
        rows = self.numbers(
            row for row, (_, new) in zip(self.row_of, self.chunks, strict=True) for _ in range(new)
        )
        positions = self.numbers(before + i for before, new in self.chunks for i in range(new))
        starts = self.numbers([0, *torch.tensor(lengths).cumsum(0).tolist()]) if lengths else None
        return Packed(
            self.table, rows, positions, decodes, starts, max(lengths, default=0), **options
        )

    def run(self, packed: Packed | None = None, **options) -> Tensor:
        packed = packed or self.packed()
        k, v = (
            torch.cat([part[before:] for (before, _), part in zip(self.chunks, parts, strict=True)])
            for parts in (self.k, self.v)
        )
        write(self.kv, k, v, packed)
        return attend(torch.cat(self.q), self.kv, packed, **options)

    def expected(self, **options) -> Tensor:
        rounded = [
            [self.rounded(part, scale) for part in parts]
            for parts, scale in ((self.k, self.k_scale), (self.v, self.v_scale))
        ]
        return torch.cat(
            [expected(q, k, v, **options) for q, k, v in zip(self.q, *rounded, strict=True)]
        )

    def rounded(self, part: Tensor, scale: float) -> Tensor:
        return (
            (part.float() / scale).clamp(-448, 448).to(FP8).double() * scale
            if self.kv.k.dtype == FP8
            else part
        )


class LatentBatch(Batch):
    """Sequences whose pages hold latents: the first numbers of a key are its value."""

    def __init__(self, chunks, *, heads=6, rank=32, rotary=16, **options):
        super().__init__(chunks, heads=heads, kv_heads=1, head_dim=rank + rotary, **options)
        self.v, self.v_scale = [k[..., :rank] for k in self.k], self.k_scale
        pages = self.kv.k
        self.kv = KVPages(pages, pages[..., :rank], self.k_scale, self.k_scale, keeps_latents=True)


class ExpandedBatch(LatentBatch):
    """Queries meet keys and values that are made of the latents, or the latents themselves."""

    def __init__(self, chunks, *, heads=6, key=24, value=20, rank=32, rotary=16, **options):
        super().__init__(chunks, heads=heads, rank=rank, rotary=rotary, **options)
        like = self.q[0]
        weight = torch.randn(heads * (key + value), rank) * rank**-0.5
        self.latent, self.rank = LatentAttention(weight.to(like), heads, key), rank
        self.q = [torch.randn(new, heads, key + rotary).to(like) for _, new in chunks]

    def packed(self, decodes: int | None = None, *, expands: int = 0, **options) -> Packed:
        packed = super().packed(decodes, **options)
        return packed.expand(self.chunks[len(self.chunks) - expands :])

    def queries(self) -> tuple[Tensor, Tensor]:
        q = torch.cat(self.q)
        return q[..., : self.latent.key_width], q[..., self.latent.key_width :]

    def write_new(self, packed: Packed) -> None:
        new = [part[before:] for (before, _), part in zip(self.chunks, self.k, strict=True)]
        write(self.kv, torch.cat(new), torch.cat(new), packed)

    def run(self, packed: Packed | None = None, **options) -> Tensor:
        packed = packed or self.packed()
        self.write_new(packed)
        return attend_latents(self.latent, *self.queries(), self.kv, packed, **options)

    def expected(self, **options) -> Tensor:
        found = []
        for q, kept in zip(self.q, self.k, strict=True):
            kept = self.rounded(kept, self.k_scale)[:, 0].double()
            both = torch.einsum("tr,hwr->thw", kept[:, : self.rank], self.latent.weight.double())
            keys, values = both.tensor_split([self.latent.key_width], dim=-1)
            rotary = kept[:, None, self.rank :].expand(-1, len(self.latent.weight), -1)
            found.append(expected(q, torch.cat([keys, rotary], -1), values, **options))
        return torch.cat(found)


# the first is no decode: position 0
MIXED = (
    (0, 1),
    (5, 1),
    (17, 1),
    (63, 1),
    (40, 30),
    (0, 33),
    (15, 2),
    (200, 17),
    (0, 5),
)
FEW = ((5, 1), (17, 1), (40, 20), (0, 17), (15, 2))  # for the interpreter, which is slow
DECODES = ((5, 1), (15, 1), (16, 1), (200, 1))
SINKS = torch.tensor([2.0, -1.0, 0.5, 4.0])


@pytest.mark.parametrize(
    "chunks", [MIXED, MIXED[1:], DECODES, ((0, 50), (0, 1), (0, 16)), ((300, 1),)]
)
@pytest.mark.parametrize(
    "options",
    [{}, {"window": 7}, {"window": 64, "softcap": 2.0}, {"window": 64, "sinks": SINKS}],
)
def test_every_token_sees_its_sequence_and_nothing_else(chunks, options):
    torch.manual_seed(0)
    batch = Batch(chunks)
    torch.testing.assert_close(
        batch.run(scaling=0.3, **options).double(),
        batch.expected(scaling=0.3, **options),
        rtol=1e-4,
        atol=1e-5,
    )


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "v_head_dim"),
    [(4, 4, 64, 64), (8, 1, 80, 80), (7, 7, 96, 96), (6, 2, 128, 64), (2, 1, 256, 256)],
)
def test_heads_of_every_shape(heads, kv_heads, head_dim, v_head_dim):
    torch.manual_seed(1)
    batch = Batch(
        MIXED[1:], heads=heads, kv_heads=kv_heads, head_dim=head_dim, v_head_dim=v_head_dim
    )
    torch.testing.assert_close(
        batch.run(scaling=0.1).double(), batch.expected(scaling=0.1), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("kv", [None, FP8], ids=["", "FP8"])
@pytest.mark.parametrize(
    ("chunks", "expands"),
    [(MIXED, 0), (MIXED[1:], 1), (MIXED[1:], 5), (((0, 50), (0, 1), (0, 16)), 3), (MIXED, 9)],
    ids=["none", "one", "mixed", "first chunks", "all"],
)
@torch.no_grad()
def test_chunks_attend_to_latents_or_to_what_is_made_of_them(chunks, expands, kv):
    torch.manual_seed(0)
    batch = ExpandedBatch(chunks, kv=kv)
    packed = batch.packed(expands=expands)
    assert (packed.expanded is not None) == bool(expands)
    torch.testing.assert_close(
        batch.run(packed, scaling=0.3).double(), batch.expected(scaling=0.3), rtol=1e-4, atol=1e-4
    )


needs_native = pytest.mark.skipif(
    isinstance(native_decode.decode_library(), str),
    reason=f"native_decode: {native_decode.decode_library()}",
)


@needs_native
@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({}, {"heads": 8, "kv_heads": 2, "head_dim": 128}),
        ({"window": 50}, {"heads": 3, "kv_heads": 3, "head_dim": 80, "v_head_dim": 48}),
        ({"window": 1}, {"heads": 32, "kv_heads": 1, "head_dim": 256}),
    ],
)
def test_tokens_that_decode_on_a_cpu_read_their_pages_in_place(options, shape, monkeypatch):
    counts = []
    decode = native_decode.decode
    monkeypatch.setattr(
        native_decode, "decode", lambda *args: counts.append(decode(*args)) or counts[-1]
    )
    batch = Batch((*DECODES, (15, 1), (300, 1), (20, 5)), dtype=torch.bfloat16, **shape)
    packed = batch.packed()
    assert packed.decodes == len(batch.chunks) - 1
    result, wanted = (
        batch.run(packed, scaling=0.2, **options),
        batch.expected(scaling=0.2, **options),
    )
    assert float((result.double() - wanted).norm() / wanted.norm()) <= 4e-3
    for option in ({"softcap": 5.0}, {"sinks": torch.zeros(shape["heads"])}):
        batch.run(packed, scaling=0.2, **option)
    assert counts == [packed.decodes, 0, 0]


@pytest.mark.parametrize("kv", [None, FP8])
def test_latents_are_keys_and_values(kv):
    torch.manual_seed(0)
    batch = LatentBatch(MIXED, kv=kv)
    torch.testing.assert_close(
        batch.run(scaling=0.2).double(), batch.expected(scaling=0.2), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(
    ("kv", "dtype"),
    [(FP8, torch.bfloat16), (FP8, torch.float32), (None, torch.bfloat16), (None, torch.float16)],
)
def test_low_precision_pages(kv, dtype):
    torch.manual_seed(2)
    batch = Batch(MIXED[1:], kv=kv, dtype=dtype)
    wanted = batch.expected(scaling=0.2)
    assert float((batch.run(scaling=0.2).double() - wanted).norm() / wanted.norm()) < 1e-2


def test_values_too_large_for_8_bits_saturate():
    batch = Batch([(0, 3)], kv=FP8)
    batch.run(scaling=0.1)
    huge = torch.full((1, 2, 64), 1e6)
    batch.write(batch.row_of[0], 2, huge, -huge)
    page = int(batch.table[batch.row_of[0], 0])
    assert batch.kv.k[page, :, 2].float().eq(448).all()
    assert batch.kv.v[page, :, 2].float().eq(-448).all()


COMMON = {
    **{"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "pad_token_id": 0},
    **{"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2},
}
MODELS = {
    "llama": {},
    "gemma2": {
        "sliding_window": 9,
        "attn_logit_softcapping": 3.0,
        "head_dim": 16,
        "query_pre_attn_scalar": 24,
    },
    "qwen3": {"head_dim": 32},
    "phi3": {"sliding_window": 11, "eos_token_id": 1, "bos_token_id": 1},
}


def tiny(kind: str, **options):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(3)
    config = AutoConfig.for_model(kind, **{**COMMON, **MODELS.get(kind, {}), **options})
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("kind", MODELS)
def test_a_model_computes_what_it_does_on_its_own(kind):
    model = tiny(kind)
    sequences = [torch.randint(2, 128, (length,)).tolist() for length in (45, 21, 34)]
    own = [model(torch.tensor([sequence]), use_cache=False).logits[0] for sequence in sequences]
    model.set_attn_implementation("qtool")
    with recording() as found:
        model(torch.tensor([sequences[0]]), use_cache=False)
    layers = {
        layer.layer_idx: KVPages(
            *(torch.full((20, 2, PAGE, layer.head_dim), math.nan) for _ in "kv")
        )
        for layer in found.layers
    }
    assert len(layers) == 3
    table = torch.tensor([[4, 7, 2, 0], [1, 9, 8, 0], [12, 5, 19, 0]], dtype=torch.int32)

    def step(chunks: list[tuple[int, int, int]], decodes: int) -> None:
        rows = torch.tensor(
            [row for row, start, end in chunks for _ in range(start, end)], dtype=torch.int32
        )
        positions = torch.tensor(
            [position for _, start, end in chunks for position in range(start, end)],
            dtype=torch.int32,
        )
        lengths = [end - start for _, start, end in chunks[decodes:]]
        starts = torch.tensor([0, *lengths]).cumsum(0).int() if lengths else None
        packed = Packed(table, rows, positions, decodes, starts, max(lengths, default=0))
        ids = torch.tensor(
            [
                [
                    sequences[row][position]
                    for row, start, end in chunks
                    for position in range(start, end)
                ]
            ]
        )
        with running(packed, layers):
            logits = model(ids, position_ids=positions[None].long(), use_cache=False).logits[0]
        for (row, start, end), part in zip(
            chunks, logits.split([end - start for _, start, end in chunks]), strict=True
        ):
            torch.testing.assert_close(part, own[row][start:end], rtol=1e-4, atol=1e-4)

    step([(0, 0, 25), (1, 0, 10)], 0)
    step([(2, 0, 16), (0, 25, 40), (1, 10, 16)], 0)
    step([(0, 40, 41), (1, 16, 17), (2, 16, 29)], 2)  # two decode, one goes on
    for ahead in range(4):
        step(
            [
                (row, position + ahead, position + ahead + 1)
                for row, position in ((2, 29), (0, 41), (1, 17))
            ],
            3,
        )


@torch.no_grad()
def test_recording_tells_what_each_layer_needs():
    model = tiny("gemma2")
    model.set_attn_implementation("qtool")
    with recording() as found:
        model(torch.tensor([[5, 6, 7]]), use_cache=False)
    scaling = 24**-0.5
    assert found.layers == [
        LayerGeometry(i, 4, 2, 16, 16, None if i % 2 else 9, 3.0, scaling) for i in range(3)
    ]


REFUSED = {
    "llama4_text": (
        {
            "attention_chunk_size": 8,
            "head_dim": 16,
            "num_local_experts": 2,
            "intermediate_size_mlp": 64,
            "no_rope_layers": [1, 1, 0],
        },
        "sees chunks",
    ),
    "gemma3_text": (
        {"use_bidirectional_attention": True, "head_dim": 16, "query_pre_attn_scalar": 16},
        "causal|bidirectional",
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("kind", REFUSED)
def test_a_model_that_needs_more_is_refused_by_name(kind):
    options, reason = REFUSED[kind]
    model = tiny(kind, **options)
    model.set_attn_implementation("qtool")
    with pytest.raises(CheckpointRefused, match=reason), recording():
        model(torch.tensor([[5, 6, 7]]), use_cache=False)


class Layer(torch.nn.Module):
    """An attention layer as transformers' interface sees it."""

    layer_idx = 0


@pytest.mark.parametrize(
    ("reason", "attributes", "arguments"),
    [
        ("bidirectional", {"is_causal": False}, {}),
        ("bidirectional", {}, {"is_causal": False}),
        ("other tokens", {"is_cross_attention": True}, {}),
        ("`head_mask`", {}, {"head_mask": torch.ones(4)}),
        ("`position_bias`", {}, {"position_bias": torch.ones(1, 4, 3, 3)}),
        ("which layer", {"layer_idx": None}, {}),
        ("a mask of its own", {}, {"attention_mask": torch.zeros(1, 1, 3, 3)}),
    ],
)
def test_what_is_not_computed_is_refused_in_the_dry_pass(reason, attributes, arguments):
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    layer = Layer()
    for name, value in attributes.items():
        setattr(layer, name, value)
    q = torch.zeros(1, 4, 3, 16)
    with pytest.raises(CheckpointRefused, match=reason), recording():
        ALL_ATTENTION_FUNCTIONS["qtool"](layer, q, q, q, **{"attention_mask": None, **arguments})


def test_cross_attention_is_refused_by_its_lengths():
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    q, k = torch.zeros(1, 4, 3, 16), torch.zeros(1, 4, 5, 16)
    with pytest.raises(CheckpointRefused, match="other tokens"), recording():
        ALL_ATTENTION_FUNCTIONS["qtool"](Layer(), q, k, k, attention_mask=None)


def test_no_masks_are_made_while_running():
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    with recording():
        assert "qtool" in ALL_MASK_ATTENTION_FUNCTIONS
    # transformers would look at the positions, which waits for the GPU
    assert "qtool" not in ALL_MASK_ATTENTION_FUNCTIONS


@pytest.mark.parametrize("heads", [1, 2, 3, 4, 8, 12, 16, 32])
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("most", [4096, 131072])
def test_any_number_of_decodes_runs_kernels_that_the_graphs_compile(heads, fp8, most):
    pytest.importorskip("triton", reason="triton is for Linux only")
    from qtool.engine.attention import gluon_decode, triton_latent
    from qtool.engine.attention.triton_paged import decode_tile
    from qtool.engine.config import MAX_RUNNING_REQUESTS
    from qtool.engine.cuda_graphs import DECODE_BUCKETS

    def kernels(sizes) -> set[object]:
        sums = {gluon_decode.sum_tile(size, heads, 4, torch.device("meta")) for size in sizes}
        paged = (decode_tile(size * heads, most, 128, 2, fp8=fp8) for size in sizes)
        latent = (triton_latent.decode_tile(size * heads, most, 2) for size in sizes)
        return sums | {dataclasses.replace(tile, least=0) for tile in (*paged, *latent)}

    assert kernels(range(1, MAX_RUNNING_REQUESTS + 1)) == kernels(DECODE_BUCKETS)


@pytest.mark.exhaustive
def test_the_kernels_for_cuda_attend_as_float64_does(run_here):
    assert "compared" in run_here("interpret")


@pytest.mark.exhaustive
def test_the_kernels_for_cuda_compile_for_hopper_without_spills(run_here):
    assert "compiled" in run_here("compile")


def interpret() -> None:
    from support import triton_cpu

    from qtool.engine.attention import interface as attention
    from qtool.engine.attention import triton_latent, triton_paged
    from qtool.engine.attention.triton_paged import Tile

    triton_cpu.repair()
    attention.write = triton_paged.write  # `Batch` fills the pages without: the interpreter is slow
    torch.manual_seed(4)
    triton_paged._numbers = lambda x, dtype: x.to(dtype)  # the interpreter knows no assembly

    def compare(chunks, what: str, decode_tile: Tile, prefill_tile: Tile, options, **shape) -> None:
        batch = Batch(chunks, **shape)
        packed = batch.packed()
        packed.counters = new_counters(packed.decodes, batch.kv.k.shape[1], batch.kv.k.device)
        k, v = (
            torch.cat([part[before:] for (before, _), part in zip(chunks, parts, strict=True)])
            for parts in (batch.k, batch.v)
        )
        triton_paged.write(batch.kv, k, v, packed)
        q = torch.cat(batch.q)
        out = q.new_full((*q.shape[:2], batch.kv.v.shape[3]), math.nan)
        settings = (0.2, *(options.get(name) for name in ("window", "softcap", "sinks")))
        if packed.decodes:
            triton_paged.decode(q, batch.kv, packed, out, *settings, decode_tile)
        if packed.starts is not None:
            triton_paged.prefill(q, batch.kv, packed, out, *settings, prefill_tile)
        wanted = batch.expected(scaling=0.2, **options)
        error = float((out.double() - wanted).norm() / wanted.norm())
        assert error <= (1e-5 if q.dtype == torch.float32 else 1e-2), (
            f"{what}: relative error {error}"
        )
        assert not packed.counters.any(), f"{what}: counters are left"

    cases = [
        ("whole", FEW, Tile(16, 1, 1), Tile(16, 1, 1, rows=16), {}, {}),
        ("cut", DECODES, Tile(16, 1, 1, parts=4), Tile(16, 1, 1), {}, {}),
        ("many parts", ((1100, 1), (300, 1)), Tile(16, 1, 1, parts=20), Tile(16, 1, 1), {}, {}),
        (
            "cut, window",
            DECODES,
            Tile(16, 1, 1, parts=3, least=2),
            Tile(16, 1, 1),
            {"window": 50, "softcap": 2.0},
            {},
        ),
        (
            "sinks, cut",
            (*DECODES, (150, 3)),
            Tile(16, 1, 1, parts=3),
            Tile(16, 1, 1, rows=16),
            {"window": 50, "sinks": SINKS},
            {},
        ),
        ("sinks", FEW, Tile(16, 1, 1), Tile(16, 1, 1, rows=16), {"sinks": SINKS.bfloat16()}, {}),
        (
            "chunks",
            MIXED[6:],
            Tile(16, 1, 1),
            Tile(32, 1, 1, rows=64),
            {},
            {"dtype": torch.bfloat16, "heads": 8},
        ),
        (
            "window",
            FEW,
            Tile(16, 1, 1),
            Tile(16, 1, 1, rows=16),
            {"window": 9},
            {"dtype": torch.float16},
        ),
        (
            "long window",
            ((100, 60), (150, 3)),
            Tile(16, 1, 1),
            Tile(16, 1, 1, rows=32),
            {"window": 64},
            {},
        ),
        ("7 share", FEW, Tile(16, 1, 1, parts=2), Tile(16, 1, 1, rows=32), {}, {"heads": 14}),
        (
            "one each",
            FEW,
            Tile(32, 1, 1, parts=4),
            Tile(16, 1, 1, rows=16),
            {"softcap": 5.0},
            {"heads": 2, "head_dim": 80},
        ),
        (
            "values of another size",
            FEW,
            Tile(16, 1, 1, parts=4),
            Tile(16, 1, 1),
            {},
            {"head_dim": 96, "v_head_dim": 64},
        ),
        (
            "fp8",
            FEW,
            Tile(16, 1, 1, parts=4),
            Tile(16, 1, 1, rows=32),
            {},
            {"kv": FP8, "dtype": torch.bfloat16},
        ),
    ]
    for what, chunks, decode_tile, prefill_tile, options, shape in cases:
        compare(chunks, what, decode_tile, prefill_tile, options, **shape)
    for chunks, dtype, heads in ((FEW, torch.float32, 6), (DECODES, torch.bfloat16, 20)):
        batch = LatentBatch(chunks, dtype=dtype, heads=heads)
        packed, q = batch.packed(), torch.cat(batch.q)
        k = torch.cat([part[before:] for (before, _), part in zip(chunks, batch.k, strict=True)])
        triton_paged.write(batch.kv, k, k, packed)
        out = q.new_full((*q.shape[:2], 32), math.nan)
        for tile in (triton_latent.Tile(16, 1, 1, 16), triton_latent.Tile(16, 1, 1, 16, 3, 2)):
            if packed.decodes:
                triton_latent.decode(q, batch.kv, packed, out, 0.2, tile)
            if packed.starts is not None:
                triton_latent.prefill(q, batch.kv, packed, out, 0.2, tile)
            wanted = batch.expected(scaling=0.2)
            error = float((out.double() - wanted).norm() / wanted.norm())
            assert error <= (1e-5 if dtype == torch.float32 else 1e-2), f"latents: {error}"
    compare_expanded()
    print("compared", len(cases))


@torch.no_grad()
def compare_expanded() -> None:
    from qtool.engine.attention import triton_paged

    workspace = latents_module.WORKSPACE_BYTES
    for chunks, expands, room, shape in (
        (FEW, 3, workspace, {}),
        (FEW, 2, 40 * 120 * 4, {"key": 16, "value": 32}),  # a few heads at a time
        (FEW, 3, workspace, {"dtype": torch.bfloat16, "kv": FP8, "heads": 4}),
    ):
        batch = ExpandedBatch(chunks, **shape)
        packed, (q, q_rope) = batch.packed(expands=expands), batch.queries()
        k = torch.cat([part[before:] for (before, _), part in zip(chunks, batch.k, strict=True)])
        triton_paged.write(batch.kv, k, k, packed)
        first = packed.expanded.token
        out = q.new_full((*q.shape[:2], batch.latent.value_width), math.nan)
        latents_module.WORKSPACE_BYTES = room
        latents_module.attend_expanded(batch.latent, q, q_rope, batch.kv, packed, out, 0.2)
        assert out[:first].isnan().all()
        wanted = batch.expected(scaling=0.2)[first:]
        error = float((out[first:].double() - wanted).norm() / wanted.norm())
        limit = 1e-5 if q.dtype == torch.float32 else 2e-2
        assert error <= limit, f"keys and values of latents, {shape}: {error}"
    latents_module.WORKSPACE_BYTES = workspace


def compile() -> None:
    from support import triton_cpu

    from qtool.engine.attention import triton_latent, triton_paged

    compiled: list = []
    triton_cpu.compile_only(compiled)

    def empty(*shape: int, dtype=torch.int32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    count = 0
    for heads, kv_heads, head_dim, dtype, kv, window, softcap in (
        (64, 8, 64, torch.bfloat16, torch.bfloat16, 128, None),
        (32, 8, 128, torch.bfloat16, torch.bfloat16, None, None),
        (32, 8, 128, torch.bfloat16, FP8, None, None),
        (16, 8, 256, torch.bfloat16, torch.bfloat16, 4096, 50.0),
        (32, 32, 96, torch.float16, torch.float16, None, None),
    ):
        layer = KVPages(*(empty(100, kv_heads, PAGE, head_dim, dtype=kv) for _ in "kv"))
        q, k = empty(300, heads, head_dim, dtype=dtype), empty(300, kv_heads, head_dim, dtype=dtype)
        sinks = empty(heads, dtype=dtype) if head_dim == 64 else None
        for decodes in (1, 300):
            packed = Packed(empty(300, 512), empty(300), empty(300), decodes, counters=empty(10000))
            triton_paged.decode(q, layer, packed, q, 0.1, window, softcap, sinks)
        packed = Packed(empty(300, 512), empty(300), empty(300), 0, empty(3), 150)
        triton_paged.prefill(q, layer, packed, q, 0.1, window, softcap, sinks)
        triton_paged.write(layer, k, k, packed)
        for kernel in compiled[count:]:
            used = triton_cpu.resources(kernel)
            what = (
                f"{kernel.metadata.name}, {heads} heads of {head_dim}, {dtype}, pages {kv}: {used}"
            )
            assert used["stack"] == 0, what
            assert used["shared"] <= 232448, what
        count = len(compiled)
    for dtype, kv in ((torch.bfloat16, torch.bfloat16), (torch.bfloat16, FP8)):  # DeepSeek-V3's
        pages = empty(100, 1, PAGE, 576, dtype=kv)
        layer = KVPages(pages, pages[..., :512], keeps_latents=True)
        q, out = empty(300, 128, 576, dtype=dtype), empty(300, 128, 512, dtype=dtype)
        packed = Packed(
            empty(300, 512), empty(300), empty(300), 4, empty(3), 150, counters=empty(10000)
        )
        triton_latent.decode(q, layer, packed, out, 0.1)
        triton_latent.prefill(q, layer, packed, out, 0.1)
        for kernel in compiled[count:]:
            used = triton_cpu.resources(kernel)
            assert used["stack"] <= 32, (kernel.metadata.name, kv, used)
            assert used["shared"] <= 232448, (kernel.metadata.name, kv, used)
        count = len(compiled)
    compile_expanded(compiled, empty)
    print("compiled", len(compiled))


def compile_expanded(compiled: list, empty) -> None:
    from support import triton_cpu

    from qtool.engine.attention import triton_latent, triton_paged

    packed = Packed(empty(300, 512), empty(300), empty(300), 4, empty(3), 150)
    expanded = Expanded(2, 4, empty(3), keys=1000, longest=800)
    packed = dataclasses.replace(packed, counters=empty(1), expanded=expanded)
    for heads, key, value, dtype in (  # of DeepSeek-V2-Lite and V3, GLM-4.7-Flash
        (16, 128, 128, torch.bfloat16),
        (128, 128, 128, torch.float16),
        (20, 192, 256, torch.bfloat16),
    ):
        for kv in (dtype, FP8):
            pages = empty(100, 1, PAGE, 576, dtype=kv)
            layer = KVPages(pages, pages[..., :512], keeps_latents=True)
            latents = triton_latent.gather(layer, packed, dtype)
        q = empty(300, heads, key + 64, dtype=dtype)
        both, out = (
            empty(rows, heads, width, dtype=dtype)
            for rows, width in ((1000, key + value), (300, value))
        )
        own, q_rope, both = q[..., :key], q[..., key:], both.flatten(1)
        for tile in (None, triton_paged.prefill_tile(value, 2)):
            triton_latent.prefill_expanded(own, q_rope, both, latents, packed, out, 0.1, tile)
            used, code = triton_cpu.resources(compiled[-1]), compiled[-1].asm["ptx"]
            assert used["stack"] <= 32, (heads, key, value, tile, used)
            assert used["shared"] <= 232448, (heads, key, value, tile, used)
            is_gluon = "cp.async.bulk.tensor" in code
            assert is_gluon == (tile is None and key == 128), (heads, key, value, tile)


if __name__ == "__main__":
    {"interpret": interpret, "compile": compile}[sys.argv[1]]()
