"""Open a checkpoint folder from its headers alone: bounded, checked, without torch, and never a
pickle.

Source of the file format: https://github.com/huggingface/safetensors, section "Format".
"""

from __future__ import annotations

import gc
import math
import os
import reprlib
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from operator import attrgetter
from pathlib import Path
from typing import Any

from qtool.checkpoint.config_check import check_config
from qtool.checkpoint.model import DTYPE_BITS, Checkpoint, TensorInfo
from qtool.checkpoint.strict_json import (
    DAMAGED,
    JsonDict,
    check_json_size,
    parse_object,
    read_json,
    refused,
    regular_size,
)
from qtool.errors import CheckpointRefused

FIELDS = {"dtype", "shape", "data_offsets"}
MAX_DIMENSIONS = 16
MAX_NUMBER = 1 << 62
MAX_NAME = 1_000
MAX_FILE_NAME = 255
MAX_SHARDS = 10_000
# of memory, for what is known of all tensors: a third of a million, as Kimi K2 has
MAX_TENSOR_BYTES = 128 << 20
IMPOSTORS = (  # how a file starts, code, what it is, what helps
    (
        b"version ",
        "E_LFS_POINTER",
        "a Git LFS pointer",
        "run `git lfs pull` in the folder, or download again",
    ),
    (b"<", "E_NOT_SAFETENSORS", "an HTML page", "the download failed: fetch it again"),
    (
        b"GGUF",
        "E_GGUF",
        "a GGUF file under another name",
        "take the safetensors version it was made from",
    ),
    (
        b"PK\3\4",
        "E_PICKLE",
        "a zip archive, as torch.save writes,",
        "convert it to safetensors first",
    ),
    (b"\x80\2", "E_PICKLE", "a pickle", "convert it to safetensors first"),
)
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def open_checkpoint(path: Path) -> Checkpoint:
    """Read config, index and every safetensors header below ``path``.

    Raises: CheckpointRefused, naming the file, the tensor and the numbers that do not fit.
    """
    try:
        if not path.exists():
            raise refused(
                "E_NO_MODEL",
                f"{path}: no such folder",
                "give a checkpoint folder or a Hub name such as `org/model`",
            )
        if not path.is_dir():
            raise refused(
                "E_NOT_A_FOLDER",
                f"{path} is a file, not a model folder",
                "give the folder that holds config.json",
            )
        if not os.path.lexists(path / "config.json"):
            raise refused(
                "E_NOT_A_MODEL",
                f"{path}: no config.json, so this is not a model folder",
                "give the folder that holds config.json",
            )
        with _no_collection():
            checkpoint = Checkpoint(path, _read_config(path / "config.json"), _read_tensors(path))
        check_config(checkpoint)
        return checkpoint
    except OSError as error:
        raise refused(
            "E_UNREADABLE",
            f"{error.filename or path} cannot be read: {error.strerror}",
            "check its name, its permissions and the disk",
        ) from None


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Return the tensors that the safetensors file ``path`` declares, after checking every number
    against the file.
    """
    size = regular_size(path)
    with path.open("rb") as file:
        start = file.read(8)
        length = _header_length(path, start, size)
        text = file.read(length)
    if not text.startswith(b"{"):
        raise refused(
            "E_HEADER_START",
            f"{path}: the header of {length:,} bytes starts with {text[:8]!r}, not with an "
            "opening brace",
        )
    header = parse_object(
        text, f"{path}: header", parse_int=_not_minus_zero if b"-0" in text else None
    )
    del text
    _check_metadata(path, header.pop("__metadata__", None))
    tensors = {
        name: _tensor_info(path, name, entry, 8 + length, size - 8 - length)
        for name, entry in header.items()
    }
    _check_tiling(path, tensors, 8 + length, size)
    return tensors


@contextmanager
def _no_collection() -> Iterator[None]:
    """Stop the search for reference cycles: headers make none, and a fifth of the time would go
    there.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _read_config(path: Path) -> JsonDict:
    config = read_json(path)
    names = config.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        hint = 'a config says, for instance, "architectures": ["LlamaForCausalLM"]'
        raise refused(
            "E_CONFIG_FIELD",
            f"{path}: `architectures` is {reprlib.repr(names)}, and must be a list of names",
            hint,
        )
    return config


def _read_tensors(path: Path) -> dict[str, TensorInfo]:
    single, index_file = path / "model.safetensors", path / "model.safetensors.index.json"
    if os.path.lexists(
        single
        # transformers takes it first; others beside it are not part of the model (e.g.
        # consolidated.safetensors)
    ):
        return _read_shards([single])
    if os.path.lexists(index_file):
        return _read_indexed(path, index_file)
    files = sorted(file for file in path.glob("*.safetensors") if not file.name.startswith("."))
    if files:
        return _read_shards(files)
    others = sorted(
        file.name for file in path.iterdir() if file.suffix in (*PICKLE_SUFFIXES, ".gguf")
    )
    if pickles := [name for name in others if not name.endswith(".gguf")]:
        message = (
            f"{path}: the weights are pickle files ({', '.join(pickles[:3])}), which qtool never "
            "opens"
        )
        raise refused(
            "E_PICKLE",
            message,
            "convert them to safetensors first, or take a revision that has them",
        )
    if others:
        hint = "take the safetensors version it was made from"
        raise refused(
            "E_GGUF",
            f"{path}: the weights are GGUF files ({', '.join(others[:3])}), which qtool does not "
            "read",
            hint,
        )
    raise refused(
        "E_NO_WEIGHTS",
        f"{path}: no safetensors file",
        "is the download complete? Pickle files are never taken, and never downloaded",
    )


def _read_indexed(path: Path, index_file: Path) -> dict[str, TensorInfo]:
    weight_map = read_json(index_file).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise refused(
            "E_INDEX_MAP",
            f"{index_file}: `weight_map` is missing, empty or no object",
            "an index maps each tensor to its file: download it again",
        )
    files: dict[str, Path] = {}
    for tensor, shard in weight_map.items():
        if type(shard) is not str or shard not in files:
            files[shard] = _shard_path(path, index_file, tensor, shard)
    tensors = _read_shards(files.values())
    for name, shard in weight_map.items():
        if name not in tensors or tensors[name].file is not files[shard]:
            message = (
                f"{index_file}: tensor `{name[:MAX_NAME]}` is not in {shard}, where the index "
                "puts it"
            )
            raise refused(
                "E_INDEX_TENSOR",
                message,
                "index and shards are of different downloads: fetch all of them again",
            )
    return tensors


def _shard_path(path: Path, index_file: Path, tensor: str, shard: object) -> Path:
    said = f"{index_file}: tensor `{tensor[:MAX_NAME]}` is said to be in {reprlib.repr(shard)}"
    if not isinstance(shard, str):
        raise refused("E_INDEX_TYPE", f"{said}, which is no file name")
    if Path(shard).name != shard or not shard.isprintable() or len(shard) > MAX_FILE_NAME:
        raise refused(
            "E_INDEX_PATH",
            f"{said}, which is not a file of this folder",
            "do not trust this model: an index names files beside it, never others",
        )
    if not shard.endswith(".safetensors"):
        raise refused(
            "E_INDEX_SUFFIX",
            f"{said}, which is not a safetensors file",
            "take a revision of the model with safetensors weights",
        )
    if not os.path.lexists(path / shard):
        raise refused(
            "E_MISSING_SHARD",
            f"{path / shard} is named by the index and missing",
            "download or copy it again",
        )
    return path / shard


def _read_shards(files: Iterable[Path]) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    files, memory = list(files), 0
    if len(files) > MAX_SHARDS:
        raise refused(
            "E_SHARD_COUNT",
            f"{files[0].parent}: {len(files):,} safetensors files; the limit is {MAX_SHARDS:,}",
            "merge the shards",
        )
    for file in files:
        found = read_header(file)
        if not tensors.keys().isdisjoint(found):
            name = next(name for name in found if name in tensors)
            hint = (
                "remove the file that is not part of the model, or add its "
                "model.safetensors.index.json"
            )
            raise refused(
                "E_DUPLICATE",
                f"tensor `{name}` is in {tensors[name].file} and in {file.name}",
                hint,
            )
        tensors |= found
        memory += 300 * len(found) + sum(map(len, found))
        if memory > MAX_TENSOR_BYTES:
            raise refused(
                "E_TENSOR_COUNT",
                f"{file}: with it the model has {len(tensors):,} tensors, more than any model "
                "known",
                "is it one model?",
            )
    if not tensors:
        raise refused(
            "E_NO_TENSORS",
            f"{', '.join(str(file) for file in files[:3])}: no tensor inside",
            "the weights were not saved: export them again",
        )
    return tensors


def _header_length(path: Path, start: bytes, size: int) -> int:
    length = int.from_bytes(start, "little")
    # only then can it be something else: letters make a length beyond any file
    if len(start) < 8 or length < 2 or 8 + length > size:
        for mark, code, what, hint in IMPOSTORS:
            if start.lstrip().startswith(mark):
                raise refused(
                    code, f"{path} is {what} of {size:,} bytes, not a safetensors file", hint
                )
    again = "the file is truncated or is not safetensors: download it again"
    if len(start) < 8:
        raise refused(
            "E_HEADER_SHORT", f"{path}: {size:,} bytes, too short for the length of a header", again
        )
    if length < 2:
        raise refused(
            "E_HEADER_EMPTY",
            f"{path}: a header of {length:,} bytes is declared in a file of {size:,} bytes",
            again,
        )
    if 8 + length > size:
        raise refused(
            "E_HEADER_LENGTH",
            f"{path}: a header of {length:,} bytes is declared in a file of {size:,} bytes",
            again,
        )
    check_json_size(length, f"{path}: header")
    return length


def _not_minus_zero(digits: str) -> int:
    if digits == "-0":
        raise ValueError("-0 counts nothing")
    return int(digits)


def _check_metadata(path: Path, metadata: object) -> None:
    if metadata is not None and (
        not isinstance(metadata, dict)
        or not all(isinstance(value, str) for value in metadata.values())
    ):
        hint = "safetensors keeps texts only there: save the file again"
        raise refused(
            "E_HEADER_METADATA",
            f"{path}: `__metadata__` is {reprlib.repr(metadata)}, and must map texts to texts",
            hint,
        )


def _tensor_info(path: Path, name: str, entry: Any, data_start: int, data_size: int) -> TensorInfo:
    if not name.isprintable() or len(name) > MAX_NAME:
        raise refused(
            "E_HEADER_NAME",
            f"{path}: a tensor is called {reprlib.repr(name)}, {len(name):,} characters",
            "rename it where it was saved",
        )
    if not isinstance(entry, dict):
        raise refused(
            "E_HEADER_ENTRY", f"{path}: tensor `{name}` is described by {reprlib.repr(entry)}"
        )
    if entry.keys() != FIELDS:
        raise refused(
            "E_HEADER_FIELDS",
            f"{path}: tensor `{name}` is described by {reprlib.repr(sorted(entry))}; expected "
            f"{sorted(FIELDS)}",
        )
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    bits = DTYPE_BITS.get(dtype, 0) if type(dtype) is str else 0
    if not bits:
        raise refused(
            "E_HEADER_DTYPE",
            f"{path}: tensor `{name}` has the unknown dtype {reprlib.repr(dtype)}",
            f"known are {', '.join(DTYPE_BITS)}",
        )
    numbers: list[Any] = [*shape, *offsets] if type(shape) is type(offsets) is list else [None]
    if (
        set(map(type, numbers)) != {int}
        or min(numbers) < 0
        or max(numbers) >= MAX_NUMBER
        or len(shape) > MAX_DIMENSIONS
        or len(offsets) != 2
    ):
        raise _bad_numbers(path, name, shape, offsets)
    start, end = offsets
    if start > end:
        raise _bad_numbers(path, name, shape, offsets)
    if end > data_size:
        message = (
            f"{path}: tensor `{name}` is said to lie at {reprlib.repr(offsets)} in {data_size:,} "
            "bytes of data"
        )
        raise refused(
            "E_TRUNCATED", message, "the download or copy was interrupted: fetch the file again"
        )
    size_bytes, rest = divmod(math.prod(shape) * bits, 8)
    if rest:
        raise refused(
            "E_HEADER_BITS",
            f"{path}: tensor `{name}`, {dtype} {shape}, ends inside a byte",
            "pad its last dimension where it was saved",
        )
    if end - start != size_bytes or (
        not size_bytes and math.prod(size or 1 for size in shape) >= MAX_NUMBER
    ):
        raise refused(
            "E_HEADER_SIZE",
            f"{path}: tensor `{name}`, {dtype} {shape}, needs {size_bytes:,} bytes and is given "
            f"{end - start:,}",
        )
    return TensorInfo(name, sys.intern(dtype), tuple(shape), path, data_start + start, size_bytes)


def _bad_numbers(path: Path, name: str, shape: object, offsets: object) -> CheckpointRefused:
    if (
        not isinstance(shape, list)
        or len(shape) > MAX_DIMENSIONS
        or any(type(size) is not int or not 0 <= size < MAX_NUMBER for size in shape)
    ):
        hint = f"a shape is a list of at most {MAX_DIMENSIONS} whole numbers; {DAMAGED}"
        return refused(
            "E_HEADER_SHAPE", f"{path}: tensor `{name}` has the shape {reprlib.repr(shape)}", hint
        )
    message = f"{path}: tensor `{name}` is said to lie at {reprlib.repr(offsets)}"
    return refused(
        "E_HEADER_OFFSETS", message, f"offsets are two whole numbers, start and end; {DAMAGED}"
    )


def _check_tiling(
    path: Path, tensors: Mapping[str, TensorInfo], data_start: int, size: int
) -> None:
    end, before = data_start, None
    for tensor in sorted(tensors.values(), key=attrgetter("offset", "size_bytes")):
        if tensor.offset != end:
            code, what = (
                ("E_OVERLAP", "overlaps")
                if tensor.offset < end
                else ("E_HOLE", "leaves a hole after")
            )
            neighbour = f"`{before.name}`" if before else "the header"
            raise refused(
                code,
                f"{path}: tensor `{tensor.name}` at byte {tensor.offset:,} {what} {neighbour}, "
                f"which ends at {end:,}",
            )
        end, before = tensor.offset + tensor.size_bytes, tensor
    if end != size:
        raise refused(
            "E_TRAILING_BYTES",
            f"{path}: {size - end:,} bytes behind the last tensor belong to none",
        )
