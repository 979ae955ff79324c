"""Whether tensors are of the dtype that their header says.

A relabelled tensor has the same bytes, so its numbers give it away: bfloat16 read as float16 lies
between 1/4 and 2, float16 read as bfloat16 below 2^-30 and over 8 times as many powers of two as
weights have. A few thousand numbers of each are read.
"""

from __future__ import annotations

import os
from typing import Any, TypeAlias

import numpy as np

from qtool.checkpoint import Checkpoint, TensorInfo
from qtool.checkpoint.model import FLOAT_DTYPES
from qtool.errors import CheckpointRefused
from qtool.formats import Layout, QuantizedModule, unquantized_tensors
from qtool.formats.layout import refused
from qtool.formats.values import SCALES
from qtool.modules import decoder_layer_number

Words: TypeAlias = "np.ndarray[Any, np.dtype[np.int64]]"
SAMPLE_SIZE = 4096  # numbers of one tensor
MIN_SAMPLE = 256  # fewer tell nothing
MIN_VALUES = 8  # different ones
MIN_SPREAD = 5  # powers of two between quartiles: 2 of weights, 16 of float16 read as bfloat16
UNREADABLE = frozenset({"U16", "U32", "U64", "C64"})  # torch computes with none of them
GLOBAL_SCALES = ("weight_global_scale", "weight_scale_2", "input_global_scale")
INTEGER_DTYPES = ("I8", "I16", "I32", "I64")  # scales may be U8, as e8m0
MX_GROUP = 32
INTEGER_PARTS = ("g_idx", "weight_g_idx")
HALVES = ("F16", "BF16")
WEIGHT_SCALES = ("weight_scale", "scales", "weight_scale_inv")
HINT = "the header was edited, or a tool wrote it wrong: take the file from its source"


def check_dtypes(checkpoint: Checkpoint, layout: Layout | None) -> None:
    """Refuse weights that are not floats, parts of quantized layers in a dtype that no format has,
    and numbers of another dtype than the header says.

    Raises: CheckpointRefused.
    """
    names = unquantized_tensors(checkpoint, layout)
    weights = [checkpoint.tensors[name] for name in names if name.endswith((".weight", ".bias"))]
    for tensor in weights:
        if tensor.dtype not in FLOAT_DTYPES:
            message = f"`{tensor.name}` in {tensor.file.name} is {tensor.dtype}; expected floats"
            raise refused("E_TENSOR_DTYPE", message, HINT)
    vectors = [tensor for tensor in weights if len(tensor.shape) == 1]
    _check_one_dtype(checkpoint, [tensor for tensor in vectors if _is_of_decoder(tensor)])
    modules = [*layout.modules.values()] if layout else []
    for module in modules:
        _check_parts(module)
    scales: list[TensorInfo] = []
    for suffix in WEIGHT_SCALES:
        found = [module.tensors[suffix] for module in modules if suffix in module.tensors]
        halves = [tensor for tensor in found if tensor.dtype in HALVES]
        _check_one_dtype(checkpoint, halves)
        scales += halves
    matrices = [tensor for tensor in weights if len(tensor.shape) == 2 and min(tensor.shape) >= 32]
    for tensor in (*matrices, *scales):
        _check_numbers(tensor)


def _is_of_decoder(tensor: TensorInfo) -> bool:
    name = tensor.name
    is_outside = name.endswith(("embed_tokens.weight", "lm_head.weight", "model.norm.weight"))
    return decoder_layer_number(name) is not None or is_outside


def _check_parts(module: QuantizedModule) -> None:
    """Refuse a quantized layer whose parts have a dtype or a group size that no format has."""
    for suffix, tensor in module.tensors.items():
        if expected := _expected(suffix, tensor):
            message = f"`{tensor.name}` in {tensor.file.name} is {tensor.dtype}"
            raise refused(
                "E_TENSOR_DTYPE", f"{message} {[*tensor.shape]}; expected {expected}", HINT
            )
    weights = module.scheme.weights
    if weights.scale == "e8m0" and weights.group_size not in (None, MX_GROUP):
        message = f"`{module.name}` has MX scales for groups of {weights.group_size}"
        raise refused("E_MX_GROUP", f"{message}; they are for groups of {MX_GROUP}", HINT)


def _expected(suffix: str, tensor: TensorInfo) -> str:
    """Return what a part of a quantized layer must be; empty when it is that."""
    if suffix == "weight_shape":  # two numbers, which detection reads
        return ""
    if suffix in INTEGER_PARTS and tensor.dtype in FLOAT_DTYPES:
        return "integers"
    if tensor.dtype in UNREADABLE or (suffix in SCALES and tensor.dtype in INTEGER_DTYPES):
        return "a dtype that weights have"
    if suffix in GLOBAL_SCALES and (tensor.dtype != "F32" or len(tensor.shape) > 1):
        return "one F32"
    return ""


def _check_one_dtype(checkpoint: Checkpoint, tensors: list[TensorInfo]) -> None:
    """Refuse float16 beside bfloat16: one model is trained in one of them."""
    first = {tensor.dtype: tensor for tensor in reversed(tensors)}
    if all(dtype in first for dtype in HALVES):
        one, other = (first[dtype] for dtype in HALVES)
        message = (
            f"{checkpoint.source}: `{one.name}` is {one.dtype} and `{other.name}` is {other.dtype}"
        )
        raise refused("E_MIXED_DTYPES", message, HINT)


def _check_numbers(tensor: TensorInfo) -> None:
    """Refuse a matrix, or the scales of one, whose sampled numbers are those of another dtype.

    A few repeated values, such as 1 and -1, tell nothing. Weights of experts and tokens that are
    never used may be tiny, but then they are all of about the same size.
    """
    if tensor.dtype not in HALVES or tensor.count < MIN_SAMPLE:
        return
    words = _sample(tensor)
    words = words[(words & 0x7FFF) != 0]
    if len(words) < MIN_SAMPLE // 2 or len(np.unique(words & 0x7FFF)) < MIN_VALUES:
        return
    if tensor.dtype == "F16":
        exponents = (words >> 10) & 0x1F
        if np.mean((exponents >= 13) & (exponents <= 15)) > 0.99:
            raise _relabelled(tensor, "bfloat16")
        return
    low, middle, high = np.percentile((words >> 7) & 0xFF, (25, 50, 75))
    if middle < 96 and high - low >= MIN_SPREAD:
        raise _relabelled(tensor, "float16")


def _sample(tensor: TensorInfo) -> Words:
    """Return 16-bit words from the middle: the first rows of embeddings are often empty."""
    count = min(SAMPLE_SIZE, tensor.count)
    start = (tensor.count - count) // 2
    descriptor = os.open(tensor.file, os.O_RDONLY)
    try:
        data = os.pread(descriptor, 2 * count, tensor.offset + 2 * start)
    finally:
        os.close(descriptor)
    return np.frombuffer(data[: len(data) // 2 * 2], "<u2").astype(np.int64)


def _relabelled(tensor: TensorInfo, dtype: str) -> CheckpointRefused:
    message = (
        f"`{tensor.name}` in {tensor.file.name} is {tensor.dtype}, and its numbers are those of "
        f"{dtype}"
    )
    return refused("E_RELABELLED", message, HINT)
