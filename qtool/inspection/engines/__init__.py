"""Whether an engine will load and run a checkpoint, by rules that are data: one YAML file for each
engine, beside this one.

`facts` says what a rule can ask, `rules` how; `layers` and `conclusions` hold what engines do with
names, `survey` computes the facts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from qtool.checkpoint import Checkpoint
from qtool.errors import UsageError, nearest
from qtool.formats import Layout
from qtool.inspection.engines.collect import (
    cache_head_count,
    survey_checkpoint,
    survey_groups,
    survey_modules,
)
from qtool.inspection.engines.layers import linear_layers
from qtool.inspection.engines.name_matching import conclusions
from qtool.inspection.engines.rule_inputs import CheckpointFacts, GroupFacts, ModuleFacts, as_dict
from qtool.inspection.engines.rules import (
    Rule,
    Ruleset,
    Severity,
    engines,
    load_rules,
    numbers,
    read_yaml,
)

__all__ = ["EngineReport", "Finding", "Severity", "check_engine", "engines"]

EXAMPLES = 3
ORDER: Mapping[Severity, int] = {"refused": 0, "warning": 1, "note": 2}


@dataclass(frozen=True)
class Finding:
    """One thing an engine does with a checkpoint: why it refuses it, or what its user should know.
    ``modules`` are examples of ``count``.
    """

    code: str
    severity: Severity
    message: str
    hint: str
    source: str
    modules: tuple[str, ...] = ()
    count: int = 0


@dataclass(frozen=True)
class EngineReport:
    """What ``engine`` of ``version`` does on ``gpu`` with ``tensor_parallel`` ranks.

    ``loads``: nothing refuses the checkpoint. ``native``: it then computes in the formats of the
        schemes, or would on some GPU when none is named; False where qtool cannot read the layers.
    """

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
        layout: what `formats.detect` returned; None for a plain model, or for a format that qtool
            does not read.
        version: of the engine; the one its rules were written for when left out.
        gpu: an architecture (``sm_90``, ``90``, ``9.0``) or a name (``h100``).
    Raises: UsageError, for an engine, version, GPU or number of ranks that is none.
    """
    ruleset = load_rules(engine)
    if tensor_parallel < 1:
        raise UsageError(
            "E_TENSOR_PARALLEL", f"tensor_parallel is {tensor_parallel}; there is at least one rank"
        )
    asked = _asked_version(ruleset, version)
    sm = _architecture(gpu) if gpu is not None else None
    rules = [rule for rule in ruleset.rules if rule.is_of(asked)]
    whole = survey_checkpoint(checkpoint, layout, sm, tensor_parallel)
    hits = list(_hits(rules, whole, checkpoint, layout, ruleset))
    findings = [
        *_findings(hits),
        *([_other_version(ruleset, version)] if version and asked else []),
    ]
    findings.sort(key=lambda finding: ORDER[finding.severity])
    loads = all(finding.severity != "refused" for finding in findings)
    too_old = (
        sm is not None
        and layout is not None
        and any(int(module.scheme.native_gpu[3:]) > sm for module in layout.modules.values())
    )
    native = (
        loads and whole.readable and not too_old and not any(rule.emulated for rule, _, _ in hits)
    )
    return EngineReport(
        engine,
        version or ruleset.version,
        f"sm_{sm}" if sm else None,
        tensor_parallel,
        loads,
        native,
        tuple(findings),
    )


def _hits(
    rules: list[Rule],
    whole: CheckpointFacts,
    checkpoint: Checkpoint,
    layout: Layout | None,
    ruleset: Ruleset,
) -> Iterator[tuple[Rule, str, list[str]]]:
    """Yield (rule, its message, names it is about) for every rule that holds."""
    surveys: dict[str, Mapping[ModuleFacts, list[str]] | Mapping[GroupFacts, list[str]]] = {}
    if layout:
        linears, fused = linear_layers(checkpoint, layout)
        matching = (
            None if whole.algorithm == "MIXED_PRECISION" else ruleset.matching.get(layout.format)
        )
        conclude = conclusions(matching, checkpoint.quantization_config or {})
        surveys["module"] = survey_modules(
            linears, fused, conclude, whole.ranks, cache_head_count(checkpoint)
        )
        surveys["group"] = survey_groups(checkpoint, fused, ordered=whole.desc_act)
    facts = as_dict(whole)
    cases = {
        scope: [({**facts, **as_dict(each)}, names) for each, names in survey.items()]
        for scope, survey in surveys.items()
    }
    cases["checkpoint"] = [(facts, [])]
    for rule in rules:
        for known, names in cases.get(rule.about, ()):
            if rule.holds(known):
                yield rule, rule.message.format_map(known), names


def _findings(hits: list[tuple[Rule, str, list[str]]]) -> Iterator[Finding]:
    merged: dict[tuple[str, str], tuple[Rule, list[str]]] = {}
    for rule, message, names in hits:
        merged.setdefault((rule.code, message), (rule, []))[1].extend(names)
    for (_, message), (rule, names) in merged.items():
        yield Finding(
            rule.code,
            rule.severity,
            message,
            rule.hint,
            rule.source,
            tuple(names[:EXAMPLES]),
            len(names),
        )


def _asked_version(ruleset: Ruleset, version: str | None) -> tuple[int, ...] | None:
    """Return ``version`` as numbers; None when it is the rules' own."""
    if (
        version is None
        or version == ruleset.version
        or ((own := numbers(ruleset.version)) and numbers(version) == own)
    ):
        return None
    if not numbers(version):
        raise UsageError(
            "E_ENGINE_VERSION",
            f"`{version}` is no version of {ruleset.engine}",
            hint=f"e.g. {ruleset.version}",
        )
    return numbers(version)


def _other_version(ruleset: Ruleset, version: str) -> Finding:
    message = f"the rules were written for {ruleset.engine} {ruleset.version}; {version} may differ"
    return Finding(
        "N_ENGINE_VERSION",
        "note",
        message,
        "try it there before you rely on it",
        f"{ruleset.engine}.yaml",
    )


def _architecture(gpu: str) -> int:
    """Return the compute capability of ``gpu`` times ten."""
    text = re.sub(r"nvidia|geforce|[\s_-]", "", gpu.lower())
    names: Mapping[str, int] = read_yaml("gpus")
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
