"""What is inside a checkpoint, from its headers alone: formats, schemes, bits, bytes, what stayed
in 16 bits, and what does not fit together.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from qtool import formats
from qtool.checkpoint import Checkpoint, TensorInfo
from qtool.checkpoint.model import FLOAT_DTYPES
from qtool.errors import CheckpointRefused
from qtool.formats import QuantizedModule
from qtool.formats.layout import CACHE_SUFFIXES
from qtool.inspection.comparison import Comparison, compare
from qtool.inspection.deep import DeepReport, measure
from qtool.inspection.engines import EngineReport, check_engine
from qtool.plan import is_linear, why_plain

LAYER_NUMBER = re.compile(r"\.(\d+)\.")
# the last is what old compressed-tensors wrote for the KV cache
SCALE_SUFFIXES = (
    *CACHE_SUFFIXES,
    "output_scale",
)


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
    """One linear layer of N outputs and K inputs: its scheme, or None and the ``reason`` it is left
    in 16 bits.
    """

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
    """A checkpoint in numbers; ``quantized`` and ``plain`` are sorted by bytes, the largest first,
    ``modules`` as the headers have them.

    ``plain_bytes`` is the size that the same parameters have in 16 bits. ``deep``, ``against`` and
    ``engine`` are there when they were asked for.
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
        parts = {
            name: part.to_dict() if part else None
            for name, part in (
                ("deep", self.deep),
                ("against", self.against),
                ("engine", self.engine),
            )
        }
        rows = {
            kind: [
                {**vars(row), "bits_per_weight": round(row.bits_per_weight, 4)}
                for row in getattr(self, kind)
            ]
            for kind in ("quantized", "plain", "modules")
        }
        return {
            **vars(self),
            "bits_per_weight": round(self.bits_per_weight, 4),
            **rows,
            **parts,
            "warnings": list(self.warnings),
        }


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

    ``deep`` reads all data and warns of what is NaN, infinite, a bad scale, or another file than
    the manifest has; ``against`` compares each linear layer with that checkpoint's; ``engine``
    tells whether it will load there, on ``gpu`` and cut in ``tensor_parallel`` parts.

    Raises: CheckpointRefused, when config and tensors contradict each other or the format is
        unknown.
    """
    warnings: list[str] = []
    try:
        layout = formats.detect(checkpoint)
    except CheckpointRefused as error:
        if error.code != "E_QUANT_METHOD" or not engine:
            raise
        layout = None  # the engine may know what qtool does not
        warnings.append(error.message)
    modules: Mapping[str, QuantizedModule] = layout.modules if layout else {}
    linears = tuple(_modules(checkpoint, modules))
    quantized = _rows(
        (module.kind, module.scheme, module.parameters, module.size_bytes)
        for module in linears
        if module.scheme
    )
    owned = layout.owned if layout else frozenset()
    plain = _rows(
        _plain(tensor) for tensor in checkpoint.tensors.values() if tensor.name not in owned
    )
    warnings += layout.warnings if layout else []
    measured = None
    if deep:
        warnings += formats.check_values(checkpoint, layout)
        measured = measure(checkpoint, layout)
        warnings += [
            f"{name} is not the file that the manifest describes" for name in measured.changed
        ]
    parameters = sum(row.parameters for row in (*quantized, *plain))
    return Inspection(
        name=checkpoint.name,
        architecture=", ".join(
            checkpoint.config.get("architectures")
            or [str(checkpoint.config.get("model_type", "unknown"))]
        ),
        format=layout.format if layout else None,
        parameters=parameters,
        size_bytes=checkpoint.size_bytes,
        plain_bytes=2 * parameters,
        quantized=quantized,
        plain=plain,
        modules=linears,
        kv_cache=layout.kv_cache if layout else None,
        tied_embeddings=checkpoint.tied_embeddings,
        warnings=tuple(warnings),
        deep=measured,
        against=compare(checkpoint, against) if against else None,
        engine=check_engine(
            checkpoint,
            layout,
            engine,
            version=engine_version,
            gpu=gpu,
            tensor_parallel=tensor_parallel,
        )
        if engine
        else None,
    )


def _modules(checkpoint: Checkpoint, quantized: Mapping[str, QuantizedModule]) -> Iterator[Module]:
    """Yield every linear layer in the order of the headers, quantized or not."""
    by_tensor = {next(iter(module.tensors.values())).name: module for module in quantized.values()}
    for name, tensor in checkpoint.tensors.items():
        if module := by_tensor.get(name):
            yield Module(
                module.name,
                _kind(module.name),
                _layer(name),
                module.scheme.name,
                "",
                module.shape,
                *_size(module),
            )
        elif name.endswith(".weight") and is_linear(tensor):
            owner = name.removesuffix(".weight")
            if owner not in quantized:
                rows, columns = tensor.shape
                yield Module(
                    owner,
                    _kind(owner),
                    _layer(name),
                    None,
                    why_plain(checkpoint, owner),
                    (rows, columns),
                    tensor.count,
                    tensor.size_bytes,
                )


def _layer(name: str) -> int | None:
    found = LAYER_NUMBER.search(name)
    return int(found[1]) if found else None


def _kind(name: str) -> str:
    return name.rpartition(".")[2]


def _size(module: QuantizedModule) -> tuple[int, int]:
    rows, columns = module.shape
    bias = module.tensors.get("bias")
    return rows * columns + (bias.count if bias else 0), module.size_bytes


def _plain(tensor: TensorInfo) -> tuple[str, str, int, int]:
    owner, _, suffix = tensor.name.rpartition(".")
    is_parameter = tensor.dtype in FLOAT_DTYPES and suffix not in SCALE_SUFFIXES
    return (
        _kind(owner) if is_parameter else suffix,
        tensor.dtype,
        tensor.count if is_parameter else 0,
        tensor.size_bytes,
    )


def _rows(items: Iterable[tuple[str, str, int, int]]) -> tuple[Row, ...]:
    sums: dict[tuple[str, str], list[int]] = {}
    for kind, scheme, parameters, size_bytes in items:
        row = sums.setdefault((kind, scheme), [0, 0, 0])
        row[0] += 1
        row[1] += parameters
        row[2] += size_bytes
    rows = (Row(kind, scheme, *numbers) for (kind, scheme), numbers in sums.items())
    return tuple(sorted(rows, key=lambda row: (-row.size_bytes, row.kind, row.scheme)))
