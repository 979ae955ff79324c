"""Weights of 4 or 8 bits times 16-bit inputs, in Triton: int4, int8, fp8, NVFP4, MXFP4 and nf4.

The packed form: K is cut into blocks of ``codes * width`` inputs. A 16-bit word holds one code (a
nibble or a byte) of each of the ``codes`` runs of ``width`` inputs of a block. A shift and a mask
of a tile of words then give a tile of codes: no permutation, and two codes per instruction. The
words of a block lie together, [K/block, N, width]. Its scales are 2 or 4 fields of one integer
[K/block, N], each for some of the runs; so are the minima of GGUF's types. In fp4 a run has several
scales, [K/block, N, groups]; they multiply its weights in 16 bits, which is exact: 2 bits times 4,
in range.

Codes of a codebook are looked up in registers: a word is four indices of a table of 8 bytes, which
`prmt` reads at once. The table is rounded to 16 bits.
"""

# ruff: noqa: N803, N806 (constants of a Triton kernel are written in capitals)
from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from qtool.codes import unpack_pairs
from qtool.runtime.experts.gates import Gate
from qtool.runtime.experts.routing import Blocks
from qtool.runtime.kernels import Device, LinearSpec, units_of_rows
from qtool.runtime.triton.tiles import (
    Table,
    Tile,
    counters,
    pick,
    prefetch,
    start_early,
    store_gated,
    store_tile,
    tile_position,
    workspace,
)
from qtool.scheme import CODEBOOKS, Weights
from qtool.weight import QuantizedWeight

ROWS = 256  # N is padded to a multiple of this
INPUTS = 512  # and K of this

_INT4: Table = {  # found on an H200 with tests/benchmarks/sweep.py
    (8, "any"): Tile(32, 8, 256, 1056, 2, 4, pdl=True),
    (8, "wide"): Tile(64, 8, 256, 528, 2, 4),
    (16, "small"): Tile(32, 16, 256, 528, 2, 4),
    (16, "deep"): Tile(64, 16, 256, 528, 4, 3),
    (16, "wide"): Tile(64, 16, 256, 528, 2, 4),
    (64, "any"): Tile(128, 32, 256, 264, 4, 3),
    (64, "wide"): Tile(256, 64, 256, 132, 8, 3),
    (256, "small"): Tile(256, 64, 256, 132, 8, 3),
    (256, "deep"): Tile(128, 64, 256, 132, 8, 3),
    (256, "wide"): Tile(256, 128, 256, 132, 8, 2),
    (0, "any"): Tile(256, 128, 256, 0, 8, 2),
}
_FP4: Table = {
    **_INT4,
    (16, "small"): Tile(64, 16, 256, 528, 4, 3),
    (16, "wide"): Tile(64, 16, 256, 1056, 4, 3),
    (256, "wide"): Tile(256, 64, 256, 132, 8, 3),
    (0, "any"): Tile(128, 128, 256, 0, 8, 2),
}
_BYTES: Table = {  # not swept yet
    (8, "any"): Tile(64, 8, 256, 528, 4, 4),
    (16, "any"): Tile(64, 16, 256, 528, 4, 4),
    (64, "any"): Tile(128, 64, 128, 264, 8, 4),
    (256, "any"): Tile(128, 128, 128, 132, 8, 3),
    (0, "any"): Tile(128, 256, 128, 0, 8, 2),
}
TILES: Mapping[str, Table] = {
    **{"int4": _INT4, "int8": _BYTES, "fp4": _FP4, "fp8": _BYTES},
    **dict.fromkeys(CODEBOOKS, _FP4),  # not swept yet
}


@dataclass(frozen=True)
class Layout:
    """How a format is packed."""

    codes: int
    """Of a word."""
    width: int
    """Inputs of a run."""
    fields: int
    """Scales of an integer; 0: there is one scale a row."""
    groups: int = 1
    """Such integers of a block and row, each for its share of all runs."""

    @property
    def block(self) -> int:
        """Inputs of a block."""
        return self.codes * self.width

    def field(self, code: int) -> int:
        """Return which field is the scale of the run ``code``."""
        return code * self.fields // self.codes


def unsupported_reason(spec: LinearSpec, device: Device) -> str | None:
    """Support weight-only schemes of 4 and 8 bits.

    There is a scale for each output, or for groups of a multiple of 16 inputs.
    """
    if device.type == "cuda" and device.capability < 90:
        return f"it is written for sm_90, not {device}"
    if spec.scheme.activations:
        return "it does not round inputs"
    if spec.dtype not in (torch.bfloat16, torch.float16):
        return f"it multiplies in 16 bits, not {spec.dtype}"
    return _unsupported_weights(spec.scheme.weights)


def _unsupported_weights(weights: Weights) -> str | None:
    if format_of(weights) not in TILES:
        return f"it unpacks {', '.join(TILES)}, not {weights.format}"
    if weights.granularity == "block" or (weights.group_size or 16) % 16:
        return f"it has no scales per {weights}"
    if weights.format == "fp4" and (weights.scale == "float" or weights.granularity != "group"):
        return f"its fp4 is NVFP4 or MXFP4, not {weights}"
    return None


def format_of(weights: Weights) -> str:
    """Return the format that ``weights`` are unpacked as: integers that have no kernel of their
    own lie in bytes.
    """
    is_in_bytes = weights.format.startswith("int") and weights.format != "int4"
    return "int8" if is_in_bytes else weights.format


@lru_cache
def layout_of(weights: Weights) -> Layout:
    """Return how ``weights`` are packed."""
    group, four = weights.group_size, weights.bits == 4
    if group is None:
        return Layout(4 if four else 2, 64, 0)
    if not four:
        return Layout(2, _run(group, 64), 2)
    if weights.format == "fp4":
        return Layout(4, 64, 4, 64 // _run(group, 64))
    if group % 64:
        return Layout(4, _run(group, 32), 4)
    return Layout(4, _run(group, 128) // 2, 2)


def _run(group: int, most: int) -> int:
    """Return the largest power of two up to ``most`` that divides ``group``."""
    return min(group & -group, most)


def pack(spec: LinearSpec, weight: QuantizedWeight) -> dict[str, Tensor]:
    """Interleave the codes as words, and gather the scales of a block in one integer."""
    weights, (rows, columns) = spec.scheme.weights, spec.shape
    layout, format = layout_of(weights), format_of(weights)
    padded = (-(-rows // ROWS) * ROWS, -(-columns // INPUTS) * INPUTS)
    group = weights.group_size or columns
    if format == "fp4":
        weight = _without_zero_scales(weight, group)
    if weight.offset is not None:
        weight = _centred(weight, weights.bits)
    words = _words(weight.data, layout, _DECODE[format, spec.dtype], padded)
    packed = {"words": words, "counters": counters(words.device)}
    if weight.codebook is not None:
        packed["table"] = _table(spec, weight)
    if not layout.fields:
        return packed | _row_scales(spec, weight, padded[0] - rows)
    if format == "fp4":
        fields, row_scale = _fp4_scales(spec, weight)
        return {**packed, "scales": _fields(fields, layout, group, padded), "row_scale": row_scale}
    if weight.scale.dtype == torch.float32 and weight.codebook is None:  # f16 has few exponents
        units = units_of_rows(weight.scale, weight.offset)
        packed["row_scale"] = units
        offset = None if weight.offset is None else weight.offset / units[:, None]
        weight = replace(weight, scale=weight.scale / units[:, None], offset=offset)
    packed["scales"] = _fields(_scale_bits(spec, weight.scale), layout, group, padded)
    if weight.offset is not None:
        minima = weight.offset.to(spec.dtype).view(torch.int16)
        packed["minima"] = _fields(minima, layout, group, padded)
    if weight.zero is not None:
        offsets = (weight.zero.to(spec.dtype) + _base(spec)).view(torch.int16)
        packed["offsets"] = _fields(offsets, layout, group, padded)
    return packed


def _centred(weight: QuantizedWeight, bits: int) -> QuantizedWeight:
    """Return ``weight`` with codes around 0 and offsets to suit: 16 bits hold these better."""
    middle = 2 ** (bits - 1)
    assert weight.offset is not None
    offset = weight.offset.float() + middle * weight.scale.float()
    # decoding takes 8 from a nibble as it is
    data = weight.data if weight.data.dtype == torch.uint8 else weight.data - middle
    return replace(weight, data=data, offset=offset, scale=weight.scale.float())


def _row_scales(spec: LinearSpec, weight: QuantizedWeight, missing: int) -> dict[str, Tensor]:
    """Return scales and offsets of a weight with one for each row; ``missing`` rows are added."""
    rows = spec.shape[0]
    scale = weight.scale.float().expand(rows, -1)[:, 0]
    packed = {
        "row_scale": scale * weight.scale2 if weight.scale2 is not None else scale.contiguous()
    }
    if weight.zero is not None:
        offset = weight.zero.to(spec.dtype).expand(rows, -1) + _base(spec)
        packed["offsets"] = torch.nn.functional.pad(offset[:, 0], (0, missing))
    return packed


def _scale_bits(spec: LinearSpec, scale: Tensor) -> Tensor:
    """Return the scales of groups as integers of 8 or 16 bits."""
    if scale.dtype == torch.float8_e8m0fnu and spec.scheme.weights.format == "fp8":
        scale = scale.to(spec.dtype)
    if scale.element_size() == 1:
        return scale.view(torch.uint8)
    return scale.to(spec.dtype).view(torch.int16)


def _without_zero_scales(weight: QuantizedWeight, group: int) -> QuantizedWeight:
    """Return ``weight`` with zero codes where its scale is zero: a field has no bits for that."""
    used = (weight.scale.float() != 0).repeat_interleave(group // 2, dim=1)[
        :, : weight.data.shape[1]
    ]
    return replace(weight, data=weight.data * used)


def _fp4_scales(spec: LinearSpec, weight: QuantizedWeight) -> tuple[Tensor, Tensor]:
    """Return the scales as fields of 8 bits, and the factor that is left for each row.

    The scales are as large as ``spec.dtype`` allows: they then also make up for the exponents that
    the decoded codes lack.
    """
    (((shift, _),), base), _ = _SCALES[spec.scheme.weights.scale, spec.dtype]
    scale = weight.scale.float()
    most = (
        torch.full_like(scale[:, :1], 2.0**8)
        if spec.scheme.weights.scale == "e4m3"
        else scale.amax(dim=1, keepdim=True)
    )
    largest = 2.0 ** (math.frexp(torch.finfo(spec.dtype).max)[1] - 1)
    bits = (scale / most * largest).to(spec.dtype).view(torch.int16).int()
    row_scale = most[:, 0] * (_DECODE["fp4", spec.dtype].scale_by / largest)
    if weight.scale2 is not None:
        row_scale = row_scale * weight.scale2
    return ((bits - base) >> -shift).clamp(min=0).to(torch.uint8), row_scale


def _base(spec: LinearSpec) -> float:
    """Return by how much the decoded number of an integer code is too large."""
    return _DECODE[format_of(spec.scheme.weights), spec.dtype].base


def _words(data: Tensor, layout: Layout, decode: Decode, padded: tuple[int, int]) -> Tensor:
    """Put the bits of each code where ``decode`` reads them."""
    codes = unpack_pairs(data) if data.dtype == torch.uint8 else data.view(torch.uint8)
    codes = torch.nn.functional.pad(
        codes, (0, padded[1] - codes.shape[1], 0, padded[0] - codes.shape[0])
    )
    runs = decode.place(codes.int()).reshape(padded[0], -1, layout.codes, layout.width)
    if decode.by_pairs:
        # [N, blocks, run, pair, word of it] -> [N, blocks, pair, word and code] -> four by word
        together = runs.reshape(*runs.shape[:3], -1, 2).permute(0, 1, 3, 2, 4)
        runs = together.reshape(*runs.shape[:2], layout.width, layout.codes).transpose(2, 3)
    words = torch.zeros(runs[:, :, 0].shape, dtype=torch.int32, device=data.device)
    for code in range(layout.codes):
        for shift, mask in decode.parts(code):
            bits = runs[:, :, code] & mask
            words |= bits << shift if shift > 0 else bits >> -shift
    return words.transpose(0, 1).to(torch.int16).contiguous()


def _fields(values: Tensor, layout: Layout, group: int, padded: tuple[int, int]) -> Tensor:
    """Pack ``values`` [N, K/group] of 8 or 16 bits as fields of the blocks.

    The result is int32 or int64 [K/block, N, groups].
    """
    bits, share = values.element_size() * 8, layout.block // (layout.fields * layout.groups)
    each = values.repeat_interleave(group // share, dim=1)[:, : padded[1] // share]
    each = torch.nn.functional.pad(
        each, (0, padded[1] // share - each.shape[1], 0, padded[0] - values.shape[0])
    )
    fields = each.reshape(padded[0], -1, layout.fields, layout.groups).long() & ((1 << bits) - 1)
    whole = sum(fields[:, :, field] << (bits * field) for field in range(layout.fields))
    assert isinstance(whole, Tensor)
    return (
        whole.transpose(0, 1)
        .to(torch.int32 if bits * layout.fields == 32 else torch.int64)
        .contiguous()
    )


def apply(spec: LinearSpec, x: Tensor, packed: Mapping[str, Tensor], bias: Tensor | None) -> Tensor:
    """Multiply, cut as `tiles` says."""
    return multiply(spec, x, packed, bias, pick(tiles(spec), x.shape[0], *spec.shape))


def tiles(spec: LinearSpec) -> Table:
    """Return how products with such layers are cut."""
    return TILES[format_of(spec.scheme.weights)]


def multiply(
    spec: LinearSpec, x: Tensor, packed: Mapping[str, Tensor], bias: Tensor | None, tile: Tile
) -> Tensor:
    """Multiply, cut as ``tile`` says."""
    (tokens, columns), rows = x.shape, spec.shape[0]
    layout = layout_of(spec.scheme.weights)
    steps = triton.cdiv(columns, layout.block * max(1, tile.k // layout.block))
    parts = tile.split(rows, tokens, steps)
    y = x.new_empty(tokens, rows)
    partial = workspace(x, parts, rows)
    _launch(spec, x, packed, bias, y, tile, parts=parts, partial=partial)
    return y


def multiply_blocks(
    spec: LinearSpec,
    x: Tensor,
    packed: Mapping[str, Tensor],
    bias: Tensor | None,
    tile: Tile,
    blocks: Blocks,
    gate: Gate | None = None,
) -> Tensor:
    """Multiply the choices of ``blocks``, each with the weight of its expert.

    Args:
        spec: the layer of one expert.
        x: [choices / blocks.top_k, K], contiguous.
        packed: from `pack`, of a weight [experts * N, K].
        bias: [experts * N], or None.
        tile: how the work is cut; ``tile.m`` is the size of a block.
        blocks: which choices each expert has.
        gate: what to do with the outputs, gate and up by turns; the result is then [choices, N /
            2], else [choices, N].
    """
    rows = spec.shape[0]
    y = x.new_empty(blocks.choices, rows // 2 if gate else rows)
    _launch(spec, x, packed, bias, y, tile, blocks=blocks, gate=gate)
    return y


def _launch(
    spec: LinearSpec,
    x: Tensor,
    packed: Mapping[str, Tensor],
    bias: Tensor | None,
    y: Tensor,
    tile: Tile,
    *,
    parts: int = 1,
    partial: Tensor | None = None,
    blocks: Blocks | None = None,
    gate: Gate | None = None,
) -> None:
    (rows, columns), layout, words = spec.shape, layout_of(spec.scheme.weights), packed["words"]
    unroll = max(1, tile.k // layout.block)
    steps = triton.cdiv(columns, layout.block * unroll)
    decode = _DECODE[format_of(spec.scheme.weights), x.dtype]
    scale_bits = (
        _SCALES[spec.scheme.weights.scale, x.dtype] if spec.scheme.weights.format == "fp4" else ()
    )
    tiled = blocks.rows.shape[0] if blocks else x.shape[0]
    _multiply[(triton.cdiv(rows, tile.n) * triton.cdiv(tiled, tile.m), parts)](
        x=x,
        words=words,
        scales=packed.get("scales"),
        offsets=packed.get("offsets"),
        minima=packed.get("minima"),
        row_scale=packed.get("row_scale"),
        bias=bias,
        y=y,
        partial=partial,
        table=packed.get("table"),
        arrived=packed["counters"],
        block_rows=blocks.rows if blocks else None,
        block_experts=blocks.experts if blocks else None,
        rows_used=blocks.used if blocks else None,
        M=blocks.choices if blocks else x.shape[0],
        N=rows,
        K=columns,
        M_TILED=tiled,
        N_PADDED=words.shape[1],
        steps_each=triton.cdiv(steps, parts),
        steps=steps,
        ASM=_assembly(decode.bits),
        SUBTRACT=_assembly(decode.subtract),
        SCALE_BY=1.0 if scale_bits else decode.scale_by,
        BASE=decode.base,
        SCALE_ASM=_assembly(scale_bits),
        CODES=layout.codes,
        FIELDS=layout.fields,
        WIDTH=layout.width,
        GROUPS=layout.groups,
        UNROLL=unroll,
        # for few tokens, scaling the sums of a group is less work than scaling its weights
        SCALE_SUMS=tile.m <= 32 and not scale_bits,
        EVEN=columns % (unroll * layout.block) == 0,
        TILE_N=tile.n,
        TILE_M=tile.m,
        SPLIT=parts > 1,
        STAGES=tile.stages,
        TOP_K=blocks.top_k if blocks else 1,
        GATE=gate.constants if gate else None,
        PDL=tile.pdl,
        num_warps=tile.warps,
        num_stages=tile.stages,
        **({"launch_pdl": True} if tile.pdl else {}),
    )


# of a number: ((shift, mask), ...) of its word, or'ed, then a constant, xor'ed; left if negative
Bits = tuple[tuple[tuple[int, int], ...], int]


@dataclass(frozen=True)
class Decode:
    """How the codes of a word become numbers."""

    bits: tuple[Bits, ...]
    """Of each number."""
    subtract: tuple[Bits, ...] = ()
    """Of a number to subtract from each."""
    base: float = 0.0
    """Subtracted next."""
    scale_by: float = 1.0
    """Multiplied last."""
    size: int = 0
    """Of a float: the bits of its magnitude."""
    up: int = 0
    """Of a float: by how many bits these are shifted up."""
    by_pairs: bool = False
    """Whether codes lie as `_lookup` wants them."""

    def place(self, codes: Tensor) -> Tensor:
        """Return the codes with their bits where those of the numbers are."""
        if not self.size:
            return codes
        return ((codes << (15 - self.size)) & 0x8000) | (
            (codes & ((1 << self.size) - 1)) << self.up
        )

    def parts(self, code: int) -> tuple[tuple[int, int], ...]:
        """Return where the bits of the number ``code`` are in a word: pairs of shift and mask."""
        return (*self.bits[code][0], *(self.subtract[code][0] if self.subtract else ()))


@lru_cache
def _assembly(codes: tuple[Bits, ...]) -> tuple[str, ...] | None:
    """Return PTX that decodes two words in one register at once, for each code.

    Triton itself would decode the words one by one.
    """
    return tuple(_instructions(*bits) for bits in codes) or None


def _instructions(parts: tuple[tuple[int, int], ...], constant: int) -> str:
    lines, so_far = [], f"{constant * 0x10001:#x}"
    for index, (shift, mask) in enumerate(parts, start=1):
        target = "$0" if index == len(parts) else f"u{index}"
        if shift:
            lines.append(f"sh{'r' if shift > 0 else 'l'}.b32 t{index}, $1, {abs(shift)};")
        # (t & mask) ^ so_far
        lines.append(
            f"lop3.b32 {target}, {f't{index}' if shift else '$1'}, {mask * 0x10001:#x}, {so_far}, "
            "0x6A;"
        )
        so_far = target
    return "{ .reg .b32 t<3>, u<3>; " + " ".join(lines) + " }"


def _lookup(code: int) -> str:
    """Return PTX that looks up code ``code`` of each of two words, which lie in one register.

    Unlike other codes, the eight of a register lie in the order of the runs, both words by turns:
    those of two neighbouring inputs beside each other. `prmt` chooses four of eight bytes, by
    nibbles of 3 bits. The low and the high bytes of four numbers are looked up apart, each in both
    halves of the table, and bit 3 of a code then chooses; `ptxas` shares that between two runs.
    ``$0`` is the pair of numbers, ``$1`` the words; `TABLE` loaded the registers of the table.
    """
    lines = [
        "and.b32 place, $1, 0x77777777",
        # which of four bytes, and 4 more where bit 3 is set
        "shr.b32 half, $1, 1",
        "lop3.b32 half, half, 0x44444444, 0x32103210, 0xEA",
    ]
    if code >= 2:
        lines += ["shr.b32 place, place, 16", "shr.b32 half, half, 16"]
    for name in ("low", "high"):
        lines += [
            f"prmt.b32 first, {name}_table0, {name}_table1, place",
            f"prmt.b32 second, {name}_table2, {name}_table3, place",
            f"prmt.b32 {name}, first, second, half",
        ]
    lines.append(f"prmt.b32 $0, low, high, {('0x5140', '0x7362')[code % 2]}")
    return "{ .reg .b32 place, half, first, second, low, high; " + "; ".join(lines) + "; }"


def _table_registers() -> str:
    """Return PTX that loads the registers that `_lookup` names from the address ``$1``.

    As operands they would keep Triton from moving words to their places before they are decoded.
    Odd lanes load a second copy: what `ptxas` knows to be equal in all lanes it keeps in uniform
    registers, which `prmt` does not take, and copies it for each word.
    """
    low, high = (
        f"{{{', '.join(f'{name}_table{index}' for index in range(4))}}}" for name in ("low", "high")
    )
    lines = [
        f".reg .b32 {low[1:-1]}, {high[1:-1]}, lane_table",
        ".reg .b64 address_table",
        "mov.u32 lane_table, %laneid",
        "and.b32 lane_table, lane_table, 1",
        "mul.wide.u32 address_table, lane_table, 32",
        "add.u64 address_table, address_table, $1",
        f"ld.global.v4.b32 {low}, [address_table]",
        f"ld.global.v4.b32 {high}, [address_table + 16]",
        "mov.b32 $0, 0;",
    ]
    return "; ".join(lines)


LOOKUP = tl.constexpr(tuple(_lookup(code) for code in range(4)))
TABLE = tl.constexpr(_table_registers())


def _table(spec: LinearSpec, weight: QuantizedWeight) -> Tensor:
    """Return the codebook in 16 bits as `_lookup` takes it: the low bytes of four numbers in each
    integer, then the high ones, int32 [2, 8]: twice.
    """
    assert weight.codebook is not None
    numbers = weight.codebook.to(spec.dtype).view(torch.uint8).view(16, 2)
    return numbers.T.contiguous().flatten().view(torch.int32).repeat(2, 1)


def _integer(count: int, mask: int, constant: int, base: float = 0.0, sign: int = 0) -> Decode:
    """Decode ``count`` integers a word, or'ed into the low bits of ``constant``.

    The bit ``sign`` is or'ed into another ``constant``, which is subtracted.
    """
    shifts = [16 // count * code for code in range(count)]
    subtract = tuple((((shift, sign),), constant) for shift in shifts) if sign else ()
    return Decode(tuple((((shift, mask),), constant) for shift in shifts), subtract, base)


def _float(
    count: int, exponent: int, mantissa: int, target_exponent: int, target_mantissa: int
) -> Decode:
    """Decode ``count`` small floats a word.

    Sign, exponent and mantissa move to their places; the difference of the biases is a factor.
    """
    size, up = exponent + mantissa, target_mantissa - mantissa
    places = (
        (((shift - up, ((1 << size) - 1) << up), (shift + size - 15, 0x8000)), 0)
        for shift in range(0, 16, 16 // count)
    )
    return Decode(
        tuple(places),
        scale_by=2.0 ** (2 ** (target_exponent - 1) - 2 ** (exponent - 1)),
        size=size,
        up=up,
    )


def _fp4(places: tuple[tuple[tuple[int, int], ...], ...], up: int, scale_by: float) -> Decode:
    """Decode four fp4 a word, whose bits are arranged so that few shifts move all of them."""
    return Decode(tuple((parts, 0) for parts in places), scale_by=scale_by, size=3, up=up)


# An integer or'ed into the low bits of 128.0 (bfloat16) or 1024.0 (float16) is added to it.
# bfloat16 has 7 such bits, so the sign of an int8 is or'ed into another 128.0, which makes that
# 256.0, and it is subtracted.
_DECODE: Mapping[tuple[str, torch.dtype], Decode] = {
    ("int4", torch.bfloat16): _integer(4, 0x0F, 0x4300, base=136.0),
    ("int4", torch.float16): _integer(4, 0x0F, 0x6400, base=1032.0),
    ("int8", torch.bfloat16): _integer(2, 0x7F, 0x4300, sign=0x80),
    ("int8", torch.float16): _integer(2, 0xFF, 0x6480, base=1152.0),
    ("fp4", torch.bfloat16): _fp4(
        (
            ((-6, 0x81C0),),
            ((-12, 0x8000), (4, 0x01C0)),
            ((-2, 0x81C0),),
            ((0, 0x8180), (8, 0x0040)),
        ),
        6,
        2.0**126,
    ),
    ("fp4", torch.float16): _fp4(
        (
            ((-9, 0x8E00),),
            ((-6, 0x8E00),),
            ((0, 0x8C00), (-2, 0x0200)),
            ((-2, 0x8400), (3, 0x0A00)),
        ),
        9,
        2.0**14,
    ),
    ("fp8", torch.bfloat16): _float(2, 4, 3, 8, 7),
    ("fp8", torch.float16): _float(2, 4, 3, 5, 10),
    **{
        (format, dtype): replace(_integer(4, 0x0F, 0), by_pairs=True)
        for format in CODEBOOKS
        for dtype in (torch.bfloat16, torch.float16)
    },
}


def _scale(shift: int, base: int = 0) -> tuple[Bits, ...]:
    """Decode two scales a word: 8 bits each, shifted up by ``shift`` over the bits of ``base``."""
    return tuple((((bit - shift, 0xFF << shift),), base) for bit in (0, 8))


# of fp4; those of E4M3 get 5 bits of exponent, as they may be subnormal
_SCALES: Mapping[tuple[str, torch.dtype], tuple[Bits, ...]] = {
    ("e4m3", torch.bfloat16): _scale(4, 0x7000),
    ("e4m3", torch.float16): _scale(7),
    ("e8m0", torch.bfloat16): _scale(7),
    ("e8m0", torch.float16): _scale(7),
}


@triton.jit
def _number(  # type: ignore[no-untyped-def]
    words,
    ASM: tl.constexpr,
    CODE: tl.constexpr,
    dtype: tl.constexpr,
):
    """Return the numbers that ``ASM`` decodes from code ``CODE`` of ``words``, two at a time."""
    return tl.inline_asm_elementwise(ASM[CODE], "=r,r", [words], tl.int16, is_pure=True, pack=2).to(
        dtype, bitcast=True
    )


@triton.jit
def _field(  # type: ignore[no-untyped-def]
    fields,
    INDEX: tl.constexpr,
    FIELDS: tl.constexpr,
    dtype: tl.constexpr,
):
    """Return field ``INDEX`` of ``fields``: 16 bits of a ``dtype``, or 8 of E8M0, then in f32."""
    BITS: tl.constexpr = fields.dtype.primitive_bitwidth // FIELDS
    field = (fields >> (BITS * INDEX)).to(tl.int32) & ((1 << BITS) - 1)
    if BITS == 16:
        return field.to(tl.int16).to(dtype, bitcast=True)
    else:
        return (field << 23).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["M", "M_TILED", "steps_each", "steps"])
def _multiply(  # type: ignore[no-untyped-def]
    x,
    words,
    scales,
    offsets,
    minima,
    row_scale,
    bias,
    y,
    partial,
    table,
    arrived,
    block_rows,
    block_experts,
    rows_used,
    M,
    N,
    K,
    M_TILED,
    N_PADDED,
    steps_each,
    steps,
    ASM: tl.constexpr,
    SUBTRACT: tl.constexpr,
    SCALE_BY: tl.constexpr,
    BASE: tl.constexpr,
    SCALE_ASM: tl.constexpr,
    CODES: tl.constexpr,
    FIELDS: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
    UNROLL: tl.constexpr,
    SCALE_SUMS: tl.constexpr,
    EVEN: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_M: tl.constexpr,
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
    TOP_K: tl.constexpr,
    GATE: tl.constexpr,
    PDL: tl.constexpr,
):
    dtype: tl.constexpr = x.dtype.element_ty
    tile_n, tile_m = tile_position(M_TILED, N, TILE_M, TILE_N)
    n = tile_n * TILE_N + tl.arange(0, TILE_N)
    m = tile_m * TILE_M + tl.arange(0, TILE_M)
    i = tl.arange(0, WIDTH)
    acc = tl.zeros((TILE_N, TILE_M), tl.float32)
    first = tl.program_id(1) * steps_each
    if PDL and block_rows is None:
        for ahead in tl.static_range(UNROLL * 2):
            start = (
                tl.minimum(first * UNROLL + ahead, steps * UNROLL - 1) * N_PADDED + tile_n * TILE_N
            )
            prefetch(words + start * WIDTH + tl.arange(0, TILE_N * WIDTH // 64) * 64)
    if table is not None:
        tl.inline_asm_elementwise(
            TABLE, "=r,l", [table.to(tl.int64)], tl.int32, is_pure=False, pack=1
        )
    start_early(PDL)
    if block_rows is None:
        row, weight_row = m, n
    else:
        if tile_m * TILE_M >= tl.load(rows_used):
            return
        m = tl.load(block_rows + m)
        row = m // TOP_K
        weight_row = tl.load(block_experts + tile_m) * N
        weight_row += tl.minimum(n, N - 1)
    inputs = x + row.to(tl.int64)[:, None] * K + i[None, :]
    # with `num_stages` here, the scales are fetched ahead too
    for step in tl.range(first, tl.minimum(first + steps_each, steps), num_stages=STAGES):
        for u in tl.static_range(UNROLL):
            block = step * UNROLL + u
            index = block * N_PADDED + weight_row
            if block_rows is None:
                tile = tl.load(words + index[:, None] * WIDTH + i[None, :])
            else:  # a stack may have more than 2^31 words
                tile = tl.load(words + index.to(tl.int64)[:, None] * WIDTH + i[None, :])
            if FIELDS > 0:
                scale = tl.load(
                    scales + index
                    if SCALE_ASM is None
                    else scales + index[:, None] * GROUPS + tl.arange(0, GROUPS)[None, :]
                )
                if offsets is not None:
                    offset = tl.load(offsets + index)
                if minima is not None:
                    minimum = tl.load(minima + index)
            for code in tl.static_range(CODES):
                if table is None:
                    weight = _number(tile, ASM, code, dtype)
                else:
                    weight = _number(tile, LOOKUP, code, dtype)
                if SUBTRACT is not None:
                    weight -= _number(tile, SUBTRACT, code, dtype)
                if offsets is not None:
                    if FIELDS > 0:
                        weight -= _field(offset, code * FIELDS // CODES, FIELDS, dtype)[:, None]
                    else:
                        weight -= tl.load(offsets + weight_row)[:, None]
                elif BASE != 0:
                    weight -= BASE
                if SCALE_BY != 1:
                    weight *= SCALE_BY
                if SCALE_ASM is not None:
                    pair = (
                        (scale >> (16 * (code // 2)))
                        .to(tl.int16)[:, :, None]
                        .broadcast_to(TILE_N, GROUPS, WIDTH // GROUPS)
                    )
                    weight *= _number(pair.reshape(TILE_N, WIDTH), SCALE_ASM, code % 2, dtype)
                elif FIELDS > 0 and not SCALE_SUMS:
                    weight *= _field(scale, code * FIELDS // CODES, FIELDS, dtype).to(dtype)[
                        :, None
                    ]
                    if minima is not None:
                        weight += _field(minimum, code * FIELDS // CODES, FIELDS, dtype)[:, None]
                k = (block * CODES + code) * WIDTH
                if EVEN:
                    columns = tl.load(inputs + k, mask=m[:, None] < M, other=0.0)
                else:
                    columns = tl.load(
                        inputs + k, mask=(m[:, None] < M) & (k + i[None, :] < K), other=0.0
                    )
                if FIELDS > 0 and SCALE_SUMS:
                    if code * FIELDS % CODES == 0:
                        group_sum = tl.zeros_like(acc)
                        if minima is not None:
                            input_sum = tl.zeros((TILE_M,), tl.float32)
                    if minima is not None:
                        input_sum += tl.sum(columns.to(tl.float32), axis=1)
                    group_sum = tl.dot(weight, tl.trans(columns), group_sum)
                    if (code + 1) * FIELDS % CODES == 0:
                        acc += (
                            group_sum
                            * _field(scale, code * FIELDS // CODES, FIELDS, dtype).to(tl.float32)[
                                :, None
                            ]
                        )
                        if minima is not None:
                            acc += (
                                _field(minimum, code * FIELDS // CODES, FIELDS, dtype).to(
                                    tl.float32
                                )[:, None]
                                * input_sum[None, :]
                            )
                else:
                    acc = tl.dot(weight, tl.trans(columns), acc)
    if row_scale is not None:
        acc *= tl.load(row_scale + weight_row, mask=n < N, other=0.0)[:, None]
    if bias is not None and block_rows is not None:
        acc += tl.load(bias + weight_row, mask=n < N, other=0.0).to(tl.float32)[:, None]
    if GATE is None:
        store_tile(
            acc,
            n,
            m,
            y,
            partial,
            arrived,
            bias if block_rows is None else None,
            M,
            N,
            SPLIT,
        )
    else:
        store_gated(acc, tile_n * TILE_N, m, y, M, N, GATE, TILE_N, TILE_M)
