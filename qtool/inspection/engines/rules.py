"""The rules of an engine: a YAML file of conditions over facts, checked in full when it is loaded.

A condition maps facts to tests, all of which must hold; a list of such mappings holds when one of
them does. A test is a value the fact
equals, a list it is in, or operators: ``{below: 89}``, ``{not: [4, 8]}``, ``{not_multiple_of:
group_size}`` (see `OPERATORS`). An operand written as the name of a fact stands for that fact.
``when`` must hold and ``unless`` must not.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from string import Formatter
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from qtool.errors import UsageError, nearest
from qtool.inspection.engines.names import Matcher
from qtool.inspection.engines.rule_inputs import FACTS, Scope

Severity = Literal["refused", "warning", "note"]
Test = Callable[[Mapping[str, Any]], bool]

FOLDER = Path(__file__).parent
SHARED = ("gpus", "layers", "fusion")  # the YAML files here that are no engine
LETTERS: Mapping[str, Severity] = {"E": "refused", "W": "warning", "N": "note"}
OPERATORS: Mapping[str, Callable[[Any, Any], bool]] = {
    "not": lambda value, operand: not _is(value, operand),
    "below": lambda value, operand: value is not None and value < operand,
    "at_least": lambda value, operand: value is not None and value >= operand,
    "not_multiple_of": lambda value, operand: (
        bool(operand) and value is not None and value % operand != 0
    ),
    "differs_from": lambda value, operand: (
        value is not None and operand is not None and value != operand
    ),
    "has": lambda value, operand: not value.isdisjoint(operand),
    "lacks": lambda value, operand: not value.issuperset(operand),
    "beyond": lambda value, operand: not value.issubset(operand),
}
ON_SETS = frozenset({"has", "lacks", "beyond"})


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)


class Rule(_Strict):
    """One thing an engine does: ``about`` the checkpoint, each module or each fused group,
    ``since`` and ``until`` (exclusive) a version.

    ``emulated`` says that the GPU then does not multiply in the scheme's own formats.
    """

    code: str = Field(pattern=r"^[EWN]_ENGINE_[A-Z0-9_]+$")
    severity: Severity
    about: Scope = "checkpoint"
    when: tuple[Mapping[str, Any], ...]
    unless: tuple[Mapping[str, Any], ...] = ()
    message: str = Field(min_length=1)
    hint: str = ""
    source: str = Field(min_length=1)
    since: str | None = None
    until: str | None = None
    emulated: bool = False
    tests: tuple[tuple[tuple[Test, ...], ...], ...] = Field(default=(), exclude=True)

    @field_validator("when", "unless", mode="before")
    @classmethod
    def _alternatives(cls, value: Any) -> Any:
        return (value,) if isinstance(value, Mapping) else value

    @model_validator(mode="before")
    @classmethod
    def _no_tests(cls, value: Any) -> Any:
        if isinstance(value, Mapping) and "tests" in value:
            raise ValueError("`tests` is made from the conditions")
        return value

    @model_validator(mode="after")
    def _check(self) -> Rule:
        if LETTERS[self.code[0]] != self.severity:
            raise ValueError(
                f"{self.code}: a code of severity `{self.severity}` begins with another letter"
            )
        known = _known(self.about)
        for _, name, _, _ in Formatter().parse(self.message):
            if name is not None and name not in known:
                raise ValueError(
                    f"{self.code}: the message names the unknown fact `{name}`; "
                    f"{nearest(name, known)}"
                )
        if not self.when or not all((*self.when, *self.unless)):
            raise ValueError(f"{self.code}: an empty condition")
        tests = tuple(
            tuple(_compiled(self.code, condition, known) for condition in conditions)
            for conditions in (self.when, self.unless)
        )
        object.__setattr__(self, "tests", tests)
        return self

    def holds(self, facts: Mapping[str, Any]) -> bool:
        """Whether the rule applies to ``facts``."""
        when, unless = (
            any(all(test(facts) for test in condition) for condition in conditions)
            for conditions in self.tests
        )
        return when and not unless

    def is_of(self, version: tuple[int, ...] | None) -> bool:
        """Whether the rule holds in ``version``; None is the version the rules were written for."""
        if version is None:
            return True
        return (not self.since or numbers(self.since) <= version) and (
            not self.until or version < numbers(self.until)
        )


class Matching(_Strict):
    """How an engine decides from names what is quantized.

    The first of ``list`` that the config has names what it skips; ``targets`` says that config
    groups tell what it quantizes. ``runtime`` matchers compare an entry with the layer the engine
    runs, e.g. ``qkv_proj``; ``shards`` with what it was merged from. ``unlisted: tensors``
    means that the engine looks at the tensors too. ``head`` is what decides for the output head:
    the ``list``, a ``flag`` of the config, or a target that is its ``name``, for class names do not
    reach it.
    """

    list: tuple[str, ...] = ()
    runtime: tuple[Matcher, ...] = ()
    shards: tuple[Matcher, ...] = ()
    targets: bool = False
    unlisted: Literal["quantized", "tensors"] = "quantized"
    head: Literal["list", "flag", "name"] = "list"


class Ruleset(_Strict):
    """What is known of one engine, read from its ``version``; ``include`` names files of rules that
    several engines share.
    """

    engine: str
    version: str
    include: tuple[str, ...] = ()
    matching: Mapping[str, Matching] = {}
    rules: tuple[Rule, ...]

    @model_validator(mode="after")
    def _codes_differ(self) -> Ruleset:
        codes = [rule.code for rule in self.rules]
        if twice := sorted({code for code in codes if codes.count(code) > 1}):
            raise ValueError(f"{self.engine}: {', '.join(twice)} is there twice")
        return self


def engines() -> tuple[str, ...]:
    """Return the names of the engines there are rules for."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.yaml") if path.stem not in SHARED))


@cache
def load_rules(engine: str) -> Ruleset:
    """Return the rules of ``engine``. Raises: UsageError, with the nearest name that is known."""
    if engine not in engines():
        raise UsageError(
            "E_ENGINE",
            f"unknown engine `{engine}`",
            hint=nearest(engine, engines()) or f"known: {', '.join(engines())}",
        )
    data = read_yaml(engine)
    return Ruleset.model_validate(
        {
            **data,
            "rules": [
                *data["rules"],
                *(rule for name in data.get("include", ()) for rule in read_yaml(name)),
            ],
        }
    )


@cache
def read_yaml(name: str) -> Any:
    """Return the data of ``name``.yaml beside this file."""
    return yaml.load(
        (FOLDER / f"{name}.yaml").read_bytes(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    )


def numbers(version: str) -> tuple[int, ...]:
    """Return ``version`` as numbers that compare: ``0.33.0rc1`` is (0, 33, 0)."""
    match = re.match(r"v?(\d+(?:\.\d+)*)", version)
    return tuple(map(int, match[1].split("."))) if match else ()


def _known(scope: Scope) -> Mapping[str, Any]:
    return {**FACTS["checkpoint"], **FACTS[scope]}


def _compiled(
    code: str, condition: Mapping[str, Any], known: Mapping[str, Any]
) -> tuple[Test, ...]:
    tests = []
    for fact, expected in condition.items():
        if fact not in known:
            raise ValueError(
                f"{code}: unknown fact `{fact}`; "
                f"{nearest(fact, known) or f'known: {sorted(known)}'}"
            )
        operators = expected if isinstance(expected, Mapping) else {"is": expected}
        tests += [_test(code, fact, name, operand, known) for name, operand in operators.items()]
    return tuple(tests)


def _test(code: str, fact: str, name: str, operand: Any, known: Mapping[str, Any]) -> Test:
    if name != "is" and name not in OPERATORS:
        raise ValueError(
            f"{code}: unknown operator `{name}` of `{fact}`; "
            f"{nearest(name, OPERATORS) or f'known: {sorted(OPERATORS)}'}"
        )
    if (name in ON_SETS) != (known[fact] is frozenset):
        raise ValueError(
            f"{code}: `{name}` does not fit `{fact}`, which is "
            f"{'a set' if known[fact] is frozenset else 'one value'}"
        )
    function = OPERATORS.get(name, _is)
    if isinstance(operand, str) and operand in known and name not in ("is", "not"):
        return lambda facts: function(facts[fact], facts[operand])
    if name in ("is", "not") and (wrong := _not_a_choice(operand, known[fact])):
        raise ValueError(f"{code}: `{fact}` is never {wrong!r}")
    return lambda facts: function(facts[fact], operand)


def _not_a_choice(operand: Any, choices: Any) -> Any:
    if not isinstance(choices, tuple):
        return None
    return next(
        (
            value
            for value in (operand if isinstance(operand, list) else [operand])
            if value not in choices
        ),
        None,
    )


def _is(value: Any, expected: Any) -> bool:
    return value in expected if isinstance(expected, list) else bool(value == expected)
