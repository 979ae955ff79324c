"""Whether an engine will load and run a checkpoint, by rules that are data: one YAML file for each engine, beside this one."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from qtool.checkpoint import Checkpoint
from qtool.formats import Layout

Severity = Literal["refused", "warning", "note"]


@dataclass(frozen=True)
class Finding:
    """One thing an engine does with a checkpoint: why it refuses it, or what its user should know. ``modules`` are examples of ``count``."""

    code: str
    severity: Severity
    message: str
    hint: str
    source: str
    modules: tuple[str, ...] = ()
    count: int = 0


@dataclass(frozen=True)
class EngineReport:
    """What ``engine`` of ``version`` does on ``gpu`` with ``tensor_parallel`` ranks."""

    engine: str
    version: str
    gpu: str | None
    tensor_parallel: int
    loads: bool
    native: bool
    findings: tuple[Finding, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the report for ``--json``."""
        return asdict(self)


def check_engine(
    checkpoint: Checkpoint, layout: Layout | None, engine: str, *, version: str | None = None, gpu: str | None = None, tensor_parallel: int = 1
) -> EngineReport:
    """Return what ``engine`` will do with ``checkpoint``, from headers and configs alone."""
    raise NotImplementedError
