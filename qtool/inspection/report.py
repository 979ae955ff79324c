"""What is inside a checkpoint, from its headers alone: formats, schemes, bits, bytes, what stayed in 16 bits, and what does not fit together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from qtool import formats
from qtool.checkpoint import Checkpoint, TensorInfo
from qtool.checkpoint.reader import FLOAT_DTYPES
from qtool.formats import QuantizedModule
from qtool.formats.layout import CACHE_SUFFIXES
from qtool.inspection.comparison import Comparison
from qtool.inspection.deep import DeepReport
from qtool.inspection.engines import EngineReport
from qtool.plan import is_linear, why_plain

if TYPE_CHECKING:
    from rich.console import RenderableType

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


def inspect(checkpoint: Checkpoint, *, deep: bool = False) -> Inspection:
    """Return what ``checkpoint`` holds; with ``deep`` also read every float value and warn of what is NaN, infinite or a bad scale.

    Raises: CheckpointRefused, when config and tensors contradict each other or the format is unknown.
    """
    layout = formats.detect(checkpoint)
    modules: Mapping[str, QuantizedModule] = layout.modules if layout else {}
    quantized = _rows((_kind(module.name), module.scheme.name, *_size(module)) for module in modules.values())
    owned = layout.owned if layout else frozenset()
    plain = _rows(_plain(tensor) for tensor in checkpoint.tensors.values() if tensor.name not in owned)
    warnings = list(layout.warnings) if layout else []
    if deep:
        warnings += formats.check_values(checkpoint, layout)
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
    )


def render(inspection: Inspection) -> RenderableType:
    """Return ``inspection`` as tables and lines that rich prints."""
    from rich.console import Group
    from rich.markup import escape
    from rich.table import Table
    from rich.text import Text

    def table(title: str, rows: Iterable[Row]) -> Table:
        result = Table(title=title, title_justify="left", header_style="bold", box=None, pad_edge=False)
        result.add_column("modules")
        result.add_column("stored as")
        for column in ("count", "bits per weight", "MB"):
            result.add_column(column, justify="right")
        for row in rows:
            result.add_row(escape(row.kind), escape(row.scheme), f"{row.count:,}", f"{row.bits_per_weight:.2f}", f"{row.size_bytes / 1e6:,.2f}")
        return result

    facts = [
        f"{inspection.name}: {inspection.architecture}, {inspection.parameters / 1e6:,.2f} M parameters",
        f"format {inspection.format or 'none (not quantized)'}, KV cache {inspection.kv_cache or 'not quantized'}, "
        f"embeddings {'tied' if inspection.tied_embeddings else 'not tied'}",
        f"{inspection.size_bytes / 1e6:,.2f} MB, {inspection.bits_per_weight:.2f} bits per weight",
    ]
    parts: list[RenderableType] = [Text("\n".join(facts))]
    parts += [table(title, rows) for title, rows in (("quantized", inspection.quantized), ("not quantized", inspection.plain)) if rows]
    parts += [Text(f"warning: {warning}", style="yellow") for warning in inspection.warnings]
    return Group(*parts)


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
