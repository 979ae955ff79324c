"""The rules of an engine: a YAML file of conditions, checked in full when it is loaded.

A condition maps inputs (see `rule_inputs`) to tests, which must all hold; of a list of conditions,
one must hold. A test is a value that the input equals, a list of such values, or operators:
``{below: 89}``, ``{not: [4, 8]}``, ``{not_multiple_of: group_size}``. An operand that is the name
of an input stands for the value of that input. A rule applies when ``when`` holds and ``unless``
does not.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from string import Formatter
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, field_validator, model_validator

from qtool.errors import UsageError, nearest
from qtool.inspection.engines.names import Matcher
from qtool.inspection.engines.rule_inputs import RULE_INPUTS, InputType, Scope

Severity = Literal["refused", "warning", "note"]
Inputs = Mapping[str, object]  # by name
Test = Callable[[Inputs], bool]
Condition = Mapping[str, object]
T = TypeVar("T")

FOLDER = Path(__file__).parent
SHARED = ("gpus", "layers", "fusion")  # YAML files here that are not an engine's
LETTERS: Mapping[str, Severity] = {"E": "refused", "W": "warning", "N": "note"}
NUMBER_OPERATORS: Mapping[str, Callable[[int, int], bool]] = {
    "below": operator.lt,
    "at_least": operator.ge,
    "not_multiple_of": lambda value, operand: operand != 0 and value % operand != 0,
}
SET_OPERATORS: Mapping[str, Callable[[frozenset[str], list[str]], bool]] = {
    "has": lambda value, operand: not value.isdisjoint(operand),
    "lacks": lambda value, operand: not value.issuperset(operand),
    "beyond": lambda value, operand: not value.issubset(operand),
}
OPERATORS = ("is", "not", "differs_from", *NUMBER_OPERATORS, *SET_OPERATORS)


class Strict(BaseModel):
    """A model that refuses unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)


class Rule(Strict):
    """One thing that an engine does with a checkpoint, a module or a fused group."""

    code: str = Field(pattern=r"^[EWN]_ENGINE_[A-Z0-9_]+$")
    severity: Severity
    about: Scope = "checkpoint"
    when: tuple[Condition, ...]
    unless: tuple[Condition, ...] = ()
    message: str = Field(min_length=1)
    hint: str = ""
    source: str = Field(min_length=1)
    since: str | None = None
    """The first version that does it, not the one in which it was read."""
    until: str | None = None
    """The first version that no longer does it."""
    seen: tuple[str, ...] = ()
    """Versions that did it when they were run; the source of `Ruleset.version` was read."""
    emulated: bool = False
    """Whether the GPU then does not multiply in the formats of the scheme."""
    tests: tuple[tuple[tuple[Test, ...], ...], ...] = Field(default=(), exclude=True)
    """The conditions ``when`` and ``unless``, compiled."""

    @field_validator("when", "unless", mode="before")
    @classmethod
    def _list_one(cls, value: object) -> object:
        return (value,) if isinstance(value, Mapping) else value

    @model_validator(mode="before")
    @classmethod
    def _refuse_tests(cls, value: object) -> object:
        if isinstance(value, Mapping) and "tests" in value:
            raise ValueError("`tests` is made from the conditions")
        return value

    @model_validator(mode="after")
    def _compile(self) -> Rule:
        if LETTERS[self.code[0]] != self.severity:
            raise ValueError(
                f"{self.code}: a code of severity `{self.severity}` begins with another letter"
            )
        known = {**RULE_INPUTS["checkpoint"], **RULE_INPUTS[self.about]}
        _check_message(self.code, self.message, known)
        if not self.when or not all((*self.when, *self.unless)):
            raise ValueError(f"{self.code}: an empty condition")
        tests = tuple(
            tuple(_compile_condition(self.code, condition, known) for condition in conditions)
            for conditions in (self.when, self.unless)
        )
        object.__setattr__(self, "tests", tests)
        return self

    def holds(self, inputs: Inputs) -> bool:
        """Whether the rule applies to ``inputs``."""
        when, unless = self.tests
        return _one_holds(when, inputs) and not _one_holds(unless, inputs)

    def is_of(self, version: tuple[int, ...]) -> bool:
        """Whether the rule holds in ``version``; an empty one is newer than all others."""
        if not version:
            return self.until is None
        if self.since and version < numbers(self.since):
            return False
        return not self.until or version < numbers(self.until)


class Matching(Strict):
    """How an engine decides from names what is quantized."""

    list: tuple[str, ...] = ()
    """Config keys; the first that the config has names the layers that are skipped."""
    runtime: tuple[Matcher, ...] = ()
    """How an entry is compared with the layer that the engine runs, e.g. ``qkv_proj``."""
    shards: tuple[Matcher, ...] = ()
    """How an entry is compared with the layers it was merged from."""
    targets: bool = False
    """Whether config groups say what is quantized."""
    unlisted: Literal["quantized", "tensors"] = "quantized"
    """What other layers are; ``tensors`` means that the engine looks at the tensors."""
    head: Literal["list", "flag", "name"] = "list"
    """What decides about the output head: ``list``, a flag of the config, or a target that is its
    name, as class names do not reach it."""
    blocks: bool = False
    """Whether all linear layers of the decoder layers are quantized alike, and no others."""
    experts: bool = False
    """Whether names matter only for experts, and one config group holds for all of them."""


class Ruleset(Strict):
    """The rules of one engine."""

    engine: str
    version: str
    """The version of the engine whose source was read for the rules."""
    seen: tuple[str, ...] = ()
    """Versions whose own verdicts on checkpoints were compared with those of the rules."""
    include: tuple[str, ...] = ()
    """YAML files of rules that several engines share."""
    matching: Mapping[str, Matching] = {}
    """By quantization method, or else by format."""
    rules: tuple[Rule, ...]

    @model_validator(mode="after")
    def _refuse_double_codes(self) -> Ruleset:
        codes = [rule.code for rule in self.rules]
        if twice := sorted({code for code in codes if codes.count(code) > 1}):
            raise ValueError(f"{self.engine}: {', '.join(twice)} is there twice")
        return self

    def rules_of(self, version: tuple[int, ...] | None) -> list[Rule]:
        """Return the rules that hold in ``version``; None is the version they were read in."""
        asked = numbers(self.version) if version is None else version
        return [rule for rule in self.rules if rule.is_of(asked)]

    def matching_of(self, method: str | None, format: str) -> Matching | None:
        """Return how names are matched in a checkpoint of ``method``, stored in ``format``."""
        return self.matching.get(method or format, self.matching.get(format))

    def has_seen(self, version: str) -> bool:
        """Whether the verdicts of ``version`` were compared."""
        return numbers(version) in map(numbers, self.seen)


def engines() -> tuple[str, ...]:
    """Return the names of the engines there are rules for."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.yaml") if path.stem not in SHARED))


@cache
def load_rules(engine: str) -> Ruleset:
    """Return the rules of ``engine``. Raises: UsageError, with the nearest known name."""
    if engine not in engines():
        raise UsageError(
            "E_ENGINE",
            f"unknown engine `{engine}`",
            hint=nearest(engine, engines()) or f"known: {', '.join(engines())}",
        )
    data = read_yaml(engine, dict[str, Any])
    shared = [rule for name in data.get("include", ()) for rule in read_yaml(name, list[object])]
    return Ruleset.model_validate({**data, "rules": [*data["rules"], *shared]})


def read_yaml(name: str, kind: type[T]) -> T:
    """Return the data of ``name``.yaml, in this folder, as a ``kind``."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    data = yaml.load((FOLDER / f"{name}.yaml").read_bytes(), Loader=loader)
    return TypeAdapter(kind).validate_python(data)


def numbers(version: str) -> tuple[int, ...]:
    """Return ``version`` as numbers that compare: ``0.33.0rc1`` is (0, 33, 0)."""
    match = re.match(r"v?(\d+(?:\.\d+)*)", version)
    return tuple(map(int, match[1].split("."))) if match else ()


def _one_holds(conditions: Iterable[tuple[Test, ...]], inputs: Inputs) -> bool:
    return any(all(test(inputs) for test in condition) for condition in conditions)


def _check_message(code: str, message: str, known: Mapping[str, InputType]) -> None:
    for _, name, _, _ in Formatter().parse(message):
        if name is not None and name not in known:
            raise ValueError(
                f"{code}: the message names the unknown input `{name}`; {nearest(name, known)}"
            )


def _compile_condition(
    code: str, condition: Condition, known: Mapping[str, InputType]
) -> tuple[Test, ...]:
    tests: list[Test] = []
    for name, expected in condition.items():
        if name not in known:
            raise ValueError(
                f"{code}: unknown input `{name}`; "
                f"{nearest(name, known) or f'known: {sorted(known)}'}"
            )
        operators = expected if isinstance(expected, Mapping) else {"is": expected}
        for operator_name, operand in operators.items():
            try:
                tests.append(_compile_test(name, operator_name, operand, known))
            except ValueError as error:
                raise ValueError(f"{code}: {error}") from error
    return tuple(tests)


def _compile_test(
    name: str, operator_name: str, operand: object, known: Mapping[str, InputType]
) -> Test:
    if operator_name not in OPERATORS:
        raise ValueError(
            f"unknown operator `{operator_name}` of `{name}`; "
            f"{nearest(operator_name, OPERATORS) or f'known: {sorted(OPERATORS)}'}"
        )
    if (operator_name in SET_OPERATORS) != known[name].is_set:
        kind = "a set" if known[name].is_set else "one value"
        raise ValueError(f"`{operator_name}` does not fit `{name}`, which is {kind}")
    if operator_name in ("is", "not"):
        return _equality_test(name, operator_name, operand, known[name].choices)
    if operator_name in SET_OPERATORS:
        return _set_test(name, operator_name, operand)
    if operator_name == "differs_from":
        return _difference_test(name, operand, known)
    return _number_test(name, operator_name, operand, known)


def _equality_test(
    name: str, operator_name: str, operand: object, choices: tuple[object, ...] | None
) -> Test:
    values = operand if isinstance(operand, list) else [operand]
    if choices is not None:
        for value in values:
            if value not in choices:
                raise ValueError(f"`{name}` is never {value!r}")
    if operator_name == "not":
        return lambda inputs: inputs[name] not in values
    return lambda inputs: inputs[name] in values


def _set_test(name: str, operator_name: str, operand: object) -> Test:
    if not isinstance(operand, list):
        raise ValueError(f"`{operator_name}` of `{name}` needs a list")
    compare = SET_OPERATORS[operator_name]

    def test(inputs: Inputs) -> bool:
        value = inputs[name]
        return isinstance(value, frozenset) and compare(value, operand)

    return test


def _difference_test(name: str, operand: object, known: Mapping[str, InputType]) -> Test:
    operand_of = _operand_reader(operand, known)

    def test(inputs: Inputs) -> bool:
        value = inputs[name]
        other = operand_of(inputs)
        return value is not None and other is not None and value != other

    return test


def _number_test(
    name: str, operator_name: str, operand: object, known: Mapping[str, InputType]
) -> Test:
    if not isinstance(operand, int) and operand not in known:
        raise ValueError(f"`{operator_name}` of `{name}` needs a number or the name of an input")
    compare = NUMBER_OPERATORS[operator_name]
    operand_of = _operand_reader(operand, known)

    def test(inputs: Inputs) -> bool:
        value = inputs[name]
        other = operand_of(inputs)
        return isinstance(value, int) and isinstance(other, int) and compare(value, other)

    return test


def _operand_reader(operand: object, known: Mapping[str, InputType]) -> Callable[[Inputs], object]:
    if isinstance(operand, str) and operand in known:
        return lambda inputs: inputs[operand]
    return lambda inputs: operand
