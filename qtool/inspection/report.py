"""What `inspect` returns: formats, schemes, bits and bytes, read from the headers alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from qtool import formats
from qtool.architecture import check_model_and_mtp
from qtool.checkpoint import Checkpoint, TensorInfo
from qtool.checkpoint.expert_tokens import ExpertTokens, read_expert_tokens
from qtool.checkpoint.manifest import ManifestCheck, check_manifest, has_manifest
from qtool.checkpoint.model import FLOAT_DTYPES
from qtool.checkpoint.part_costs import PartCost, read_part_costs
from qtool.errors import ANY_FILE, CheckpointRefused, file_errors
from qtool.formats import Layout, QuantizedModule
from qtool.inspection.comparison import Comparison, compare
from qtool.inspection.deep import DeepReport, measure
from qtool.inspection.engines import EngineReport, check_engine
from qtool.modules import is_cache_tensor, is_linear, last_part, layer_number, skip_reason

T = TypeVar("T")


@dataclass(frozen=True)
class Row:
    """Modules of one kind (the last part of their names) stored in one way."""

    kind: str
    scheme: str
    """Name of a scheme, or a dtype."""
    count: int
    parameters: int
    size_bytes: int

    @property
    def bits_per_weight(self) -> float:
        """Stored bits of one parameter, with its share of scales and zero points."""
        return _bits_per_weight(self.size_bytes, self.parameters)


@dataclass(frozen=True)
class Module:
    """One linear layer of N outputs and K inputs."""

    name: str
    kind: str
    """The last part of its name."""
    layer: int | None
    scheme: str | None
    """None when it is left in 16 bits."""
    reason: str
    """Why it is left in 16 bits; empty when it is quantized or its name does not tell."""
    shape: tuple[int, int]
    """[N, K]."""
    parameters: int
    size_bytes: int

    @property
    def bits_per_weight(self) -> float:
        """Stored bits of one parameter, with its share of scales and zero points."""
        return _bits_per_weight(self.size_bytes, self.parameters)


@dataclass(frozen=True)
class Inspection:
    """A checkpoint in numbers."""

    name: str
    architecture: str
    format: str | None
    """None when the checkpoint is not quantized."""
    parameters: int
    size_bytes: int
    unquantized_bytes: int
    """Size of the same parameters in 16 bits."""
    quantized: tuple[Row, ...]
    """The largest first."""
    unquantized: tuple[Row, ...]
    """The largest first."""
    modules: tuple[Module, ...]
    """Every linear layer, in the order of the headers."""
    kv_cache: str | None
    tied_embeddings: bool
    warnings: tuple[str, ...]
    deep: DeepReport | None = None
    """The numbers of the data, when asked for."""
    manifest: ManifestCheck | None = None
    """The comparison of the files with the manifest, when they were read and there is one."""
    against: Comparison | None = None
    """The comparison with another checkpoint, when asked for."""
    bad_values: tuple[str, ...] = ()
    """Values that no weight or scale may have, when the data was read: a sentence each."""
    engine: EngineReport | None = None
    """Whether an engine loads the checkpoint, when asked for."""
    expert_tokens: ExpertTokens | None = None
    """The calibration tokens that each expert got, by the manifest."""
    by_layer: tuple[PartCost, ...] = ()
    """What each part costs by itself, worst first, by the manifest."""

    @property
    def damage(self) -> tuple[str, ...]:
        """Why the checkpoint must not be used: bad values, and files that differ from the
        manifest.
        """
        return (*self.bad_values, *(self.manifest.differences() if self.manifest else ()))

    @property
    def bits_per_weight(self) -> float:
        """Stored bits of one parameter of the whole checkpoint."""
        return _bits_per_weight(self.size_bytes, self.parameters)

    def to_dict(self) -> dict[str, object]:
        """Return everything as plain data, for ``--json``."""
        return {
            "name": self.name,
            "architecture": self.architecture,
            "format": self.format,
            "parameters": self.parameters,
            "size_bytes": self.size_bytes,
            "plain_bytes": self.unquantized_bytes,
            "quantized": _dicts(self.quantized),
            "plain": _dicts(self.unquantized),
            "modules": _dicts(self.modules),
            "kv_cache": self.kv_cache,
            "tied_embeddings": self.tied_embeddings,
            "warnings": list(self.warnings),
            "deep": self.deep.to_dict() if self.deep else None,
            "manifest": self.manifest.to_dict() if self.manifest else None,
            "damage": list(self.damage),
            "against": self.against.to_dict() if self.against else None,
            "engine": self.engine.to_dict() if self.engine else None,
            "expert_tokens": self.expert_tokens.counts if self.expert_tokens else None,
            "by_layer": [vars(each) for each in self.by_layer],
            "bits_per_weight": round(self.bits_per_weight, 4),
        }


def _bits_per_weight(size_bytes: int, parameters: int) -> float:
    return size_bytes * 8 / parameters if parameters else 0.0


def _dicts(rows: Iterable[Row | Module]) -> list[dict[str, object]]:
    return [{**vars(row), "bits_per_weight": round(row.bits_per_weight, 4)} for row in rows]


@file_errors(reading=[ANY_FILE])
def inspect(
    checkpoint: Checkpoint,
    *,
    deep: bool = False,
    verify: bool = False,
    against: Checkpoint | None = None,
    engine: str | None = None,
    engine_version: str | None = None,
    gpu: str | None = None,
    tensor_parallel: int = 1,
) -> Inspection:
    """Return what ``checkpoint`` holds, from its headers alone, and what else is asked for.

    Args:
        checkpoint: the checkpoint to inspect.
        deep: read all data; NaN, infinity, impossible scales and files that differ from the
            manifest, if there is one, are damage.
        verify: compare every file with the manifest, which must be there.
        against: a checkpoint to compare each linear layer with.
        engine: the engine to check whether ``checkpoint`` loads in.
        engine_version: of ``engine``; None for the version that its rules were read in.
        gpu: that ``engine`` runs on.
        tensor_parallel: ranks of ``engine``.
    Raises: CheckpointRefused, when config and tensors contradict each other or the format is
        unknown.
    """
    layout, warnings = _detect(checkpoint, engine_may_know=engine is not None)
    mtp_problem = check_model_and_mtp(checkpoint, layout, deep=deep)
    modules = tuple(_modules(checkpoint, layout.modules if layout else {}))
    quantized = _quantized_rows(modules)
    unquantized = _unquantized_rows(checkpoint, layout)
    measured, compared = None, None
    bad_values: list[str] = []
    if deep:
        bad_values = formats.check_values(checkpoint, layout)
        measured, compared = measure(checkpoint, layout)
    if verify and compared is None:
        compared = check_manifest(checkpoint.published_folder)
    engine_report = None
    if engine:
        engine_report = check_engine(
            checkpoint,
            layout,
            engine,
            version=engine_version,
            gpu=gpu,
            tensor_parallel=tensor_parallel,
        )
    expert_tokens = _of_manifest(checkpoint, read_expert_tokens, warnings)
    by_layer = _of_manifest(checkpoint, read_part_costs, warnings) or ()
    parameters = sum(row.parameters for row in (*quantized, *unquantized))
    return Inspection(
        name=checkpoint.name,
        architecture=_architecture(checkpoint),
        format=layout.format if layout else None,
        parameters=parameters,
        size_bytes=checkpoint.size_bytes,
        unquantized_bytes=2 * parameters,
        quantized=quantized,
        unquantized=unquantized,
        modules=modules,
        kv_cache=layout.kv_cache if layout else None,
        tied_embeddings=checkpoint.tied_embeddings,
        warnings=(*checkpoint.notes, *warnings, *filter(None, [mtp_problem])),
        deep=measured,
        manifest=compared,
        bad_values=tuple(bad_values),
        against=compare(checkpoint, against) if against else None,
        engine=engine_report,
        expert_tokens=expert_tokens,
        by_layer=by_layer,
    )


def _detect(checkpoint: Checkpoint, *, engine_may_know: bool) -> tuple[Layout | None, list[str]]:
    """Return the layout and its warnings.

    With ``engine_may_know``, a format that qtool does not read is a warning: the engine may read
    it.
    """
    try:
        layout = formats.detect(checkpoint)
    except CheckpointRefused as error:
        if error.code not in formats.NOT_READ or not engine_may_know:
            raise
        return None, [error.message]
    return layout, list(layout.warnings) if layout else []


def _of_manifest(
    checkpoint: Checkpoint, read: Callable[[Path], T], warnings: list[str]
) -> T | None:
    """Return what ``read`` finds in the manifest, if there is one; that it cannot be read is one of
    ``warnings``.
    """
    if not has_manifest(checkpoint.published_folder):
        return None
    try:
        return read(checkpoint.published_folder)
    except CheckpointRefused as error:
        if error.message not in warnings:
            warnings.append(error.message)
        return None


def _architecture(checkpoint: Checkpoint) -> str:
    names = checkpoint.config.get("architectures")
    return ", ".join(names or [str(checkpoint.config.get("model_type", "unknown"))])


def _quantized_rows(modules: Iterable[Module]) -> tuple[Row, ...]:
    return _rows(
        (module.kind, module.scheme, module.parameters, module.size_bytes)
        for module in modules
        if module.scheme
    )


def _unquantized_rows(checkpoint: Checkpoint, layout: Layout | None) -> tuple[Row, ...]:
    owned = layout.owned if layout else frozenset()
    return _rows(
        _unquantized(tensor) for tensor in checkpoint.tensors.values() if tensor.name not in owned
    )


def _modules(checkpoint: Checkpoint, quantized: Mapping[str, QuantizedModule]) -> Iterator[Module]:
    """Yield every linear layer in the order of the headers, quantized or not."""
    by_tensor = {next(iter(module.tensors.values())).name: module for module in quantized.values()}
    for name, tensor in checkpoint.tensors.items():
        owner = name.removesuffix(".weight")
        if module := by_tensor.get(name):
            yield _quantized_module(module, layer_number(name))
        elif owner != name and owner not in quantized and is_linear(tensor):
            yield Module(
                name=owner,
                kind=last_part(owner),
                layer=layer_number(name),
                scheme=None,
                reason=skip_reason(checkpoint, owner),
                shape=(tensor.shape[0], tensor.shape[1]),
                parameters=tensor.count,
                size_bytes=tensor.size_bytes,
            )


def _quantized_module(module: QuantizedModule, layer: int | None) -> Module:
    rows, columns = module.shape
    bias = module.tensors.get("bias")
    return Module(
        name=module.name,
        kind=last_part(module.name),
        layer=layer,
        scheme=module.scheme.name,
        reason="",
        shape=module.shape,
        parameters=rows * columns + (bias.count if bias else 0),
        size_bytes=module.size_bytes,
    )


def _unquantized(tensor: TensorInfo) -> tuple[str, str, int, int]:
    """Return kind, dtype, parameters and bytes; scales hold no parameters."""
    owner, _, suffix = tensor.name.rpartition(".")
    if tensor.dtype in FLOAT_DTYPES and not is_cache_tensor(tensor.name):
        return last_part(owner), tensor.dtype, tensor.count, tensor.size_bytes
    return suffix, tensor.dtype, 0, tensor.size_bytes


def _rows(items: Iterable[tuple[str, str, int, int]]) -> tuple[Row, ...]:
    sums: dict[tuple[str, str], list[int]] = {}
    for kind, scheme, parameters, size_bytes in items:
        row = sums.setdefault((kind, scheme), [0, 0, 0])
        row[0] += 1
        row[1] += parameters
        row[2] += size_bytes
    rows = (Row(kind, scheme, *numbers) for (kind, scheme), numbers in sums.items())
    return tuple(sorted(rows, key=lambda row: (-row.size_bytes, row.kind, row.scheme)))
