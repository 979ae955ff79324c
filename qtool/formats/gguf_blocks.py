"""The blocks of GGUF's quantized types: their layout, and what they stand for.

A row of K inputs is a row of blocks of 32 or 256 inputs, each with its codes and its scales.
Source: ggml, `ggml-common.h` and `ggml-quants.c`; the Python package gguf 0.19, `quants.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor

from qtool.scheme import CODEBOOKS

Section = Literal["d", "low", "e8m0", "scales"]


@dataclass(frozen=True)
class Plane:
    """Some bits of each code. A run of ``width`` bytes holds ``8 / bits * width`` codes: the
    lowest bits of all its bytes are the first ``width`` of them, and so on.
    """

    bits: int
    width: int


@dataclass(frozen=True)
class BlockType:
    """How a block of one type lies in memory, and what its codes stand for."""

    name: str
    """As GGUF names it."""
    inputs: int
    """Of one block."""
    group: int
    """How many inputs share one scale."""
    bits: int
    """Of one code."""
    zero: int
    """The code that stands for 0, before an offset is added."""
    sections: tuple[Section | Plane, ...]
    """In their order in memory. ``d``, ``low``: f16, the step of all scales and of all offsets;
    ``e8m0``: a power of two; ``scales``: small integers, packed as `_SCALES` says; planes from the
    lowest bits of codes upwards, but for those of Q3_K, Q5_0, Q5_1 and Q5_K, whose top bit comes
    first.
    """
    codebook: tuple[float, ...] | None = None
    """What each code stands for, where that is not ``code - zero``."""

    @property
    def size_bytes(self) -> int:
        """Bytes of one block."""
        return sum(self._size(section) for section in self.sections)

    @property
    def has_offset(self) -> bool:
        """Whether a number is added after scaling."""
        return "low" in self.sections

    @property
    def has_integer_scales(self) -> bool:
        """Whether the scales of groups are integers, in steps of one f16 for each block."""
        return "scales" in self.sections

    def row_bytes(self, columns: int) -> int:
        """Return the bytes of a row of ``columns`` inputs, a multiple of `inputs`."""
        return columns // self.inputs * self.size_bytes

    def cut(self, data: Tensor) -> Iterator[tuple[Section | Plane, Tensor]]:
        """Yield each section and its bytes [..., size] of ``data``, blocks [..., size_bytes]."""
        sizes = [self._size(section) for section in self.sections]
        return zip(self.sections, torch.split(data, sizes, dim=-1), strict=True)

    def _size(self, section: Section | Plane) -> int:
        if isinstance(section, Plane):
            return self.inputs * section.bits // 8
        return _SCALES[self.name].size_bytes if section == "scales" else SECTION_BYTES[section]


SECTION_BYTES: Mapping[str, int] = {"d": 2, "low": 2, "e8m0": 1}
_NIBBLES = Plane(4, 16)
_TOP_BITS = Plane(1, 1)
TYPES: Mapping[str, BlockType] = MappingProxyType(
    {
        each.name: each
        for each in (
            BlockType("Q4_0", 32, 32, 4, 8, ("d", _NIBBLES)),
            BlockType("Q4_1", 32, 32, 4, 0, ("d", "low", _NIBBLES)),
            BlockType("Q5_0", 32, 32, 5, 16, ("d", _TOP_BITS, _NIBBLES)),
            BlockType("Q5_1", 32, 32, 5, 0, ("d", "low", _TOP_BITS, _NIBBLES)),
            BlockType("Q8_0", 32, 32, 8, 0, ("d", Plane(8, 32))),
            BlockType("Q2_K", 256, 16, 2, 0, ("scales", Plane(2, 32), "d", "low")),
            BlockType("Q3_K", 256, 16, 3, 4, (Plane(1, 32), Plane(2, 32), "scales", "d")),
            BlockType("Q4_K", 256, 32, 4, 0, ("d", "low", "scales", Plane(4, 32))),
            BlockType("Q5_K", 256, 32, 5, 0, ("d", "low", "scales", Plane(1, 32), Plane(4, 32))),
            BlockType("Q6_K", 256, 16, 6, 32, (Plane(4, 64), Plane(2, 32), "scales", "d")),
            BlockType("IQ4_NL", 32, 32, 4, 0, ("d", _NIBBLES), CODEBOOKS["iq4_nl"]),
            BlockType("MXFP4", 32, 32, 4, 0, ("e8m0", _NIBBLES)),
        )
    }
)


@dataclass(frozen=True)
class Blocks:
    """What N rows of blocks hold: B blocks a row, K inputs, G groups."""

    type: BlockType
    codes: Tensor
    """uint8 [N, K], as they are stored; of Q8_0 the int8 numbers, viewed as uint8."""
    d: Tensor
    """f16 [N, B]; of MXFP4 float8_e8m0fnu."""
    low: Tensor | None = None
    """f16 [N, B]: what is added; of K types its step, which is subtracted."""
    scales: Tensor | None = None
    """int8 [N, G], the steps of `d` in each scale."""
    mins: Tensor | None = None
    """int8 [N, G], the steps of `low` in each minimum."""

    @property
    def values(self) -> Tensor:
        """int8 [N, K]: what `scale` multiplies; indices into a codebook, and E2M1 codes of MXFP4,
        stay what they are.
        """
        return self.codes.sub(self.type.zero).view(torch.int8)

    @property
    def scale(self) -> Tensor:
        """[N, G]: f16, f32 where it is a product, float8_e8m0fnu of MXFP4."""
        return self.d if self.scales is None else self._steps(self.d, self.scales)

    @property
    def offset(self) -> Tensor | None:
        """[N, G], f16 or f32: what is added after scaling; None where there is nothing."""
        if self.low is None or self.mins is None:
            return self.low
        return -self._steps(self.low, self.mins)

    def _steps(self, step: Tensor, counts: Tensor) -> Tensor:
        rows, blocks = step.shape
        return (step.float()[..., None] * counts.view(rows, blocks, -1)).flatten(1)


def unpack(type: BlockType, data: Tensor) -> Blocks:
    """Return what ``data``, uint8 [N, `BlockType.row_bytes`], holds; it works on any device.

    ``values * scale + offset`` in f32 is bit-equal to what gguf 0.19 dequantizes to.
    """
    rows = data.shape[0]
    blocks = data.view(rows, -1, type.size_bytes)
    planes: list[Tensor] = []
    parts: dict[str, Tensor] = {}
    for section, stored in type.cut(blocks):
        if isinstance(section, Plane):
            planes.append(_unpack_plane(section, stored) << _shift(type, section))
        elif section == "scales":
            scales, mins = _SCALES[type.name].unpack(stored)
            parts["scales"] = scales.reshape(rows, -1)
            if mins is not None:
                parts["mins"] = mins.reshape(rows, -1)
        elif section == "e8m0":
            parts["d"] = stored.contiguous().view(torch.float8_e8m0fnu).view(rows, -1)
        else:
            parts[section] = stored.contiguous().view(torch.float16).view(rows, -1)
    codes = planes[0] if len(planes) == 1 else planes[0] | planes[1]
    return Blocks(type, codes.reshape(rows, -1), **parts)


def pack(blocks: Blocks) -> Tensor:
    """Return the bytes of ``blocks``, uint8 [N, `BlockType.row_bytes`]: the inverse of `unpack`."""
    type = blocks.type
    rows, count = blocks.d.shape
    codes = blocks.codes.view(rows, count, type.inputs)
    stored = []
    for section in type.sections:
        if isinstance(section, Plane):
            bits = codes >> _shift(type, section)
            stored.append(_pack_plane(section, bits & ((1 << section.bits) - 1)))
        elif section == "scales" and blocks.scales is not None:
            scales = blocks.scales.view(rows, count, -1)
            mins = None if blocks.mins is None else blocks.mins.view(rows, count, -1)
            stored.append(_SCALES[type.name].pack(scales, mins))
        else:
            step = blocks.low if section == "low" else blocks.d
            assert step is not None
            stored.append(step.contiguous().view(torch.uint8).view(rows, count, -1))
    return torch.cat(stored, dim=-1).view(rows, -1)


def split_last(x: Tensor, *sizes: int) -> Tensor:
    """Return ``x`` with its last dimension cut into ``sizes``."""
    return x.reshape(*x.shape[:-1], *sizes)


def _shift(type: BlockType, plane: Plane) -> int:
    """Return the bit of a code at which ``plane`` begins: 0 for the four lowest bits, which are two
    in Q3_K and Q2_K.
    """
    lowest = 2 if type.bits == 3 else 4
    return 0 if plane.bits in (lowest, type.bits) else lowest


def _unpack_plane(plane: Plane, stored: Tensor) -> Tensor:
    """Return the bits [..., inputs] that the bytes ``stored`` [..., inputs * bits / 8] hold."""
    shifts = torch.arange(0, 8, plane.bits, dtype=torch.uint8, device=stored.device)
    runs = split_last(stored, -1, 1, plane.width) >> shifts[:, None]
    return (runs & ((1 << plane.bits) - 1)).flatten(-3)


def _pack_plane(plane: Plane, bits: Tensor) -> Tensor:
    runs = split_last(bits, -1, 8 // plane.bits, plane.width)
    packed = runs[..., 0, :].clone()
    for index in range(1, 8 // plane.bits):
        packed |= runs[..., index, :] << (index * plane.bits)
    return packed.flatten(-2)


@dataclass(frozen=True)
class _Scales:
    """How the integers of a block are packed: scales int8 [..., G], and minima if it has them."""

    size_bytes: int
    unpack: Callable[[Tensor], tuple[Tensor, Tensor | None]]
    pack: Callable[[Tensor, Tensor | None], Tensor]


def _unpack_pairs(stored: Tensor) -> tuple[Tensor, Tensor]:
    """Q2_K: the low nibble is the scale, the high one the minimum."""
    return (stored & 15).view(torch.int8), (stored >> 4).view(torch.int8)


def _pack_pairs(scales: Tensor, mins: Tensor | None) -> Tensor:
    assert mins is not None
    return (scales | (mins << 4)).view(torch.uint8)


def _unpack_q3(stored: Tensor) -> tuple[Tensor, None]:
    """Q3_K: 16 of 6 bits, as scale + 32: eight bytes with the low nibbles of scales i and i + 8,
    then four with the two upper bits of scales i, i + 4, i + 8 and i + 12.
    """
    low = _unpack_plane(Plane(4, 8), stored[..., :8])
    high = _unpack_plane(Plane(2, 4), stored[..., 8:])
    return ((low | (high << 4)) - 32).view(torch.int8), None


def _pack_q3(scales: Tensor, mins: Tensor | None) -> Tensor:
    codes = scales.view(torch.uint8) + 32
    low, high = _pack_plane(Plane(4, 8), codes & 15), _pack_plane(Plane(2, 4), codes >> 4)
    return torch.cat((low, high), dim=-1)


def _unpack_q4(stored: Tensor) -> tuple[Tensor, Tensor]:
    """Q4_K and Q5_K, 6 bits each: four bytes of the first scales and four of the first minima,
    their two upper bits those of the last; then four with the low nibbles of both of the last.
    """
    first, first_min, last = torch.split(stored, 4, dim=-1)
    scales = torch.cat((first & 63, (last & 15) | ((first >> 6) << 4)), dim=-1)
    mins = torch.cat((first_min & 63, (last >> 4) | ((first_min >> 6) << 4)), dim=-1)
    return scales.view(torch.int8), mins.view(torch.int8)


def _pack_q4(scales: Tensor, mins: Tensor | None) -> Tensor:
    assert mins is not None
    first, last = torch.split(scales.view(torch.uint8), 4, dim=-1)
    first_min, last_min = torch.split(mins.view(torch.uint8), 4, dim=-1)
    upper = (first | ((last >> 4) << 6), first_min | ((last_min >> 4) << 6))
    return torch.cat((*upper, (last & 15) | ((last_min & 15) << 4)), dim=-1)


_K4_SCALES = _Scales(12, _unpack_q4, _pack_q4)
_SCALES: Mapping[str, _Scales] = {
    "Q2_K": _Scales(16, _unpack_pairs, _pack_pairs),
    "Q3_K": _Scales(12, _unpack_q3, _pack_q3),
    "Q4_K": _K4_SCALES,
    "Q5_K": _K4_SCALES,
    "Q6_K": _Scales(
        16,
        lambda stored: (stored.contiguous().view(torch.int8), None),
        lambda scales, mins: scales.contiguous().view(torch.uint8),
    ),
}
