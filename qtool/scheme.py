"""What the numbers of a quantized layer are: formats, granularity, groups. No algorithm, no
library, no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from types import NoneType
from typing import Any, Literal, cast

from qtool.errors import RecipeRefused, nearest

Format = Literal[
    "int2", "int3", "int4", "int5", "int6", "int7", "int8", "fp4", "fp8", "nf4", "bnb_fp4", "iq4_nl"
]
Granularity = Literal["tensor", "channel", "token", "group", "block"]
ScaleFormat = Literal["float", "e4m3", "e8m0"]

# format -> what each code stands for, times the scale. Sources: bitsandbytes 0.50,
# `functional.get_4bit_type`, whose fp4 differs from E2M1 in the smallest number; ggml's IQ4_NL.
CODEBOOKS: Mapping[str, tuple[float, ...]] = {
    "nf4": (
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ),
    "bnb_fp4": tuple(
        sign * number / 12
        for sign in (1, -1)
        for number in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
    ),
    "iq4_nl": (
        *(-127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0),
        *(1.0, 13.0, 25.0, 38.0, 53.0, 69.0, 89.0, 113.0),
    ),
}
FORMAT_BITS: Mapping[str, int] = {
    **{"fp4": 4, "fp8": 8},
    **{f"int{bits}": bits for bits in range(2, 9)},
    **dict.fromkeys(CODEBOOKS, 4),
}
SCALE_BITS: Mapping[str, int] = {"float": 16, "e4m3": 8, "e8m0": 8}
CODEBOOK_SCALE_BITS = 32


def number_format(bits: int, *, is_float: bool) -> Format:
    """Return the name of a format; whether there is one, `Weights` and `Activations` check."""
    return cast(Format, f"{'fp' if is_float else 'int'}{bits}")


@dataclass(frozen=True)
class Weights:
    """How weights [N, K] are stored."""

    format: Format
    granularity: Granularity = "channel"
    group_size: int | None = None
    """Neighbouring inputs that share a scale, for the granularity ``group``."""
    block: tuple[int, int] | None = None
    """Rows and columns that share a scale, for the granularity ``block``."""
    symmetric: bool = True
    scale: ScaleFormat = "float"
    """Format of the scales: ``e4m3`` means NVFP4's two levels, ``e8m0`` the powers of two of the MX
    formats.
    """
    offset: bool = False
    """Whether an asymmetric group has a float that is added after scaling, its minimum, instead of
    a zero point: GGUF's types have it.
    """

    def __post_init__(self) -> None:
        _check_numbers("weights", self.format, self.granularity, self.group_size, self.scale)
        _check_block(self.granularity, self.block)
        if self.granularity == "token":
            raise _invalid(
                "weights: granularity `token` is for activations; weights know `channel`"
            )
        if self.offset and (self.symmetric or self.granularity != "group"):
            raise _invalid("weights: `offset` is for asymmetric groups")
        if self.symmetric:
            return
        if self.granularity == "block":
            raise _invalid("weights: blocks have no zero points; `symmetric` must stay true")
        if not self.format.startswith("int"):
            raise _invalid(f"weights: {self.format} has no zero point; `symmetric` must stay true")

    @property
    def bits(self) -> int:
        """Bits of one code."""
        return FORMAT_BITS[self.format]

    def scale_count(self, rows: int, columns: int) -> int:
        """Return how many scales a weight of [``rows``, ``columns``] has."""
        if self.granularity == "tensor":
            return 1
        if self.granularity == "block" and self.block:
            return math.ceil(rows / self.block[0]) * math.ceil(columns / self.block[1])
        return rows * (math.ceil(columns / self.group_size) if self.group_size else 1)

    def size_bytes(self, rows: int, columns: int) -> int:
        """Return the bytes of codes, scales and zero points together, for a weight of [``rows``,
        ``columns``].
        """
        scales = self.scale_count(rows, columns)
        scale_bits = CODEBOOK_SCALE_BITS if self.format in CODEBOOKS else SCALE_BITS[self.scale]
        bits = rows * columns * self.bits + scales * scale_bits
        if not self.symmetric:
            bits += scales * (SCALE_BITS["float"] if self.offset else self.bits)
        return math.ceil(bits / 8) + (4 if self.scale == "e4m3" else 0)

    def __str__(self) -> str:
        if self.scale == "e4m3":
            name = "nvfp4"
        elif self.scale == "e8m0":
            name = f"mx{self.format}"
        else:
            name = self.format
        where = {"group": f"g{self.group_size}", "block": "x".join(map(str, self.block or ()))}
        zero = ""
        if self.offset:
            zero = " offset"
        elif not self.symmetric:
            zero = " asym"
        return f"{name} {where.get(self.granularity, self.granularity)}{zero}"


@dataclass(frozen=True)
class Activations:
    """How a layer's input [T, K] is rounded."""

    format: Format
    granularity: Granularity = "token"
    group_size: int | None = None
    dynamic: bool = True
    """Whether scales are found at run time; static ones are found by calibration."""
    symmetric: bool = True
    scale: ScaleFormat = "float"

    def __post_init__(self) -> None:
        _check_numbers("activations", self.format, self.granularity, self.group_size, self.scale)
        if self.format in CODEBOOKS:
            raise _invalid(f"activations: `{self.format}` is a codebook of weights")
        if self.granularity in ("channel", "block"):
            raise _invalid(f"activations: granularity `{self.granularity}` is for weights")

    @property
    def needs_data(self) -> bool:
        """Whether some scale comes from calibration: static scales, and the global one of NVFP4."""
        return not self.dynamic or self.scale == "e4m3"

    def __str__(self) -> str:
        name = {"e4m3": "nvfp4", "e8m0": f"mx{self.format}"}.get(self.scale, self.format)
        where = f"g{self.group_size}" if self.granularity == "group" else self.granularity
        return f"{name} {where}{'' if self.dynamic else ' static'}"


@dataclass(frozen=True)
class Scheme:
    """What one linear layer stores and computes with."""

    weights: Weights
    activations: Activations | None = None
    """None when inputs stay in 16 bits."""

    @property
    def name(self) -> str:
        """The field's name of this scheme, e.g. ``W4A16``, or a description where it has none."""
        return _name_of(self)

    @property
    def bits_per_weight(self) -> float:
        """Bits of one weight with its share of the scales and zero points, for a matrix of 4096 x
        4096.
        """
        return self.weights.size_bytes(4096, 4096) * 8 / 4096**2

    @property
    def native_gpu(self) -> str:
        """The first NVIDIA architecture that multiplies in this scheme's own formats; others
        emulate it or cannot load it.

        Source: the engines' own minimum capabilities, vLLM 0.33 and SGLang 0.5.23.
        """
        formats = {self.weights.format} | ({self.activations.format} if self.activations else set())
        if self.activations is None:
            return "sm_75"
        if "fp4" in formats or self.weights.scale == "e8m0":
            return "sm_100"
        if formats == {"fp8"}:
            return "sm_89"
        return "sm_90" if "fp8" in formats else "sm_75"

    def with_group_size(self, group_size: int) -> Scheme:
        """Return the scheme with another group size; -1 means one scale a row.

        RecipeRefused when it has no groups to size.
        """
        if self.weights.granularity not in (
            "group",
            "channel",
        ) or not self.weights.format.startswith("int"):
            raise RecipeRefused(
                "E_GROUP_SIZE",
                f"group_size {group_size} does not fit scheme {self.name}: its scales are fixed "
                f"at {self.weights}",
                hint="leave --group-size out, or choose an integer method such as `gptq_int4`",
            )
        if group_size == -1:
            weights = replace(self.weights, granularity="channel", group_size=None)
        else:
            weights = replace(self.weights, granularity="group", group_size=group_size)
        return replace(self, weights=weights)

    def to_dict(self) -> dict[str, object]:
        """Return the scheme as it stands in a recipe or a manifest."""
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"{self.weights}, activations {self.activations}"
            if self.activations
            else str(self.weights)
        )


@lru_cache(maxsize=1024)
def _name_of(scheme: Scheme) -> str:
    return next((name for name, known in SCHEMES.items() if known == scheme), str(scheme))


def scheme_from(value: str | Mapping[str, object]) -> Scheme:
    """Return the scheme that a recipe names (``W4A16``) or spells out (``{weights: {...},
    activations: {...}}``).

    Raises: RecipeRefused, with the nearest name or the keys that are known.
    """
    if isinstance(value, str):
        by_lower = {name.lower(): scheme for name, scheme in SCHEMES.items()}
        if value.lower() not in by_lower:
            raise _invalid(
                f"unknown scheme `{value}`",
                hint=nearest(value, SCHEMES) or f"known: {', '.join(SCHEMES)}",
            )
        return by_lower[value.lower()]
    if not isinstance(value, Mapping):
        raise _invalid(
            f"a scheme is a name or a mapping, found {value!r}",
            hint=f"known names: {', '.join(SCHEMES)}",
        )
    _refuse_unknown_keys("scheme", value, {"weights", "activations"})
    if not isinstance(value.get("weights"), Mapping):
        raise _invalid("a scheme needs `weights`, a mapping with at least `format`")
    activations = value.get("activations")
    return Scheme(
        _dataclass_from(Weights, "weights", value["weights"]),
        _dataclass_from(Activations, "activations", activations)
        if activations is not None
        else None,
    )


def recipe_scheme(value: str | Mapping[str, object] | Scheme) -> Scheme:
    """Return the scheme that a recipe asks for; raises what `scheme_from` does, and for one that no
    backend quantizes to.
    """
    scheme = value if isinstance(value, Scheme) else scheme_from(value)
    if scheme.weights.format in CODEBOOKS:
        raise _invalid(
            f"scheme {scheme.name}: no backend quantizes to codes of a codebook",
            hint="`qtool serve --quantization bitsandbytes` rounds to nf4 while it loads",
        )
    return scheme


def _dataclass_from(kind: Any, where: str, value: Any) -> Any:
    if not isinstance(value, Mapping):
        raise _invalid(f"{where}: expected a mapping, found {value!r}")
    _refuse_unknown_keys(where, value, {field.name for field in fields(kind)})
    if "format" not in value:
        raise _invalid(f"{where}: `format` is missing", hint=f"one of {', '.join(FORMAT_BITS)}")
    for key, item in value.items():
        if type(item) not in _KINDS[key]:
            raise _invalid(
                f"{where}: `{key}` cannot be {item!r}",
                hint=f"`{key}` is {_KINDS[key][0].__name__}, e.g. {_EXAMPLES[_KINDS[key][0]]}",
            )
    values = dict(value)
    if values.get("block") is not None:
        values["block"] = tuple(values["block"])
    return kind(**values)


_KINDS: Mapping[str, tuple[type, ...]] = {
    **dict.fromkeys(("format", "granularity", "scale"), (str,)),
    **dict.fromkeys(("symmetric", "dynamic", "offset"), (bool,)),
    "group_size": (int, NoneType),
    "block": (list, tuple, NoneType),
}
_EXAMPLES: Mapping[type, str] = {str: "int4", bool: "true", int: "128", list: "[128, 128]"}


def _refuse_unknown_keys(where: str, value: Mapping[str, object], known: set[str]) -> None:
    for key in value:
        if key not in known:
            hint = nearest(str(key), known) or f"known: {', '.join(sorted(known))}"
            raise _invalid(f"{where}: unknown key `{key}`", hint=hint)


def _check_block(granularity: str, block: tuple[int, int] | None) -> None:
    if (granularity == "block") != (block is not None):
        raise _invalid(f"weights: granularity `{granularity}` and block {block} do not go together")
    if block is None:
        return
    if len(block) != 2 or any(type(size) is not int or size < 1 for size in block):
        raise _invalid(
            "weights: block must be two positive whole numbers, rows and columns, found "
            f"{list(block)!r}"
        )


def _check_numbers(
    where: str, format: str, granularity: str, group_size: int | None, scale: str
) -> None:
    if format not in FORMAT_BITS:
        raise _invalid(
            f"{where}: unknown format `{format}`",
            hint=nearest(format, FORMAT_BITS) or f"one of {', '.join(FORMAT_BITS)}",
        )
    if granularity not in Granularity.__args__:  # type: ignore[attr-defined]
        raise _invalid(
            f"{where}: unknown granularity `{granularity}`",
            hint=nearest(granularity, Granularity.__args__),  # type: ignore[attr-defined]
        )
    if scale in ("e4m3", "e8m0") and not format.startswith("fp"):
        raise _invalid(f"{where}: {format} has float scales, not {scale}")
    if scale not in SCALE_BITS:
        raise _invalid(f"{where}: unknown scale `{scale}`", hint=f"one of {', '.join(SCALE_BITS)}")
    _check_group_size(where, granularity, group_size)


def _check_group_size(where: str, granularity: str, group_size: int | None) -> None:
    if (granularity == "group") != (group_size is not None):
        raise _invalid(
            f"{where}: granularity `{granularity}` and group_size {group_size} do not go together"
        )
    if group_size is not None and (not isinstance(group_size, int) or group_size < 1):
        raise _invalid(
            f"{where}: group_size must be a positive whole number, found {group_size!r}",
            hint="usual sizes are 32, 64 and 128",
        )


def _invalid(message: str, *, hint: str = "") -> RecipeRefused:
    return RecipeRefused("E_SCHEME", message, hint=hint)


_INT8_TOKEN = Activations("int8", "token")
_FP8_TOKEN = Activations("fp8", "token")
_NVFP4_INPUT = Activations("fp4", "group", 16, scale="e4m3")


def _int_group(bits: int, **options: Any) -> Weights:
    return Weights(f"int{bits}", "group", 128, **options)  # type: ignore[arg-type]


GGUF_INPUTS = Activations("int8", "group", 32)  # as llama.cpp rounds inputs on a CPU

SCHEMES: Mapping[str, Scheme] = {
    "FP8": Scheme(Weights("fp8", "tensor"), Activations("fp8", "tensor", dynamic=False)),
    "FP8_DYNAMIC": Scheme(Weights("fp8", "channel"), _FP8_TOKEN),
    "FP8_BLOCK": Scheme(
        Weights("fp8", "block", block=(128, 128)), Activations("fp8", "group", 128)
    ),
    "FP8_W8A16": Scheme(Weights("fp8", "channel")),
    "FP8_BLOCK_W8A16": Scheme(Weights("fp8", "block", block=(128, 128))),
    "W8A8": Scheme(Weights("int8", "channel"), _INT8_TOKEN),
    "W8A8_STATIC": Scheme(Weights("int8", "channel"), Activations("int8", "tensor", dynamic=False)),
    "W8A16": Scheme(_int_group(8)),
    "W8A16_CHANNEL": Scheme(Weights("int8", "channel")),
    "W7A16": Scheme(_int_group(7)),
    "W6A16": Scheme(_int_group(6)),
    "W5A16": Scheme(_int_group(5)),
    "W4A16": Scheme(_int_group(4)),
    "W4A16_ASYM": Scheme(_int_group(4, symmetric=False)),
    "W3A16": Scheme(_int_group(3)),
    "W2A16": Scheme(_int_group(2)),
    "W4A8": Scheme(_int_group(4), _INT8_TOKEN),
    "W4AFP8": Scheme(_int_group(4), _FP8_TOKEN),
    "W4AFP8_STATIC": Scheme(_int_group(4), Activations("fp8", "tensor", dynamic=False)),
    "NF4": Scheme(Weights("nf4", "group", 64)),
    "BNB_FP4": Scheme(Weights("bnb_fp4", "group", 64)),
    "NVFP4": Scheme(Weights("fp4", "group", 16, scale="e4m3"), _NVFP4_INPUT),
    "NVFP4A16": Scheme(Weights("fp4", "group", 16, scale="e4m3")),
    "NVFP4AFP8": Scheme(
        Weights("fp4", "group", 32, scale="e4m3"), Activations("fp8", "tensor", dynamic=False)
    ),
    "MXFP4": Scheme(
        Weights("fp4", "group", 32, scale="e8m0"), Activations("fp4", "group", 32, scale="e8m0")
    ),
    "MXFP4A16": Scheme(Weights("fp4", "group", 32, scale="e8m0")),
    "MXFP4AFP8": Scheme(
        Weights("fp4", "group", 32, scale="e8m0"), Activations("fp8", "group", 32, scale="e8m0")
    ),
    "MXFP8": Scheme(
        Weights("fp8", "group", 32, scale="e8m0"), Activations("fp8", "group", 32, scale="e8m0")
    ),
    "MXFP8A16": Scheme(Weights("fp8", "group", 32, scale="e8m0")),
}
