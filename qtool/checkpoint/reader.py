"""Open a checkpoint folder from its headers alone: bounded, checked, without torch, and never a pickle.

Source of the file format: https://github.com/huggingface/safetensors, section "Format".
"""

from __future__ import annotations

import json
import math
import reprlib
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from qtool.errors import CheckpointRefused

DTYPE_BITS: Mapping[str, int] = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "F64": 64,
    "I64": 64,
    "U64": 64,
    "C64": 64,
}
FLOAT_DTYPES = frozenset({"F16", "BF16", "F32", "F64"})

MAX_JSON_BYTES = 32 << 20  # the largest header and index of a public model are below 15 MB
MAX_DIMENSIONS = 16
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor as its header describes it; ``offset`` counts bytes from the start of ``file``."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    size_bytes: int

    @property
    def count(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Checkpoint:
    """A model folder whose headers were read and found consistent. No weight has been read."""

    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]

    @property
    def name(self) -> str:
        """The model's name, as default outputs use it: the folder's, or in the Hub's cache the repository's."""
        folder = self.path.resolve()
        repository = folder.parent.parent.name
        if folder.parent.name == "snapshots" and repository.startswith("models--"):
            return repository.rpartition("--")[2]
        return folder.name

    @cached_property
    def weight_files(self) -> tuple[Path, ...]:
        """The safetensors files, in name order."""
        return tuple(sorted({tensor.file for tensor in self.tensors.values()}))

    @cached_property
    def size_bytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(tensor.size_bytes for tensor in self.tensors.values())

    @property
    def text_config(self) -> Mapping[str, Any]:
        """The part of the config that describes the language model (multimodal configs nest it)."""
        for key in ("text_config", "llm_config"):
            if isinstance(self.config.get(key), Mapping):
                return self.config[key]  # type: ignore[no-any-return]
        return self.config

    @property
    def tied_embeddings(self) -> bool:
        """Whether ``lm_head`` is the embedding matrix: as the config says, else when there is no tensor of its own (some classes tie by default)."""
        said = self.config.get("tie_word_embeddings", self.text_config.get("tie_word_embeddings"))
        return bool(said) if said is not None else "lm_head.weight" not in self.tensors

    @property
    def quantization_config(self) -> Mapping[str, Any] | None:
        """What the checkpoint says about its quantization, wherever it says it; None for a plain model."""
        for config in (self.config, self.text_config):
            for key in ("quantization_config", "compression_config"):
                if isinstance(config.get(key), Mapping):
                    return config[key]  # type: ignore[no-any-return]
        for name in ("hf_quant_config.json", "quantize_config.json", "quant_config.json"):
            if (self.path / name).is_file():
                return read_json(self.path / name)
        return None

    def read(self, name: str) -> bytes:
        """Return the bytes of tensor ``name`` as they lie in the file, little-endian, row-major."""
        tensor = self.tensors[name]
        with tensor.file.open("rb") as file:
            file.seek(tensor.offset)
            return file.read(tensor.size_bytes)


def open_checkpoint(path: Path) -> Checkpoint:
    """Read config, index and every safetensors header below ``path``.

    Raises: CheckpointRefused, naming the file, the tensor and the numbers that do not fit.
    """
    try:
        if not path.exists():
            raise _refused("E_NO_MODEL", f"{path}: no such folder", "give a checkpoint folder or a Hub name such as `org/model`")
        if not path.is_dir():
            raise _refused("E_NOT_A_MODEL", f"{path} is a file, not a model folder", "give the folder that holds config.json")
        config_file = path / "config.json"
        if not config_file.exists():
            raise _refused("E_NOT_A_MODEL", f"{path}: no config.json, so this is not a model folder", "give the folder that holds config.json")
        return Checkpoint(path, read_json(config_file), _read_tensors(path))
    except OSError as error:
        raise _refused(
            "E_UNREADABLE", f"{error.filename or path} cannot be read: {error.strerror}", "check its name, its permissions and the disk"
        ) from None


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in ``path``, refusing what is too large, too deep, repeated or not an object."""
    _check_regular(path)
    size = path.stat().st_size
    if size > MAX_JSON_BYTES:
        raise _refused("E_JSON", f"{path}: {size:,} bytes of JSON; the limit is {MAX_JSON_BYTES:,}")
    return _parse_object(path.read_bytes(), str(path))


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Return the tensors that the safetensors file ``path`` declares, after checking every number against the file."""
    _check_regular(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        _check_looks_like_safetensors(path, start, size)
        length = int.from_bytes(start, "little")
        header = _parse_object(file.read(length), f"{path}: header")
    header.pop("__metadata__", None)
    data_start = 8 + length
    tensors = {name: _tensor_info(path, name, entry, data_start, size - data_start) for name, entry in header.items()}
    _check_tiling(path, tensors, data_start, size)
    return tensors


def _read_tensors(path: Path) -> dict[str, TensorInfo]:
    single, index_file = path / "model.safetensors", path / "model.safetensors.index.json"
    if single.exists():  # transformers takes it first; others beside it are not part of the model (e.g. consolidated.safetensors)
        return _merge({single: read_header(single)})
    if index_file.exists():
        return _read_indexed(path, index_file)
    files = sorted(file for file in path.glob("*.safetensors") if not file.name.startswith("."))
    if not files:
        pickles = sorted(file.name for file in path.iterdir() if file.suffix in PICKLE_SUFFIXES)
        if pickles:
            message = f"{path}: the weights are pickle files ({', '.join(pickles[:3])}), which qtool never opens"
            raise _refused("E_PICKLE", message, "convert them to safetensors first, or take a revision that has them")
        raise _refused("E_NO_WEIGHTS", f"{path}: no safetensors file", "is the download complete? Pickle files are never taken, and never downloaded")
    return _merge({file: read_header(file) for file in files})


def _read_indexed(path: Path, index_file: Path) -> dict[str, TensorInfo]:
    weight_map = read_json(index_file).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise _refused("E_INDEX", f"{index_file}: `weight_map` is missing or empty")
    shards: dict[str, dict[str, TensorInfo]] = {}
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
            message = f"{index_file}: tensor `{tensor}` is said to be in {reprlib.repr(shard)}, which is not a safetensors file of this folder"
            raise _refused("E_INDEX", message)
        if shard not in shards:
            if not (path / shard).exists():
                raise _refused("E_MISSING_SHARD", f"{path / shard} is named by the index and missing", "download or copy it again")
            shards[shard] = read_header(path / shard)
        if tensor not in shards[shard]:
            raise _refused("E_INDEX", f"{index_file}: tensor `{tensor}` is not in {shard}, where the index puts it")
    return _merge({path / shard: tensors for shard, tensors in shards.items()})


def _merge(by_file: Mapping[Path, Mapping[str, TensorInfo]]) -> dict[str, TensorInfo]:
    merged: dict[str, TensorInfo] = {}
    for file, tensors in by_file.items():
        for name, tensor in tensors.items():
            if name in merged:
                raise _refused("E_DUPLICATE", f"tensor `{name}` is in {merged[name].file.name} and in {file.name}")
            merged[name] = tensor
    if not merged:
        raise _refused("E_NO_WEIGHTS", f"{', '.join(file.name for file in by_file)}: no tensor inside")
    return merged


def _check_regular(path: Path) -> None:
    if not path.exists():
        raise _refused("E_MISSING_FILE", f"{path} is missing")
    if not stat.S_ISREG(path.stat().st_mode):
        raise _refused("E_NOT_A_FILE", f"{path} is not a regular file")


def _check_looks_like_safetensors(path: Path, start: bytes, size: int) -> None:
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length < 2 or 8 + length > size:  # only then can it be text: letters make a length beyond any file
        if start.startswith(b"version "):
            raise _refused("E_LFS_POINTER", f"{path} is a Git LFS pointer, not the weights", "run `git lfs pull` in the folder, or download again")
        if start.lstrip()[:1] == b"<":
            raise _refused("E_NOT_SAFETENSORS", f"{path} is an HTML page, not a safetensors file", "the download failed: fetch it again")
        message = f"{path}: a header of {length:,} bytes is declared in a file of {size:,} bytes"
        raise _refused("E_HEADER", message, "the file is truncated or is not safetensors: download it again")
    if length > MAX_JSON_BYTES:
        raise _refused("E_HEADER", f"{path}: a header of {length:,} bytes; the limit is {MAX_JSON_BYTES:,}")


def _tensor_info(path: Path, name: str, entry: Any, data_start: int, data_size: int) -> TensorInfo:
    if not name.isprintable():
        raise _refused("E_HEADER", f"{path}: a tensor is called {reprlib.repr(name)}")
    if not isinstance(entry, dict):
        raise _refused("E_HEADER", f"{path}: tensor `{name}` is described by {reprlib.repr(entry)}")
    dtype: Any = entry.get("dtype")
    shape: Any = entry.get("shape")
    offsets: Any = entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise _refused("E_HEADER", f"{path}: tensor `{name}` has the unknown dtype {reprlib.repr(dtype)}")
    if not _all_counts(shape) or len(shape) > MAX_DIMENSIONS:
        raise _refused("E_HEADER", f"{path}: tensor `{name}` has the shape {reprlib.repr(shape)}")
    if not _all_counts(offsets) or len(offsets) != 2 or not offsets[0] <= offsets[1] <= data_size:
        raise _refused("E_HEADER", f"{path}: tensor `{name}` is said to lie at {reprlib.repr(offsets)} in {data_size:,} bytes of data")
    size_bytes = offsets[1] - offsets[0]
    expected = math.ceil(math.prod(shape) * DTYPE_BITS[dtype] / 8)
    if size_bytes != expected:
        raise _refused("E_HEADER", f"{path}: tensor `{name}`, {dtype} {shape}, needs {expected:,} bytes and is given {size_bytes:,}")
    return TensorInfo(name, dtype, tuple(shape), path, data_start + offsets[0], size_bytes)


def _all_counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 62 for item in value)


def _check_tiling(path: Path, tensors: Mapping[str, TensorInfo], data_start: int, size: int) -> None:
    end, before = data_start, "the header"
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.offset, tensor.size_bytes)):
        if tensor.offset != end:
            what = "overlaps" if tensor.offset < end else "leaves a hole after"
            raise _refused("E_LAYOUT", f"{path}: tensor `{tensor.name}` at byte {tensor.offset:,} {what} {before}, which ends at {end:,}")
        end, before = tensor.offset + tensor.size_bytes, f"`{tensor.name}`"
    if end != size:
        raise _refused("E_LAYOUT", f"{path}: {size - end:,} bytes behind the last tensor belong to none")


def _parse_object(data: bytes, where: str) -> dict[str, Any]:
    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            seen: set[str] = set()
            repeated = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise _refused("E_JSON", f"{where}: the key `{repeated}` appears twice")
        return result

    try:
        value = json.loads(data.decode(), object_pairs_hook=no_duplicates)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise _refused("E_JSON", f"{where}: not JSON ({reason})") from None
    if not isinstance(value, dict):
        raise _refused("E_JSON", f"{where}: a JSON object is expected, found {type(value).__name__}")
    return value


def _refused(code: str, message: str, hint: str = "the file is damaged or was changed: download or copy it again") -> CheckpointRefused:
    return CheckpointRefused(code, message, hint=hint)
