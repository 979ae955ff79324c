"""The plan of a GGUF file: which tensors it has, of which types, and what its metadata says."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import gguf
import numpy as np
from torch import Tensor

from qtool.checkpoint.gguf_header import MAX_SPLITS
from qtool.checkpoint.gguf_types import BLOCKS, UNQUANTIZED
from qtool.conversion.gguf.config import ModelConfig
from qtool.conversion.gguf.holding import held_by
from qtool.conversion.gguf.names import architecture_of
from qtool.conversion.gguf.tensors import Assembly, Unit, assemble
from qtool.conversion.gguf.types import (
    FILE_TYPES,
    is_quantizable,
    tensor_type,
    with_fitting_blocks,
)
from qtool.conversion.gguf.vocabulary import describe_vocabulary
from qtool.conversion.request import ConversionRequest
from qtool.errors import UsageError
from qtool.formats.stored_layer import read_value
from qtool.weight import QuantizedWeight, with_one_scale

ALIGNMENT = 32
CODES = ("weight", "weight_packed", "qweight", "_blocks", "_weight_qdata")
"""The tensors of a layer that the choice of a type needs no data of."""
NEAREST = {2: "Q2_K", 3: "Q3_K", 4: "Q4_K", 5: "Q5_K", 6: "Q6_K"}
"""Bits of a layer's codes -> the type to round it to; Q8_0 for more."""


@dataclass(frozen=True)
class TypeChoice:
    """The type of a tensor, and how the source gets there."""

    type: str
    """As GGUF names it."""
    is_held: bool = False
    """Whether codes and scales of the source are kept."""
    rounds_scales: bool = False
    """Whether scales are rounded to 16 bits, while codes are kept."""


@dataclass(frozen=True)
class FilePosition:
    """Where the data of a tensor begins."""

    part: int
    """The number of its file, from 0."""
    offset: int
    """Bytes from the start of the data of that file."""


class _Allocator:
    """Puts tensors one after another, in files of at most ``limit`` bytes of data; a larger tensor
    gets a file of its own. None: in one file.
    """

    def __init__(self, limit: int | None) -> None:
        self.sizes = [0]
        """Bytes of the data of each file."""
        self._limit = limit

    def allocate(self, size: int) -> FilePosition:
        """Return where the next ``size`` bytes go."""
        offset = self.sizes[-1]
        if self._limit is not None and offset and offset + size > self._limit:
            self.sizes.append(0)
            offset = 0
        self.sizes[-1] = align(offset + size)
        return FilePosition(len(self.sizes) - 1, offset)


@dataclass(frozen=True, eq=False)
class PlannedTensor:
    """A tensor of the file."""

    assembly: Assembly
    choice: TypeChoice
    position: FilePosition

    @property
    def name(self) -> str:
        """In the file."""
        return self.assembly.name

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of a piece."""
        return row_bytes(self.choice.type, self.assembly.row_width)

    @property
    def size_bytes(self) -> int:
        """Bytes of its data."""
        return self.row_bytes * self.assembly.row_count


@dataclass(frozen=True)
class GgufPlan:
    """All that is decided before anything is written."""

    request: ConversionRequest
    config: ModelConfig
    tensors: tuple[PlannedTensor, ...]
    extra: Mapping[str, tuple[Tensor, FilePosition]]
    """Tensors that come from the config, f32, by name."""
    part_bytes: tuple[int, ...]
    """Bytes of the data of each file."""
    file_type: int
    notes: tuple[str, ...]
    """What the user should know."""

    @property
    def source_format(self) -> str | None:
        """The format of the source; None when it is not quantized."""
        return self.request.layout.format if self.request.layout else None

    @property
    def size_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(self.part_bytes)

    def paths(self, path: Path) -> list[Path]:
        """Return the files, with names as llama-gguf-split gives them where ``path`` is split."""
        count = len(self.part_bytes)
        if count == 1:
            return [path]
        stem = path.name.removesuffix(".gguf")
        return [
            path.with_name(f"{stem}-{part:05}-of-{count:05}.gguf") for part in range(1, count + 1)
        ]

    @cached_property
    def rounded(self) -> Mapping[str, str]:
        """The quantized layers of the source that get new codes -> their type."""
        return {
            unit.name: tensor.choice.type
            for tensor in self.tensors
            if not tensor.choice.is_held and tensor.choice.type not in UNQUANTIZED
            for unit in _units(tensor.assembly)
        }

    @property
    def layer_count(self) -> int:
        """How many matrices are quantized in the file."""
        return sum(
            len(tensor.assembly.pieces)
            for tensor in self.tensors
            if tensor.choice.type not in UNQUANTIZED
        )

    def writer(self) -> gguf.GGUFWriter:
        """Return what writes the headers: metadata, and where each tensor lies."""
        name = self.config.architecture.name
        values = self.config.values
        writer = gguf.GGUFWriter(None, name)
        writer.add_type("model")
        writer.add_name(self.request.checkpoint.name)
        writer.add_file_type(self.file_type)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        self.config.describe(writer)
        describe_vocabulary(
            writer,
            self.request.checkpoint,
            values["vocab_size"],
            is_gemma=self.config.architecture.is_gemma,
        )
        for tensor in self.tensors:
            shape, size = tensor.assembly.shape, tensor.size_bytes
            _add_info(writer, tensor.position, tensor.name, shape, tensor.choice.type, size)
        for key, (factors, position) in self.extra.items():
            _add_info(writer, position, key, tuple(factors.shape), "F32", factors.numel() * 4)
        return writer


def _add_info(
    writer: gguf.GGUFWriter,
    position: FilePosition,
    name: str,
    shape: tuple[int, ...],
    type: str,
    size_bytes: int,
) -> None:
    if position.part == len(writer.tensors):
        writer.tensors.append({})  # the next file
    writer.add_tensor_info(
        name,
        shape,
        np.dtype(np.float32),  # the shape is that of numbers, not of bytes
        size_bytes,
        gguf.GGMLQuantizationType[type],
    )


def plan_gguf(
    request: ConversionRequest, file_type: str | None, part_bytes: int | None = None
) -> GgufPlan:
    """Decide what the file holds, from headers, configs and the scales of quantized layers.

    Args:
        file_type: one of `types.FILE_TYPES`; None keeps every layer as it is.
        part_bytes: the most data of one file; None for one file.
    Raises: CheckpointRefused, for an architecture, a tokenizer, a config or a layer that GGUF
        cannot hold; UsageError, when it would be split into too many files.
    """
    checkpoint = request.checkpoint
    config = ModelConfig.of(checkpoint, architecture_of(checkpoint))
    found = assemble(checkpoint, request.layout, config)
    chooser = _Chooser(request, config, file_type)
    allocator = _Allocator(part_bytes)
    tensors = []
    for assembly in found.tensors:
        choice = chooser.choose(assembly)
        size = row_bytes(choice.type, assembly.row_width) * assembly.row_count
        tensors.append(PlannedTensor(assembly, choice, allocator.allocate(size)))
    extra = {
        name: (tensor, allocator.allocate(tensor.numel() * 4))
        for name, tensor in config.rope_tensors().items()
    }
    check_file_count(len(allocator.sizes))
    plan = GgufPlan(
        request=request,
        config=config,
        tensors=tuple(tensors),
        extra=extra,
        part_bytes=tuple(allocator.sizes),
        file_type=_file_type_number(file_type, tensors),
        notes=(
            *config.notes(),
            *(f"{count} tensors are left out: {why}" for why, count in found.left_out.items()),
            *_type_notes(tensors),
            *_activation_notes(request),
        ),
    )
    plan.writer()  # refuses what the tokenizer or the config has no words for
    return plan


def check_file_count(files: int) -> None:
    """Raise UsageError for more ``files`` of one model than qtool reads."""
    if files > MAX_SPLITS:
        raise UsageError(
            "E_SHARD_SIZE",
            f"--max-shard-size would split the file into {files:,}; the limit is {MAX_SPLITS:,}",
            hint="raise it, or leave it out for one file",
        )


class _Chooser:
    """Chooses the type of each tensor."""

    def __init__(
        self, request: ConversionRequest, config: ModelConfig, file_type: str | None
    ) -> None:
        self._request = request
        self._shape = config.shape
        self._file_type = file_type

    def choose(self, assembly: Assembly) -> TypeChoice:
        """Return the type of ``assembly``. Raises: CheckpointRefused, when there is none."""
        if not is_quantizable(assembly.name, len(assembly.shape)):
            return TypeChoice("F32")
        wanted = self._wanted(assembly)
        quantized = [unit for unit in _units(assembly) if unit.source.module]
        if not quantized:
            return TypeChoice(wanted or self._unquantized_type(assembly))
        if wanted in UNQUANTIZED:
            return TypeChoice(wanted)
        return self._choose_quantized(assembly, quantized, wanted)

    def _wanted(self, assembly: Assembly) -> str | None:
        """Return the type that the file type has for ``assembly``; None without a file type."""
        if self._file_type is None:
            return None
        return tensor_type(self._file_type, assembly.name, assembly.columns, self._shape)

    def _unquantized_type(self, assembly: Assembly) -> str:
        dtypes = {unit.source.tensors["weight"].dtype for unit in _units(assembly)}
        dtype = dtypes.pop() if len(dtypes) == 1 else "F32"
        return dtype if dtype in UNQUANTIZED else "F32"

    def _choose_quantized(
        self, assembly: Assembly, quantized: Sequence[Unit], wanted: str | None
    ) -> TypeChoice:
        reason = "layers: some of its experts are quantized and others are not"
        if len(quantized) == len(assembly.pieces):
            choice = self._holding(quantized, wanted)
            if isinstance(choice, TypeChoice):
                return choice
            reason = choice
        if not self._request.requantize:
            raise self._request.cannot_hold(
                f"`{quantized[0].name}`: {reason}",
                "--requantize rounds such layers to the nearest type",
            )
        bits = max(
            unit.source.module.scheme.weights.bits for unit in quantized if unit.source.module
        )
        nearest = wanted or with_fitting_blocks(NEAREST.get(bits, "Q8_0"), assembly.columns)
        return TypeChoice(nearest)

    def _holding(self, units: Sequence[Unit], wanted: str | None) -> TypeChoice | str:
        """Return the type that holds the codes of all of ``units``; else why none does.

        Args:
            units: quantized layers that become one tensor.
            wanted: what the file type has for it; None for any type.
        """
        accepted = {wanted, FILE_TYPES[self._file_type][1]} if self._file_type else None
        reason = ""
        for rounds_scales in (False, True) if self._request.requantize else (False,):
            held, reason = self._held_by_all(units, rounds_scales=rounds_scales)
            fitting = [type for type in held if accepted is None or type in accepted]
            if fitting:
                return TypeChoice(fitting[0], is_held=True, rounds_scales=rounds_scales)
            if held:
                reason = f"type: {held[0]} holds it, and {wanted} does not"
        return reason

    def _held_by_all(self, units: Sequence[Unit], *, rounds_scales: bool) -> tuple[list[str], str]:
        """Return the types that hold all of ``units``, the smallest first, and else a reason."""
        found = [self._held(unit, rounds_scales=rounds_scales) for unit in units]
        common = [type for type in found[0][0] if all(type in held for held, _ in found)]
        reasons = [reason for held, reason in found if not held]
        return common, reasons[0] if reasons else "its experts need different types"

    def _held(self, unit: Unit, *, rounds_scales: bool) -> tuple[list[str], str]:
        module = unit.source.module
        assert module is not None
        if unit.is_blocks:
            return [module.variant], f"type: it is {module.variant}"
        codes = {tensor.name for suffix, tensor in unit.source.tensors.items() if suffix in CODES}
        value = read_value(
            self._request.checkpoint, self._request.layout, unit.source, skipped=codes
        )
        assert isinstance(value, QuantizedWeight)
        return held_by(
            with_one_scale(value), module.scheme.weights.bits, rounds_scales=rounds_scales
        )


def row_bytes(type: str, columns: int) -> int:
    """Return the bytes of a row of ``columns`` numbers of ``type``."""
    numbers, size_bytes = BLOCKS[type]
    return columns // numbers * size_bytes


def _units(assembly: Assembly) -> list[Unit]:
    return [piece.unit for piece in assembly.pieces]


def align(size: int) -> int:
    """Return where the next tensor begins, ``size`` bytes after the start."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def _file_type_number(file_type: str | None, tensors: Sequence[PlannedTensor]) -> int:
    """Return ``general.file_type``: of the type of most numbers, where none was asked for."""
    if file_type:
        return FILE_TYPES[file_type][0]
    counts: Counter[str] = Counter()
    for tensor in tensors:
        counts[tensor.choice.type] += tensor.assembly.count
    most = counts.most_common(1)[0][0]
    return next(number for number, base in FILE_TYPES.values() if base == most)


def _type_notes(tensors: Sequence[PlannedTensor]) -> Iterator[str]:
    kinds: dict[str, Counter[str]] = {}
    for tensor in tensors:
        if len(tensor.assembly.shape) > 1:
            kinds.setdefault(_kind(tensor), Counter())[tensor.choice.type] += 1
    for kind, counts in kinds.items():
        shown = ", ".join(f"{count} tensors {type}" for type, count in counts.most_common())
        yield f"{kind}: {shown}"


def _kind(tensor: PlannedTensor) -> str:
    choice = tensor.choice
    if choice.rounds_scales:
        return "codes kept, scales rounded to 16 bits"
    if choice.is_held:
        return "kept as they are"
    return "not quantized" if choice.type in UNQUANTIZED else "rounded"


def _activation_notes(request: ConversionRequest) -> Iterator[str]:
    modules = request.layout.modules.values() if request.layout else ()
    counts = Counter(
        str(module.scheme.activations) for module in modules if module.scheme.activations
    )
    for activations, count in counts.items():
        yield f"inputs of {count} layers: {activations} -> as llama.cpp rounds them"
