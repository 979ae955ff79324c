"""Whether an engine loads and runs a checkpoint, by the rules in one YAML file for each engine.

`rule_inputs` says what a rule can ask and `rules` how; `collect` collects the inputs; `layers` and
`name_matching` say what engines do with names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass

from qtool.checkpoint import Checkpoint
from qtool.errors import UsageError, nearest
from qtool.formats import Layout, detect
from qtool.inspection.engines.collect import (
    cache_head_count,
    collect_checkpoint,
    collect_groups,
    collect_modules,
    layer_algorithms,
)
from qtool.inspection.engines.layers import linear_layers
from qtool.inspection.engines.name_matching import name_matching
from qtool.inspection.engines.rule_inputs import (
    CheckpointInputs,
    GroupInputs,
    ModuleInputs,
    Scope,
    as_dict,
)
from qtool.inspection.engines.rules import (
    Inputs,
    Rule,
    Ruleset,
    Severity,
    engines,
    load_rules,
    numbers,
    read_yaml,
)
from qtool.options import LARGEST

__all__ = [
    "EngineReport",
    "Finding",
    "Severity",
    "check_engine",
    "check_engines",
    "engines",
    "shown_verdicts",
    "verdicts_dict",
]

EXAMPLES = 3
ORDER: Mapping[Severity, int] = {"refused": 0, "warning": 1, "note": 2}


@dataclass(frozen=True)
class Finding:
    """One thing that an engine does with a checkpoint: a refusal, a warning or a note."""

    code: str
    severity: Severity
    message: str
    hint: str
    source: str
    """Where in the engine this was read."""
    read: str = ""
    """The version of the engine in which it was read."""
    seen: tuple[str, ...] = ()
    """Versions that did it when they were run."""
    modules: tuple[str, ...] = ()
    """Examples of the modules it is about."""
    count: int = 0
    """How many modules it is about."""


@dataclass(frozen=True)
class EngineReport:
    """What an engine does with a checkpoint."""

    engine: str
    version: str
    read: str
    """The version of the engine in whose source the rules were read."""
    seen: tuple[str, ...]
    """Versions whose own verdicts on checkpoints were compared with those of the rules."""
    gpu: str | None
    tensor_parallel: int
    loads: bool
    """Whether nothing refuses the checkpoint."""
    native: bool
    """Whether the engine computes in the formats of the schemes, on some GPU when none is named.

    False where qtool cannot read the layers.
    """
    findings: tuple[Finding, ...]

    @property
    def refusals(self) -> tuple[str, ...]:
        """The codes of the findings that refuse the checkpoint."""
        refused = (each.code for each in self.findings if each.severity == "refused")
        return tuple(dict.fromkeys(refused))

    def to_dict(self) -> dict[str, object]:
        """Return the report for ``--json``."""
        return asdict(self)


@dataclass(frozen=True)
class _Hit:
    """A rule that applies, its message filled in, and the layers it applies to."""

    rule: Rule
    message: str
    names: list[str]


def check_engine(
    checkpoint: Checkpoint,
    layout: Layout | None,
    engine: str,
    *,
    version: str | None = None,
    gpu: str | None = None,
    tensor_parallel: int = 1,
) -> EngineReport:
    """Return what ``engine`` will do with ``checkpoint``, from headers, configs and a few scales.

    Args:
        checkpoint: the checkpoint to check.
        layout: what `formats.detect` returned; None for an unquantized model, or for a format that
            qtool does not read.
        engine: name of the engine.
        version: of the engine; the one its rules were read in when None.
        gpu: an architecture (``sm_90``, ``90``, ``9.0``) or a name (``h100``).
        tensor_parallel: number of ranks.
    Raises: UsageError, for an unknown engine, version, GPU or number of ranks.
    """
    ruleset = load_rules(engine)
    if not 1 <= tensor_parallel <= LARGEST:
        raise UsageError(
            "E_TENSOR_PARALLEL",
            f"tensor_parallel is {tensor_parallel}",
            hint="a whole number from 1 on",
        )
    other_version = _other_version(ruleset, version)
    architecture = _architecture(gpu) if gpu is not None else None
    whole = collect_checkpoint(checkpoint, layout, architecture, tensor_parallel)
    cases = _cases(checkpoint, layout, whole, ruleset)
    hits = [*_hits(ruleset.rules_of(other_version), cases)]
    findings = _findings(hits, ruleset)
    if version and other_version and not ruleset.has_seen(version):
        findings.append(_version_note(ruleset, version))
    findings.sort(key=lambda finding: ORDER[finding.severity])
    loads = all(finding.severity != "refused" for finding in findings)
    emulated = _is_emulated(hits) or _needs_newer_gpu(layout, architecture)
    return EngineReport(
        engine=engine,
        version=version or ruleset.version,
        read=ruleset.version,
        seen=ruleset.seen,
        gpu=_gpu_name(architecture),
        tensor_parallel=tensor_parallel,
        loads=loads,
        native=loads and whole.readable and not emulated,
        findings=tuple(findings),
    )


def check_engines(checkpoint: Checkpoint) -> list[EngineReport]:
    """Return what each engine does with ``checkpoint`` on one GPU of a kind that it supports."""
    layout = detect(checkpoint)
    return [check_engine(checkpoint, layout, engine) for engine in engines()]


def verdicts_dict(reports: Iterable[EngineReport]) -> dict[str, dict[str, object]]:
    """Return, by engine, whether it loads a checkpoint, and the codes of the refusals."""
    return {
        report.engine: {
            "version": report.version,
            "loads": report.loads,
            "refused": list(report.refusals),
        }
        for report in reports
    }


def shown_verdicts(reports: Iterable[EngineReport]) -> str:
    """Return in one line which engines load a checkpoint, and why others do not."""
    loading, refusing = [], []
    for report in reports:
        if report.loads:
            loading.append(report.engine)
        else:
            refusing.append(f"{report.engine} ({', '.join(report.refusals)})")
    shown = f"loads in {', '.join(loading)}" if loading else "loads in none of the known engines"
    return shown + (f"; not in {', '.join(refusing)}" if refusing else "")


def _gpu_name(architecture: int | None) -> str | None:
    return f"sm_{architecture}" if architecture else None


def _is_emulated(hits: Iterable[_Hit]) -> bool:
    return any(hit.rule.emulated for hit in hits)


def _needs_newer_gpu(layout: Layout | None, architecture: int | None) -> bool:
    if layout is None or architecture is None:
        return False
    schemes = {module.scheme for module in layout.modules.values()}
    return any(int(scheme.native_gpu.removeprefix("sm_")) > architecture for scheme in schemes)


Cases = Mapping[Scope, list[tuple[Inputs, list[str]]]]  # inputs, and the layers that have them


def _cases(
    checkpoint: Checkpoint, layout: Layout | None, whole: CheckpointInputs, ruleset: Ruleset
) -> Cases:
    """Return the inputs that the rules of each scope are tested with."""
    inputs = as_dict(whole)
    if layout is None:
        return {"checkpoint": [(inputs, [])]}
    linears, fused = linear_layers(checkpoint, layout)
    config = checkpoint.quantization_config or {}
    is_mixed = whole.algorithm == "MIXED_PRECISION"
    matching = None if is_mixed else ruleset.matching_of(whole.quant_method, layout.format)
    modules = collect_modules(
        linears,
        fused,
        name_matching(matching, config),
        layer_algorithms(config) if is_mixed else lambda name: None,
        ranks=whole.ranks,
        cache_heads=cache_head_count(checkpoint),
    )
    groups = collect_groups(checkpoint, fused, ordered=whole.desc_act)
    return {
        "checkpoint": [(inputs, [])],
        "module": _with_names(inputs, modules),
        "group": _with_names(inputs, groups),
    }


def _with_names(
    whole: Inputs, found: Mapping[ModuleInputs, list[str]] | Mapping[GroupInputs, list[str]]
) -> list[tuple[Inputs, list[str]]]:
    return [({**whole, **as_dict(each)}, names) for each, names in found.items()]


def _hits(rules: Iterable[Rule], cases: Cases) -> Iterator[_Hit]:
    for rule in rules:
        for inputs, names in cases.get(rule.about, ()):
            if rule.holds(inputs):
                yield _Hit(rule, rule.message.format_map(inputs), names)


def _findings(hits: Iterable[_Hit], ruleset: Ruleset) -> list[Finding]:
    """Return the hits as findings; those of one rule with one message become one."""
    merged: dict[tuple[str, str], tuple[Rule, list[str]]] = {}
    for hit in hits:
        _, names = merged.setdefault((hit.rule.code, hit.message), (hit.rule, []))
        names += hit.names
    return [
        Finding(
            code=rule.code,
            severity=rule.severity,
            message=message,
            hint=rule.hint,
            source=rule.source,
            read=ruleset.version,
            seen=rule.seen,
            modules=tuple(names[:EXAMPLES]),
            count=len(names),
        )
        for (_, message), (rule, names) in merged.items()
    ]


def _other_version(ruleset: Ruleset, version: str | None) -> tuple[int, ...] | None:
    """Return ``version`` as numbers; None when it is the one that the rules were read in."""
    if version is None or version == ruleset.version:
        return None
    found = numbers(version)
    if not found:
        raise UsageError(
            "E_ENGINE_VERSION",
            f"`{version}` is not a version of {ruleset.engine}",
            hint=f"e.g. {ruleset.version}",
        )
    return None if found == numbers(ruleset.version) else found


def _version_note(ruleset: Ruleset, version: str) -> Finding:
    return Finding(
        code="N_ENGINE_VERSION",
        severity="note",
        message=(
            f"the rules are from the source of {ruleset.engine} {ruleset.version}; {version} may "
            "differ"
        ),
        hint="try it there before you rely on it",
        source=f"{ruleset.engine}.yaml",
    )


def _architecture(gpu: str) -> int:
    """Return the compute capability of ``gpu`` times ten."""
    text = re.sub(r"nvidia|geforce|[\s_-]", "", gpu.lower())
    names = read_yaml("gpus", dict[str, int])
    if text in names:
        return names[text]
    if match := re.fullmatch(r"(?:sm)?(\d{2,3})[af]?", text) or re.fullmatch(
        r"(?:sm)?(\d{1,2}\.\d)", text
    ):
        return int(match[1].replace(".", ""))
    raise UsageError(
        "E_GPU",
        f"unknown GPU `{gpu}`",
        hint=nearest(gpu, names) or "write its architecture, e.g. sm_90",
    )
