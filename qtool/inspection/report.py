"""What is inside a checkpoint, from its headers alone: formats, schemes, bits, bytes, what stayed in 16 bits, and what does not fit together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from qtool import formats
from qtool.checkpoint import Checkpoint, TensorInfo
from qtool.checkpoint.reader import FLOAT_DTYPES
from qtool.formats import QuantizedModule
from qtool.formats.layout import CACHE_SUFFIXES
from qtool.inspection.comparison import Comparison, compare
from qtool.inspection.deep import DeepReport, measure
from qtool.inspection.engines import EngineReport, check_engine
from qtool.plan import is_linear, why_plain

SCALE_SUFFIXES = (*CACHE_SUFFIXES, "output_scale")  # the last is what old compressed-tensors wrote for the KV cache


@dataclass(frozen=True)
class Row:
    """Modules of one kind (the last part of their names) stored in one way."""

    kind: str
    scheme: str
    count: int
    parameters: int
    size_bytes: int

    @property
    def bits_per_weight(self) -> float:
        """Stored bits of one parameter, with its share of scales and zero points."""
        return self.size_bytes * 8 / self.parameters if self.parameters else 0.0


@dataclass(frozen=True)
class Module:
    """One linear layer of N outputs and K inputs: its scheme, or None and the ``reason`` it is left in 16 bits."""

    name: str
    kind: str
    layer: int | None
    scheme: str | None
    reason: str
    shape: tuple[int, int]
    parameters: int
    size_bytes: int

    @property
    def bits_per_weight(self) -> float:
        """Stored bits of one parameter, with its share of scales and zero points."""
        return self.size_bytes * 8 / self.parameters if self.parameters else 0.0


@dataclass(frozen=True)
class Inspection:
    """A checkpoint in numbers; ``quantized`` and ``plain`` are sorted by bytes, the largest first, ``modules`` as the headers have them.

    ``plain_bytes`` is the size that the same parameters have in 16 bits. ``deep``, ``against`` and ``engine`` are there when they were asked for.
    """

    name: str
    architecture: str
    format: str | None
    parameters: int
    size_bytes: int
    plain_bytes: int
    quantized: tuple[Row, ...]
    plain: tuple[Row, ...]
    modules: tuple[Module, ...]
    kv_cache: str | None
    tied_embeddings: bool
    warnings: tuple[str, ...]
    deep: DeepReport | None = None
    against: Comparison | None = None
    engine: EngineReport | None = None

    @property
    def bits_per_weight(self) -> float:
        """Stored bits of one parameter of the whole checkpoint."""
        return self.size_bytes * 8 / self.parameters if self.parameters else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain data, for ``--json``."""
        rows = {
            kind: [{**asdict(row), "bits_per_weight": round(row.bits_per_weight, 4)} for row in getattr(self, kind)]
            for kind in ("quantized", "plain", "modules")
        }
        return {**asdict(self), "bits_per_weight": round(self.bits_per_weight, 4), **rows, "warnings": list(self.warnings)}


def inspect(
    checkpoint: Checkpoint,
    *,
    deep: bool = False,
    against: Checkpoint | None = None,
    engine: str | None = None,
    engine_version: str | None = None,
    gpu: str | None = None,
    tensor_parallel: int = 1,
) -> Inspection:
    """Return what ``checkpoint`` holds, from its headers alone, and what else is asked for.

    ``deep`` reads all data and warns of what is NaN, infinite, a bad scale, or another file than the manifest has; ``against`` compares each linear
    layer with that checkpoint's; ``engine`` tells whether it will load there, on ``gpu`` and cut in ``tensor_parallel`` parts.

    Raises: CheckpointRefused, when config and tensors contradict each other or the format is unknown.
    """
    layout = formats.detect(checkpoint)
    modules: Mapping[str, QuantizedModule] = layout.modules if layout else {}
    quantized = _rows((_kind(module.name), module.scheme.name, *_size(module)) for module in modules.values())
    owned = layout.owned if layout else frozenset()
    plain = _rows(_plain(tensor) for tensor in checkpoint.tensors.values() if tensor.name not in owned)
    warnings = list(layout.warnings) if layout else []
    measured = None
    if deep:
        warnings += formats.check_values(checkpoint, layout)
        measured = measure(checkpoint, layout)
        warnings += [f"{name} is not the file that the manifest describes" for name in measured.changed]
    parameters = sum(row.parameters for row in (*quantized, *plain))
    return Inspection(
        name=checkpoint.name,
        architecture=", ".join(checkpoint.config.get("architectures") or [str(checkpoint.config.get("model_type", "unknown"))]),
        format=layout.format if layout else None,
        parameters=parameters,
        size_bytes=checkpoint.size_bytes,
        plain_bytes=2 * parameters,
        quantized=quantized,
        plain=plain,
        modules=tuple(_modules(checkpoint, modules)),
        kv_cache=layout.kv_cache if layout else None,
        tied_embeddings=checkpoint.tied_embeddings,
        warnings=tuple(warnings),
        deep=measured,
        against=compare(checkpoint, against) if against else None,
        engine=check_engine(checkpoint, layout, engine, version=engine_version, gpu=gpu, tensor_parallel=tensor_parallel) if engine else None,
    )


def _modules(checkpoint: Checkpoint, quantized: Mapping[str, QuantizedModule]) -> Iterator[Module]:
    """Yield every linear layer in the order of the headers, quantized or not."""
    seen: set[str] = set()
    for tensor in checkpoint.tensors.values():
        owner = tensor.name.rpartition(".")[0]
        module = quantized.get(owner)
        if owner in seen:
            continue
        if module:
            seen.add(owner)
            yield Module(owner, _kind(owner), _layer(owner), module.scheme.name, "", module.shape, *_size(module))
        elif is_linear(tensor):
            seen.add(owner)
            rows, columns = tensor.shape
            yield Module(owner, _kind(owner), _layer(owner), None, why_plain(checkpoint, owner), (rows, columns), tensor.count, tensor.size_bytes)


def _layer(name: str) -> int | None:
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def _kind(name: str) -> str:
    return name.rpartition(".")[2]


def _size(module: QuantizedModule) -> tuple[int, int]:
    rows, columns = module.shape
    bias = module.tensors.get("bias")
    return rows * columns + (bias.count if bias else 0), module.size_bytes


def _plain(tensor: TensorInfo) -> tuple[str, str, int, int]:
    owner, _, suffix = tensor.name.rpartition(".")
    is_parameter = tensor.dtype in FLOAT_DTYPES and suffix not in SCALE_SUFFIXES
    return _kind(owner) if is_parameter else suffix, tensor.dtype, tensor.count if is_parameter else 0, tensor.size_bytes


def _rows(items: Iterable[tuple[str, str, int, int]]) -> tuple[Row, ...]:
    found: dict[tuple[str, str], Row] = {}
    for kind, scheme, parameters, size_bytes in items:
        row = found.get((kind, scheme), Row(kind, scheme, 0, 0, 0))
        found[kind, scheme] = Row(kind, scheme, row.count + 1, row.parameters + parameters, row.size_bytes + size_bytes)
    return tuple(sorted(found.values(), key=lambda row: (-row.size_bytes, row.kind, row.scheme)))
