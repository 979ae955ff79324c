"""A recipe says in full what to do to a model: scheme, algorithm, backend, rules by module,
calibration, seed.

A method name is the name of a recipe that ships with qtool; ``recipes/`` holds one YAML file for
each.
"""

from __future__ import annotations

import fnmatch
import re
import reprlib
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    model_validator,
)

from qtool.checkpoint.strict_json import Json, JsonDict
from qtool.errors import RecipeRefused, UsageError, nearest, one_line
from qtool.patterns import PatternCompiler
from qtool.scheme import Scheme, recipe_scheme
from qtool.strict_yaml import MAX_YAML_BYTES, YAML_ERRORS, YamlLimitExceeded, parse_yaml

BackendName = Literal["llmcompressor", "gptqmodel", "modelopt", "torchao"]
BACKEND_NAMES: tuple[BackendName, ...] = get_args(BackendName)
WILDCARDS = frozenset("*?[")
EXAMPLES_HINT = "recipes/ in the source holds examples"
_PACKAGE = Path(__file__).parent
RECIPES_FOLDER = next(
    (folder for folder in (_PACKAGE / "recipes", _PACKAGE.parent / "recipes") if folder.is_dir()),
    _PACKAGE / "recipes",
)


class Step(BaseModel):
    """One step of an algorithm, with its options; ``name`` is what a recipe calls it."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: ClassVar[str]
    needs_data: ClassVar[bool] = True


class Rtn(Step):
    """Round to nearest; scales from the largest values seen."""

    name: ClassVar[str] = "rtn"
    needs_data: ClassVar[bool] = False


class Mse(Step):
    """Round to nearest, with weight scales that minimise the squared error."""

    name: ClassVar[str] = "mse"
    needs_data: ClassVar[bool] = False


class Gptq(Step):
    """GPTQ: columns are rounded one by one and the rest makes up for the error.

    Frantar et al. 2022, arXiv:2210.17323.
    """

    name: ClassVar[str] = "gptq"
    dampening: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description=(
            "share of the Hessian's mean diagonal added to it; the library's own when left out"
        ),
    )
    act_order: bool = Field(
        default=False,
        description="solve columns by falling activation, and store the order (`desc_act`)",
    )


class Awq(Step):
    """AWQ: inputs that matter are scaled up before rounding. Lin et al. 2023, arXiv:2306.00978."""

    name: ClassVar[str] = "awq"
    search: Literal["lite", "clip", "full"] = "lite"


class SmoothQuant(Step):
    """SmoothQuant: outliers of the inputs move into the weights. Xiao et al. 2022,
    arXiv:2211.10438.
    """

    name: ClassVar[str] = "smoothquant"
    strength: float = Field(default=0.8, ge=0, le=1)


class AutoRound(Step):
    """AutoRound: roundings learned by signed gradient descent.

    Cheng et al. 2023, arXiv:2309.05516.
    """

    name: ClassVar[str] = "autoround"
    iterations: int = Field(default=200, ge=1)


class SpinQuant(Step):
    """SpinQuant's offline Hadamard rotations, fused into the weights.

    Liu et al. 2024, arXiv:2405.16406.
    """

    name: ClassVar[str] = "spinquant"
    needs_data: ClassVar[bool] = False


SchemeField = Annotated[
    Scheme,
    BeforeValidator(recipe_scheme),
    PlainSerializer(Scheme.to_dict),
]


class Auto(Step):
    """Search the best scheme for each layer within a budget of bits per weight (ModelOpt's
    ``auto_quantize``).
    """

    name: ClassVar[str] = "auto"
    effective_bits: float = Field(gt=1, le=16)
    candidates: tuple[SchemeField, ...] = Field(min_length=1)
    score: Literal["gradient", "kl_div"] = "gradient"


STEPS: Mapping[str, type[Step]] = {
    step.name: step for step in (Rtn, Mse, Gptq, Awq, SmoothQuant, AutoRound, SpinQuant, Auto)
}


def _step_from(value: object) -> Step:
    """Return the step that a recipe names (``gptq``) or spells out (``{gptq: {dampening: 0.1}}``).

    Raises: RecipeRefused, with the nearest name or the options that are known.
    """
    if isinstance(value, Step):
        return value
    name, options = value, None
    if isinstance(value, dict) and len(value) == 1:
        ((name, options),) = value.items()
    if not isinstance(name, str) or name not in STEPS:
        raise RecipeRefused(
            "E_RECIPE",
            f"unknown algorithm step {reprlib.repr(value)}",
            hint=nearest(str(name), STEPS) or f"known: {', '.join(STEPS)}",
        )
    if not isinstance(options, dict | None):
        raise RecipeRefused(
            "E_RECIPE",
            f"algorithm step `{name}`: its options are a mapping, found {reprlib.repr(options)}",
            hint=f"write `{name}` alone, without any",
        )
    try:
        return STEPS[name](**(options or {}))
    except ValidationError as error:
        raise _bad_option(name, error) from None


def _bad_option(name: str, error: ValidationError) -> RecipeRefused:
    first = error.errors()[0]
    option, known = str(first["loc"][-1]), STEPS[name].model_fields
    hint = nearest(option, known) or f"`{name}` takes {', '.join(known) or 'no options'}"
    message = f"algorithm step `{name}`: `{option}`: {first['msg']}"
    return RecipeRefused("E_RECIPE", message, hint=hint)


S = TypeVar("S", bound=Step)
StepField = Annotated[
    Step,
    BeforeValidator(_step_from),
    PlainSerializer(lambda step: {step.name: step.model_dump(mode="json")}),
]


class Rule(BaseModel):
    """What the modules that match a pattern get instead of the recipe's scheme; ``scheme: null``
    leaves them in 16 bits.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    modules: str
    scheme: SchemeField | None


class CalibrationDefaults(BaseModel):
    """How much calibration data a recipe asks for, and where from when the command line does not
    say.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    source: str | None = None
    text_column: str | None = None
    num_samples: int = Field(default=512, ge=1)
    seq_len: int = Field(default=2048, ge=16)
    batch_size: int = Field(default=1, ge=1)
    pack: bool = False


OneOrSeveral = BeforeValidator(lambda value: (value,) if isinstance(value, str) else value)


class Recipe(BaseModel):
    """All of one job but the model: checked here, once, and then trusted."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str = Field(pattern=r"^[a-z0-9_]+$")
    summary: str
    aliases: tuple[str, ...] = ()
    backend: BackendName
    scheme: SchemeField | None = None
    algorithm: tuple[StepField, ...] = (Rtn(),)
    kv_cache: Literal["fp8", "nvfp4"] | None = None
    checkpoint_format: Literal["gptq", "gptq_v2"] | None = None
    lm_head: bool = False
    rules: tuple[Rule, ...] = ()
    ignore: tuple[str, ...] = ()
    gate: Annotated[tuple[str, ...], OneOrSeveral] = ()
    calibration: CalibrationDefaults = CalibrationDefaults()
    seed: int = Field(default=0, ge=0, lt=2**32)
    runs_on: tuple[Literal["cpu", "cuda"], ...] = ("cpu", "cuda")
    experimental: bool = False

    @model_validator(mode="after")
    def _does_something(self) -> Recipe:
        if (
            self.scheme is None
            and self.kv_cache is None
            and not any(rule.scheme for rule in self.rules)
        ):
            raise ValueError(
                "neither `scheme` nor `kv_cache` nor a rule with a scheme: nothing would be "
                "quantized"
            )
        return self

    @property
    def schemes(self) -> tuple[Scheme, ...]:
        """Every scheme the recipe may give to a module, without repeats, the main one first."""
        found = [
            self.scheme,
            *(rule.scheme for rule in self.rules),
            *(candidate for auto in self.steps(Auto) for candidate in auto.candidates),
        ]
        return tuple(dict.fromkeys(scheme for scheme in found if scheme is not None))

    @property
    def needs_data(self) -> bool:
        """Whether the job reads calibration data."""
        static_inputs = any(
            scheme.activations and scheme.activations.needs_data for scheme in self.schemes
        )
        return bool(
            static_inputs or self.kv_cache or any(step.needs_data for step in self.algorithm)
        )

    def steps(self, kind: type[S]) -> list[S]:
        """Return the steps of one kind."""
        return [step for step in self.algorithm if isinstance(step, kind)]

    def changed(self, **values: Any) -> Recipe:
        """Return the recipe with other values, checked again; a value of None changes nothing."""
        return _validated(
            {
                **self.model_dump(mode="json"),
                **{key: value for key, value in values.items() if value is not None},
            },
            self.name,
        )

    def to_dict(self) -> JsonDict:
        """Return the recipe as plain data that `recipe_from` reads back."""
        return self.model_dump(mode="json", exclude={"aliases"})


def recipe_from(data: Json) -> Recipe:
    """Rebuild a recipe from `Recipe.to_dict`."""
    return _validated(dict(data), str(data.get("name")))


def load_recipe(name: str) -> Recipe:
    """Return the recipe in file ``name``, or the shipped one of that name or alias (case and
    ``-``/``_`` do not matter).

    Raises: UsageError for a name that is neither, with the nearest ones; RecipeRefused for a file
        that is not a recipe.
    """
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise RecipeRefused(
                "E_NO_RECIPE",
                f"{path}: no such recipe file",
                hint="`qtool quantize --list` shows the recipes that ship with qtool",
            )
        return _read(path)
    known = catalogue()
    for recipe in known.values():
        if _plain(name) in map(_plain, (recipe.name, *recipe.aliases)):
            return recipe
    names = [name for recipe in known.values() for name in (recipe.name, *recipe.aliases)]
    raise UsageError(
        "E_UNKNOWN_METHOD",
        f"unknown method `{name}`",
        hint=nearest(name, names) or "`qtool quantize --list` shows all of them",
    )


@cache
def catalogue() -> Mapping[str, Recipe]:
    """Return every shipped recipe by name, sorted by backend and name."""
    recipes = [_read(path) for path in RECIPES_FOLDER.glob("*.yaml")]
    return {
        recipe.name: recipe
        for recipe in sorted(
            recipes, key=lambda recipe: (BACKEND_NAMES.index(recipe.backend), recipe.name)
        )
    }


class ModulePatterns:
    """The patterns by which a recipe names modules; those of one recipe share their limits."""

    def __init__(self) -> None:
        self._compiler = PatternCompiler(
            "the recipe", lambda message, hint: RecipeRefused("E_PATTERN", message, hint=hint)
        )

    def matcher(self, pattern: str) -> Callable[[str], bool]:
        """Return a function that says whether ``pattern`` matches the dotted name of a module.

        ``re:...`` is a regular expression anchored at the start, as in compressed-tensors. Anything
        else is a name or a glob, for the whole dotted name or for its end: ``lm_head``,
        ``down_proj`` and ``model.layers.0.*`` all work.

        Raises: RecipeRefused, as the function does, when a pattern is not a regular expression or
            takes too long.
        """
        if pattern.startswith("re:"):
            return self._compiler.compile(pattern[3:]).match
        if WILDCARDS.isdisjoint(pattern):
            return lambda module: module == pattern or module.endswith(f".{pattern}")
        return self._compiler.compile(rf"(?s:.*\.)?{fnmatch.translate(pattern)}").match


def check_pattern(pattern: str, matches: Callable[[str], bool], modules: Collection[str]) -> None:
    """Raise RecipeRefused when ``pattern`` means none of ``modules``, with the nearest name it
    could have meant.
    """
    if any(map(matches, modules)):
        return
    last_parts = dict.fromkeys(module.rpartition(".")[2] for module in modules)
    hint = (
        nearest(pattern.removeprefix("re:").strip(".*$^"), [*last_parts, *modules])
        or f"modules are called {', '.join(list(last_parts)[:8])}"
    )
    raise RecipeRefused(
        "E_PATTERN",
        f"the pattern `{pattern[:200]}` matches no linear module of this model",
        hint=hint,
    )


def _plain(name: str) -> str:
    return name.lower().replace("-", "_")


def _read(path: Path) -> Recipe:
    try:
        with path.open("rb") as file:
            text = file.read(MAX_YAML_BYTES + 1)
    except OSError as error:
        raise RecipeRefused(
            "E_RECIPE",
            f"{path} cannot be read: {error.strerror}",
            hint="check the path and its permissions",
        ) from None
    try:
        data = parse_yaml(text)
    except YamlLimitExceeded as error:
        raise RecipeRefused(
            "E_RECIPE", f"{path}: not a recipe: {error}", hint=EXAMPLES_HINT
        ) from None
    except YAML_ERRORS as error:
        hint = (
            f"{EXAMPLES_HINT}; a value with `: ` in it, or a pattern with `*` in front, needs "
            "quotes"
        )
        raise RecipeRefused("E_RECIPE", f"{path}: not YAML: {one_line(error)}", hint=hint) from None
    if not isinstance(data, dict):
        raise RecipeRefused(
            "E_RECIPE",
            f"{path}: a recipe is a mapping, found {type(data).__name__}",
            hint=EXAMPLES_HINT,
        )
    return _validated({"name": re.sub("[^a-z0-9_]+", "_", _plain(path.stem))} | data, str(path))


def _validated(data: JsonDict, where: str) -> Recipe:
    try:
        return Recipe(**data)
    except ValidationError as error:
        raise _bad_field(error, where) from None
    except RecipeRefused as error:
        raise RecipeRefused(
            error.code, f"{where}: {error.message}", hint=error.hint or EXAMPLES_HINT
        ) from None
    except TypeError as error:
        raise RecipeRefused("E_RECIPE", f"{where}: {error}", hint=EXAMPLES_HINT) from None


def _bad_field(error: ValidationError, where: str) -> RecipeRefused:
    # a misspelt key is why another one is missing
    first = min(error.errors(), key=lambda each: each["type"] != "extra_forbidden")
    field = ".".join(map(str, first["loc"])) or "recipe"
    if first["type"] == "extra_forbidden":
        known = _known_keys(first["loc"])
        hint = nearest(str(first["loc"][-1]), known) or f"known: {', '.join(known)}"
        return RecipeRefused("E_RECIPE", f"{where}: unknown key `{field}`", hint=hint)
    values = re.findall("'([^']*)'", first["msg"]) if first["type"] == "literal_error" else []
    return RecipeRefused(
        "E_RECIPE",
        f"{where}: `{field}`: {first['msg']}, found {reprlib.repr(first['input'])}",
        hint=nearest(str(first["input"]), values) or EXAMPLES_HINT,
    )


def _known_keys(location: tuple[int | str, ...]) -> Iterable[str]:
    if location and location[0] == "calibration":
        return CalibrationDefaults.model_fields
    if location and location[0] == "rules":
        return Rule.model_fields
    return Recipe.model_fields
