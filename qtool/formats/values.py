"""The deep check of a checkpoint: no NaN, no infinity, no negative scale, no zero where it divides,
no group out of range. numpy on raw bytes, at memory speed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Event, local
from typing import Any, TypeAlias

import numpy as np

from qtool.checkpoint import Checkpoint, TensorInfo
from qtool.checkpoint.gguf_types import BLOCKS, SCALES_AT
from qtool.errors import CheckpointRefused, naming
from qtool.formats import bitsandbytes, mxfp4
from qtool.formats.layout import Layout, QuantizedModule
from qtool.modules import CACHE_SCALES, parse_cache_scale
from qtool.scheme import CODEBOOKS, Weights

Words: TypeAlias = "np.ndarray[Any, np.dtype[np.integer[Any]]]"
Word: TypeAlias = "type[np.integer[Any]]"
PIECE_BYTES = 64 << 20  # what one thread takes at a time
# what is in memory at a time: it fits a core's cache, so a second pass over it is free
BLOCK_BYTES = 1 << 20
SCALES = (
    "weight_scale",
    "_weight_scale",
    "weight_scale_2",
    "weight_global_scale",
    "weight_scale_inv",
    "scale",
    "activation_scale",
    "input_scale",
    "input_scale_2",
    "input_global_scale",
    "scales",
    "pre_quant_scale",
    *bitsandbytes.SCALES,
    *CACHE_SCALES,
)
MULTIPLIERS = (
    "weight_scale",
    "_weight_scale",
    "weight_scale_2",
    "weight_scale_inv",
    "scale",
    "scales",
    *bitsandbytes.SCALES,
)


@dataclass(frozen=True)
class Bits:
    """A float format as its bit pattern."""

    word: Word
    """The unsigned integer of its width."""
    mask: int
    """All bits but the sign, or those of the exponent."""
    limit: int
    """A number is NaN or infinite when it has this or more under ``mask``."""
    sign: int
    """The bit of the sign."""

    def has_not_finite(self, words: Words, scratch: Words) -> bool:
        """Whether one of ``words`` is NaN or infinite."""
        masked = np.bitwise_and(words, self.word(self.mask), out=scratch[: len(words)])
        return bool(masked.max() >= self.limit)

    def problem(self, words: Words, scratch: Words) -> str | None:
        """Return what is wrong with ``words``, which need not be scales."""
        return "holds NaN or infinity" if self.has_not_finite(words, scratch) else None


FLOATS: Mapping[str, Bits] = {
    "F64": Bits(np.uint64, 0x7FF0 << 48, 0x7FF0 << 48, 1 << 63),
    "F32": Bits(np.uint32, 0x7F800000, 0x7F800000, 1 << 31),
    "BF16": Bits(np.uint16, 0x7F80, 0x7F80, 1 << 15),
    "F16": Bits(np.uint16, 0x7C00, 0x7C00, 1 << 15),
    "F8_E4M3": Bits(np.uint8, 0x7F, 0x7F, 1 << 7),
    "F8_E5M2": Bits(np.uint8, 0x7C, 0x7C, 1 << 7),
}
E8M0 = Bits(np.uint8, 0xFF, 0xFF, 0x100)  # 255 is NaN; there is no zero and no sign


def check_values(
    checkpoint: Checkpoint, layout: Layout | None, *, stop: Event | None = None
) -> list[str]:
    """Return what is wrong with the numbers of ``checkpoint``, one sentence for each tensor, naming
    file, tensor and value; empty when all is well.

    A negative scale is wrong, except one of integer weights, of which AutoRound writes some. A zero
    scale of weights is right: rows and experts that are never used have it, and engines load them.
    A zero that divides, as a scale of activations or an inverse scale, is wrong. Reads every float
    tensor and ``g_idx`` once, in blocks of 1 MB a thread; packed integers hold no wrong value and
    are not read. Of blocks of GGUF the scales are looked at.
    """
    return check_tensors(checkpoint.tensors.values(), layout, stop=stop)


def check_tensors(
    tensors: Iterable[TensorInfo], layout: Layout | None, *, stop: Event | None = None
) -> list[str]:
    """Check some of the tensors of a checkpoint of ``layout``, as `check_values` does.

    Once ``stop`` is set, reading ends and the answer is useless.
    """
    ended = stop or Event()
    by_name = {tensor.name: tensor for tensor in tensors}
    with _Files() as files:
        pieces = [
            piece
            for tensor in by_name.values()
            for piece in _pieces(tensor, _check_for(tensor, layout))
        ]
        with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
            found = pool.map(lambda piece: piece.problem(files, ended), pieces, chunksize=16)
            problems = {
                piece.tensor.name: problem
                for piece, problem in zip(pieces, found, strict=True)
                if problem
            }
    return [f"{by_name[name].file.name}: `{name}` {problem}" for name, problem in problems.items()]


def damaged(message: str) -> CheckpointRefused:
    """Return the error for a checkpoint with wrong values in its data."""
    return CheckpointRefused(
        "E_VALUES",
        message,
        hint="no quantization ends in such numbers: compare the files' digests with those of their "
        "source, or quantize the 16-bit model again",
    )


def problem_in(tensor: TensorInfo, data: Words, layout: Layout | None) -> str | None:
    """Return what is wrong with ``tensor``, whose bytes ``data`` holds; None when all is well."""
    word_and_check = _check_for(tensor, layout)
    if word_and_check is None:
        return None
    word, check = word_and_check
    scratch = np.empty(min(BLOCK_BYTES, len(data)), np.uint8).view(word)
    step = _whole_blocks(tensor, BLOCK_BYTES)
    for start in range(0, len(data), step):
        if problem := check(data[start : start + step].view(word), scratch):
            return problem
    return None


Check = Callable[[Words, Words], str | None]  # words, scratch -> what is wrong


@dataclass(frozen=True)
class _Piece:
    tensor: TensorInfo
    file: Path
    start: int
    """Its first byte in ``file``."""
    size: int
    word: Word
    check: Check

    def problem(self, files: _Files, ended: Event) -> str | None:
        step = _whole_blocks(self.tensor, BLOCK_BYTES)
        for offset in range(self.start, self.start + self.size, step):
            if ended.is_set():
                return None
            count = min(step, self.start + self.size - offset)
            read = files.read(self.file, offset, count)
            if read is None:
                return "cannot be read: the file ends inside it"
            block, scratch = read
            problem = self.check(block.view(self.word), scratch.view(self.word))
            if problem:
                return problem
        return None


class _Files:
    """Open files, read at offsets by several threads, each into its own block."""

    def __init__(self) -> None:
        self._descriptors: dict[Path, int] = {}
        self._blocks = local()

    def __enter__(self) -> _Files:
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)

    def read(self, path: Path, offset: int, size: int) -> tuple[Words, Words] | None:
        if not hasattr(self._blocks, "pair"):
            self._blocks.pair = np.empty(BLOCK_BYTES, np.uint8), np.empty(BLOCK_BYTES, np.uint8)
        block, scratch = self._blocks.pair
        done = 0
        while done < size:
            into = [memoryview(block)[done:size]]
            with naming(path):
                count = os.preadv(self._descriptor(path), into, offset + done)
            if not count:
                return None
            done += count
        return block[:size], scratch

    def _descriptor(self, path: Path) -> int:
        if path not in self._descriptors:
            descriptor = os.open(path, os.O_RDONLY)
            # another thread was first
            if self._descriptors.setdefault(path, descriptor) != descriptor:
                os.close(descriptor)
        return self._descriptors[path]


def _pieces(tensor: TensorInfo, word_and_check: tuple[Word, Check] | None) -> Iterator[_Piece]:
    if word_and_check is None:
        return
    step = _whole_blocks(tensor, PIECE_BYTES)
    for file, offset, size in tensor.byte_ranges:
        for start in range(0, size, step):
            yield _Piece(tensor, file, offset + start, min(step, size - start), *word_and_check)


def _whole_blocks(tensor: TensorInfo, size: int) -> int:
    """Return the bytes of the whole blocks of ``tensor`` in ``size`` bytes."""
    return size // BLOCKS[tensor.dtype][1] * BLOCKS[tensor.dtype][1] if tensor.is_blocks else size


def _check_for(tensor: TensorInfo, layout: Layout | None) -> tuple[Word, Check] | None:
    """Return the word that ``tensor`` is read as and what is looked for in it; None when it can
    hold nothing wrong.
    """
    if tensor.is_blocks:
        return np.uint8, _BlockCheck(tensor.dtype).problem
    module, suffix = _owner(tensor, layout)
    is_byte = tensor.dtype == "U8"
    weights = module.scheme.weights if module else None
    if weights is not None and weights.format in CODEBOOKS and (suffix == "weight" or is_byte):
        return None  # codes, and scales that are codes; bitsandbytes calls them floats too
    is_multiplier = module is not None and suffix in MULTIPLIERS
    if tensor.dtype == "F8_E8M0" or (is_byte and is_multiplier):
        return E8M0.word, _e8m0_problem
    if tensor.dtype == "I32" and module and suffix in ("g_idx", "weight_g_idx"):
        groups = module.scheme.weights.scale_count(1, module.shape[1])
        return np.int32, lambda words, _: _group_problem(words, groups)
    if tensor.dtype not in FLOATS:
        return None
    bits = FLOATS[tensor.dtype]
    is_scale = parse_cache_scale(tensor.name) or (module is not None and suffix in SCALES)
    return bits.word, _scale_check(bits, weights, suffix) if is_scale else bits.problem


def _scale_check(bits: Bits, weights: Weights | None, suffix: str) -> Check:
    """Return what looks for wrong scales, by the layer's ``weights`` and the tensor's ``suffix``.

    ``weights``: None for scales of the KV cache.
    """
    # AutoRound flips a group to reach the code -8
    negative_allowed = weights is not None and weights.format.startswith("int")
    zero_allowed = suffix in MULTIPLIERS
    return _ScaleCheck(bits, zero_allowed=zero_allowed, negative_allowed=negative_allowed).problem


def _owner(tensor: TensorInfo, layout: Layout | None) -> tuple[QuantizedModule | None, str]:
    """Return the quantized layer that ``tensor`` is of, if any, and what it is there."""
    owner, _, suffix = tensor.name.rpartition(".")
    if layout is None:
        return None, suffix
    if tensor.name.endswith(mxfp4.SCALES):
        module = layout.modules.get(tensor.name.removesuffix(mxfp4.SCALES))
        return module, "weight_scale" if module else suffix
    layer, is_part, rest = tensor.name.rpartition(".weight.")
    if is_part and layer in layout.modules:
        return layout.modules[layer], f"weight.{rest}"
    return layout.modules.get(owner), suffix


def _e8m0_problem(words: Words, scratch: Words) -> str | None:
    return "holds a NaN scale (255)" if E8M0.has_not_finite(words, scratch) else None


@dataclass(frozen=True)
class _ScaleCheck:
    bits: Bits
    zero_allowed: bool
    negative_allowed: bool

    def problem(self, words: Words, scratch: Words) -> str | None:
        if problem := self.bits.problem(words, scratch):
            return problem
        if not self.negative_allowed and words.max() >= self.bits.sign:
            return "holds a negative scale"
        if not self.zero_allowed and not words.min():
            return "holds a zero scale"
        return None


@dataclass(frozen=True)
class _BlockCheck:
    """Looks at the scales in blocks of a type of GGUF; codes hold nothing wrong."""

    type: str

    def problem(self, words: Words, scratch: Words) -> str | None:
        blocks = words.reshape(-1, BLOCKS[self.type][1])
        if self.type == "MXFP4":
            return _e8m0_problem(blocks[:, 0].copy(), scratch)
        for at in SCALES_AT[self.type]:
            scales = blocks[:, at : at + 2].copy().view(np.uint16)[:, 0]
            if bool(((scales & 0x7C00) == 0x7C00).any()):
                return "holds a scale that is NaN or infinite"
        return None


def _group_problem(words: Words, groups: int) -> str | None:
    low, high = int(words.min()), int(words.max())
    if low == high == -1:  # stored and not used
        return None
    return (
        f"names the groups {low}..{high} and there are {groups}"
        if low < 0 or high >= groups
        else None
    )
