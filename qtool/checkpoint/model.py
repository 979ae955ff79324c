"""What a checkpoint is once its headers were read: `Checkpoint` and its `TensorInfo`s."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from qtool.checkpoint.arrangement import Arrangement
from qtool.checkpoint.gguf_types import QUANTIZED
from qtool.checkpoint.strict_json import Json, read_json
from qtool.errors import naming

INDEX = "model.safetensors.index.json"

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
GGUF_ENDING = re.compile(r"(-\d{5}-of-\d{5})?\.gguf$")
FLOAT_DTYPES = frozenset({"F16", "BF16", "F32", "F64"})


# made faster than a dataclass, and there may be a quarter of a million
class TensorInfo(NamedTuple):
    """One tensor as its header describes it."""

    name: str
    dtype: str
    """As safetensors writes it, e.g. ``BF16``; of blocks as GGUF does, e.g. ``Q4_K``."""
    shape: tuple[int, ...]
    file: Path
    offset: int
    """Bytes from the start of ``file``."""
    size_bytes: int
    arrangement: Arrangement | None = None
    """How its bytes follow from those in the file, where they are others."""

    @property
    def is_blocks(self) -> bool:
        """Whether it holds blocks of a quantized type of GGUF, each with its scales."""
        return self.dtype in QUANTIZED

    @property
    def count(self) -> int:  # type: ignore[override]
        """Number of elements."""
        return math.prod(self.shape)

    def read(self) -> bytes:
        """Return its bytes, little-endian, row-major."""
        data = b"".join(_read_at(*part) for part in self.byte_ranges)
        return self.arrangement.apply(data, self.shape) if self.arrangement else data

    @property
    def byte_ranges(self) -> tuple[tuple[Path, int, int], ...]:
        """Where its bytes lie: file, offset and size of each part."""
        if self.arrangement is None:
            return ((self.file, self.offset, self.size_bytes),)
        if self.arrangement.other is None:
            return ((self.file, self.offset, self.size_bytes * self.arrangement.part[1]),)
        half = self.size_bytes // 2
        return (self.file, self.offset, half), (*self.arrangement.other, half)


def _read_at(path: Path, offset: int, size: int) -> bytes:
    with naming(path), path.open("rb") as file:
        file.seek(offset)
        return file.read(size)


@dataclass(frozen=True)
class Checkpoint:
    """A model whose headers were read and found consistent. No weight has been read."""

    path: Path
    """The folder with its config and tokenizer; of a GGUF file a temporary one."""
    config: Json
    """What config.json holds."""
    tensors: Mapping[str, TensorInfo]
    gguf_file: Path | None = None
    """The GGUF file that all of it comes from, of a split model the first."""
    expert_stacks: tuple[str, ...] = ()
    """The quantized stacks of experts in its files, which `tensors` has expert by expert."""
    notes: tuple[str, ...] = ()
    """What the user should know of what was read, a line each."""

    @property
    def source(self) -> Path:
        """Where it lies: the folder, or the GGUF file."""
        return self.gguf_file or self.path

    def origin(self, name: str) -> Path:
        """Return the file that the file ``name`` of its folder comes from: itself, or the GGUF
        file.
        """
        return self.gguf_file or self.path / name

    @property
    def published_folder(self) -> Path:
        """The folder that its manifest and its card are in, if it has them."""
        return self.gguf_file.parent if self.gguf_file else self.path

    @property
    def name(self) -> str:
        """The model's name, as default outputs use it: the folder's, in the Hub's cache the
        repository's; the GGUF file's without its ending.
        """
        if self.gguf_file:
            return GGUF_ENDING.sub("", self.gguf_file.name) or "model"
        return (self.hub_name or self.path.resolve().name).rpartition("/")[2]

    @property
    def hub_name(self) -> str | None:
        """The model's name on the Hub, when it lies in the Hub's cache."""
        folder = self.path.resolve()
        repository = folder.parent.parent.name
        if folder.parent.name == "snapshots" and repository.startswith("models--"):
            return repository.removeprefix("models--").replace("--", "/", 1)
        return None

    @cached_property
    def weight_files(self) -> tuple[Path, ...]:
        """The safetensors or GGUF files, in name order."""
        parts = (part for tensor in self.tensors.values() for part in tensor.byte_ranges)
        return tuple(sorted({file for file, _, _ in parts}))

    @cached_property
    def size_bytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(tensor.size_bytes for tensor in self.tensors.values())

    @cached_property
    def text_config(self) -> Json:
        """The part of the config that describes the language model (multimodal configs nest it)."""
        for key in ("text_config", "llm_config"):
            if isinstance(self.config.get(key), Mapping):
                return self.config[key]  # type: ignore[no-any-return]
        return self.config

    @property
    def tied_embeddings(self) -> bool:
        """Whether ``lm_head`` is the embedding matrix: as the config says, else when there is no
        tensor of its own (some classes tie by default).
        """
        said = self.config.get("tie_word_embeddings", self.text_config.get("tie_word_embeddings"))
        return bool(said) if said is not None else "lm_head.weight" not in self.tensors

    @property
    def quantization_config(self) -> Json | None:
        """What the checkpoint says about its quantization, wherever it says it; None for a plain
        model.
        """
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
        return self.tensors[name].read()
