"""Tensors from files, and the packings that several formats share (torch)."""

from __future__ import annotations

from collections.abc import Container

import torch
from torch import Tensor

from qtool.checkpoint import Checkpoint, TensorInfo
from qtool.checkpoint.gguf_types import BLOCKS
from qtool.codes import NVFP4_RANGE, pack_pairs, to_16_bits, unpack_pairs
from qtool.errors import CheckpointRefused
from qtool.formats.layout import TRUNCATED, QuantizedModule, refused
from qtool.name_map import LinearWeight

TORCH_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
}
NO_GROUP = -1  # in a g_idx that is stored and not used
DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


def read_tensor(checkpoint: Checkpoint, name: str) -> Tensor:
    """Return the tensor ``name``; raises what `read_stored` does."""
    return read_stored(checkpoint.tensors[name])


def read_stored(info: TensorInfo) -> Tensor:
    """Return a tensor of a file.

    Raises: CheckpointRefused, when torch has no such dtype or the file is shorter than it was.
    """
    dtype = torch_dtype(info)
    data = torch.empty(sum(size for _, _, size in info.byte_ranges), dtype=torch.uint8)
    filled = 0
    for path, offset, size in info.byte_ranges:
        with path.open("rb", buffering=0) as file:
            file.seek(offset)
            view, done = memoryview(data.numpy().data)[filled : filled + size], 0
            while done < size:
                count = file.readinto(view[done:])
                if not count:
                    raise refused("E_TRUNCATED", f"{path} ends inside `{info.name}`", TRUNCATED)
                done += count
        filled += size
    if info.arrangement is not None:
        arranged = info.arrangement.apply(data.numpy(), info.shape)
        data = torch.frombuffer(bytearray(arranged), dtype=torch.uint8)
    return data.view(dtype).reshape(stored_shape(info))


def stored_shape(info: TensorInfo) -> tuple[int, ...]:
    """Return the shape of the tensor that `read_stored` makes: of blocks, rows of bytes."""
    if not info.is_blocks:
        return info.shape
    block, block_bytes = BLOCKS[info.dtype]
    return (*info.shape[:-1], info.shape[-1] // block * block_bytes)


def expert_matrix(stack: Tensor, linear: LinearWeight) -> Tensor:
    """Return the matrix [N, K] of ``linear``, a layer of one expert of ``stack`` [E, ...]."""
    matrix = stack[linear.expert]
    matrix = matrix.T if linear.is_transposed else matrix
    if linear.is_interleaved:
        return matrix[linear.part :: linear.parts]
    return matrix.chunk(linear.parts)[linear.part]


def torch_dtype(info: TensorInfo) -> torch.dtype:
    """Return torch's name of the dtype; CheckpointRefused when it has none."""
    if info.is_blocks:
        return torch.uint8
    if info.dtype not in TORCH_DTYPES:
        raise refused(
            "E_DTYPE",
            f"`{info.name}` is {info.dtype}, which qtool does not read",
            "the tool that wrote the checkpoint may load it",
        )
    return TORCH_DTYPES[info.dtype]


def load(checkpoint: Checkpoint, module: QuantizedModule) -> dict[str, Tensor]:
    """Return all tensors of ``module`` but its bias, by suffix."""
    return {
        suffix: read_tensor(checkpoint, tensor.name)
        for suffix, tensor in module.tensors.items()
        if suffix != "bias"
    }


def from_divisor(divisor: Tensor) -> Tensor:
    """Return the multiplier that does what ``divisor``, NVFP4's global scale in compressed-tensors,
    does, f32.

    A reciprocal of a reciprocal is often another number, so the numbers that libraries write are
    recognized by their form: the divisor is 2688 / amax of a 16-bit amax, and then ModelOpt's
    multiplier is amax / 2688; or it was itself rounded to 16 bits, and then the multiplier is its
    reciprocal.
    """
    amax = to_16_bits(NVFP4_RANGE / divisor)
    return torch.where(NVFP4_RANGE / amax == divisor, amax / NVFP4_RANGE, 1 / divisor)


def to_divisor(multiplier: Tensor) -> Tensor:
    """Return the divisor that `from_divisor` makes ``multiplier`` of; where there is none, the one
    that comes within the last bit of f32.
    """
    amax, short = to_16_bits(multiplier * NVFP4_RANGE), to_16_bits(1 / multiplier)
    of_short = torch.where(1 / short == multiplier, short, 1 / multiplier)
    return torch.where(amax / NVFP4_RANGE == multiplier, NVFP4_RANGE / amax, of_short)


def data_from_words(words: Tensor, bits: int, count: int) -> Tensor:
    """Return the ``data`` of a `QuantizedWeight` for rows of packed offset-binary codes, int32 [R,
    W]; see `unpack_bits`.
    """
    if bits == 4 and count % 2 == 0:
        return words.view(torch.uint8)[:, : count // 2].contiguous()  # the same order of nibbles
    if bits == 8:
        return signed(words.view(torch.uint8)[:, :count].contiguous(), bits)
    return signed(unpack_bits(words, bits, count), bits)


def data_from_bytes(module: QuantizedModule, codes: Tensor) -> Tensor:
    """Return the ``data`` of a `QuantizedWeight` for signed codes of ``module``, int8 [N, K].

    Raises: CheckpointRefused, when they have more bits than the config says.
    """
    bits = module.scheme.weights.bits
    limit = 2 ** (bits - 1)
    if bits < 8 and not codes.is_meta and bool(((codes < -limit) | (codes >= limit)).any()):
        raise _out_of_range(f"`{module.name}` has codes that are not of {bits} bits")
    return pack_pairs((codes + 8).view(torch.uint8)) if bits == 4 else codes


def _out_of_range(message: str) -> CheckpointRefused:
    return refused(
        "E_CODE_RANGE", message, "write the bits that the codes have into the quantization config"
    )


def words_from_data(data: Tensor, bits: int) -> Tensor:
    """Return ``data`` of a `QuantizedWeight` as rows of packed offset-binary codes, int32: the
    inverse of `data_from_words`.
    """
    return _as_words(data) if bits == 4 else pack_bits(offset_binary(data, bits), bits)


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Pack ``codes``, uint8 [R, C], lowest bits first and without gaps, into int32 [R, C * bits /
    32].
    """
    if bits == 8:
        return _as_words(codes)
    rows, count = codes.shape
    eights = torch.nn.functional.pad(codes, (0, -count % 8)).reshape(rows, -1, 8)
    packed = [torch.zeros_like(eights[..., 0]) for _ in range(bits)]  # eight codes in `bits` bytes
    for i in range(8):
        byte, shift = divmod(i * bits, 8)
        packed[byte] |= eights[..., i] << shift
        if shift + bits > 8:
            packed[byte + 1] |= eights[..., i] >> (8 - shift)
    return _as_words(torch.stack(packed, dim=-1).reshape(rows, -1)[:, : -(-count * bits // 8)])


def _as_words(data: Tensor) -> Tensor:
    padded = torch.nn.functional.pad(data, (0, -data.shape[1] % 4))
    return padded.reshape(-1).view(torch.int32).reshape(data.shape[0], -1)


def unpack_bits(words: Tensor, bits: int, count: int) -> Tensor:
    """Return the ``count`` codes that each row of ``words``, int32 [R, W], holds, lowest bits
    first, as uint8 [R, count].

    The row is one string of bits (dense), or each word holds 32 // bits whole codes (padded:
    compressed-tensors before 0.18, for 3, 5, 6 and 7 bits); the width tells which, and dense wins
    where a short row leaves it open.
    """
    rows, width = words.shape
    if width == -(-count * bits // 32):
        data = words.flatten().view(torch.uint8).reshape(rows, -1)
        # eight codes in `bits` bytes
        data = torch.nn.functional.pad(data, (0, -data.shape[1] % bits)).reshape(rows, -1, bits)
        codes = [data[..., i * bits // 8] >> (i * bits % 8) for i in range(8)]
        for i in range(8):
            if i * bits % 8 + bits > 8:
                codes[i] = codes[i] | (data[..., i * bits // 8 + 1] << (8 - i * bits % 8))
    elif width == -(-count // (32 // bits)):
        codes = [(words >> (i * bits)).to(torch.uint8) for i in range(32 // bits)]
        spare = 32 % bits
        if spare and not words.is_meta and bool(((words >> (32 - spare)) & (2**spare - 1)).any()):
            raise _out_of_range(f"words hold more than {32 // bits} codes of {bits} bits each")
    else:
        raise refused("E_TENSOR_SHAPE", f"{width} words hold no {count} codes of {bits} bits")
    return (
        torch.stack(codes, dim=-1)
        .reshape(rows, -1)[:, :count]
        .bitwise_and(2**bits - 1)
        .contiguous()
    )


def check_constant(
    module: QuantizedModule, words: Tensor, bits: int, count: int, values: Container[int]
) -> None:
    """Raise CheckpointRefused when the zero points ``words`` of a layer that its config calls
    symmetric are not all one of ``values``.
    """
    if words.is_meta:
        return
    zeros = torch.unique(unpack_bits(words, bits, count))
    if zeros.numel() > 1 or int(zeros[0]) not in values:
        found = ", ".join(map(str, zeros[:4].tolist()))
        message = (
            f"`{module.name}` is symmetric, as the config says, and its zero points are {found} "
            f"and not {2 ** (bits - 1)}"
        )
        raise refused(
            "E_ZERO_POINT",
            message,
            "set `sym` to false in the quantization config if the weights are asymmetric",
        )


def signed(codes: Tensor, bits: int) -> Tensor:
    """Return offset-binary ``codes``, uint8, as the signed int8 values they stand for."""
    return codes.sub(2 ** (bits - 1)).view(torch.int8)


def offset_binary(codes: Tensor, bits: int) -> Tensor:
    """Return signed int8 ``codes`` as the uint8 that `signed` makes them of."""
    return codes.view(torch.uint8).add(2 ** (bits - 1))


def reorder(data: Tensor, order: Tensor) -> Tensor:
    """Return ``data`` of a `QuantizedWeight`, column j taken from column ``order[j]``."""
    order = order.long().to(data.device)
    return pack_pairs(unpack_pairs(data)[:, order]) if data.dtype == torch.uint8 else data[:, order]


def groups_of_inputs(columns: int, size: int, perm: Tensor | None) -> Tensor:
    """Return g_idx, int32 [K]: the group of each input, in order or as ``perm`` scatters them; the
    inverse of `permutation`.
    """
    in_order = torch.arange(columns, dtype=torch.int32) // size
    return (
        in_order
        if perm is None
        else torch.empty_like(in_order).index_copy_(0, perm.long(), in_order)
    )


def permutation(module: QuantizedModule, g_idx: Tensor) -> Tensor | None:
    """Return the order that sorts inputs by group, int32 [K]; None when they are in order already.

    ``g_idx`` [K] is the group of each input of ``module``; only -1 means that they are in order,
    as in compressed-tensors and vLLM. Raises: CheckpointRefused, when it is something else.
    """
    columns = g_idx.numel()
    groups = module.scheme.weights.scale_count(1, module.shape[1])
    size = module.scheme.weights.group_size or module.shape[1]
    if groups == 1 or bool((g_idx == NO_GROUP).all()):
        return None
    if torch.equal(g_idx.long(), torch.arange(columns, device=g_idx.device) // size):
        return None
    in_range = bool(((g_idx >= 0) & (g_idx < groups)).all())
    if not in_range or not bool((torch.bincount(g_idx.long(), minlength=groups) == size).all()):
        raise refused(
            "E_G_IDX",
            f"`{module.name}`: g_idx does not put {size} of {columns} inputs into each of "
            f"{groups} groups",
            "quantize the 16-bit model again: the weights cannot be told from such a g_idx",
        )
    return torch.argsort(g_idx, stable=True).to(torch.int32)
