"""AMD Quark: FP8, INT8, MXFP4, MXFP8 and NVFP4; read only.

The tensors say what weights are, and the config what inputs are rounded to: for all layers, or for
those that a pattern names.

Source: vLLM 0.32, `layers/quantization/quark`; SGLang 0.5.23, `layers/quantization/quark`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import TypeVar

from qtool.checkpoint import Checkpoint
from qtool.checkpoint.strict_json import Json
from qtool.formats.layout import Layout, Parts, QuantizedModule, modules_of, refused
from qtool.formats.modelopt_config import name_matcher
from qtool.formats.patterns import Names
from qtool.formats.scaled import INPUT_SCALES, is_quantized, kept_tensors, read, weights_of
from qtool.modules import ONE_EXPERT, has_key_scales
from qtool.scheme import SCHEMES, Activations, Format, Scheme, Weights

__all__ = ["detect", "matches_config", "read"]

FORMATS: Mapping[str, Format] = {
    "fp8_e4m3": "fp8",
    "fp8_e4m3fn": "fp8",
    "int8": "int8",
    "fp4": "fp4",
    "fp4_e2m1": "fp4",
}
INPUTS: Mapping[tuple[str, str, object], Activations] = {  # format, qscheme and group_size
    ("fp8", "per_tensor", None): Activations("fp8", "tensor"),
    # of the input: a row of it is a token
    ("fp8", "per_channel", None): Activations("fp8", "token"),
    ("fp8", "per_token", None): Activations("fp8", "token"),
    ("fp8", "per_group", 128): Activations("fp8", "group", 128),
    ("fp8", "per_group", 32): Activations("fp8", "group", 32, scale="e8m0"),
    ("fp4", "per_group", 32): Activations("fp4", "group", 32, scale="e8m0"),
    ("int8", "per_tensor", None): Activations("int8", "tensor"),
    ("int8", "per_channel", None): Activations("int8", "token"),
    ("int8", "per_token", None): Activations("int8", "token"),
}

T = TypeVar("T")
# a pattern without such takes all experts of a layer alike
TELLS_NUMBERS_APART = re.compile(r"(?<!layers\.)(?<!layers\.\d)(?<!layers\.\d\d)\d|[?\[\\]")


def matches_config(config: Json) -> bool:
    """Whether ``config`` is of this format."""
    return config.get("quant_method") == "quark"


def detect(checkpoint: Checkpoint, config: Json) -> Layout:
    """Return the layout that ``config`` and the tensors of ``checkpoint`` describe together."""
    settings_of = _layer_settings(config)
    entries = config.get("exclude") or []
    excluded = _by_name(_matcher(entries), entries)
    modules: dict[str, QuantizedModule] = {}
    warnings: list[str] = []
    for parts in modules_of(checkpoint):
        if is_quantized(parts):
            module = _module(parts, settings_of(parts.name))
            modules[parts.name] = module
            if module.scheme.activations is None and _has_input_scale(parts):
                warnings.append(
                    f"`{parts.name}` has a scale of inputs that the config leaves in 16 bits"
                )
            if excluded(parts.name):
                warnings.append(f"`{parts.name}` is quantized and the config excludes it")
    kv_cache = "fp8" if has_key_scales(checkpoint.tensors) else None
    return Layout("quark", modules, kv_cache, tuple(warnings))


def _layer_settings(config: Json) -> Callable[[str], Json]:
    """Return the function that gives the settings of a layer: the first pattern that matches its
    name, or else those of all layers.
    """
    layers = config.get("layer_quant_config") or {}
    patterns = [(_matcher([pattern]), settings) for pattern, settings in layers.items()]
    by_type = (config.get("layer_type_quant_config") or {}).get("Linear")
    others: Json = by_type or config.get("global_quant_config") or {}

    def find(name: str) -> Json:
        return next((settings for matches, settings in patterns if matches(name)), others)

    return _by_name(find, layers)


def _by_name(find: Callable[[str], T], patterns: Iterable[str]) -> Callable[[str], T]:
    """Return ``find``, which asks ``patterns``, faster: once for all experts of a layer where no
    pattern tells them apart, as there may be thousands.
    """
    cached = cache(find)
    if any(map(TELLS_NUMBERS_APART.search, patterns)):
        return cached
    return lambda name: cached(ONE_EXPERT.sub(r"\1.0.", name))


def _matcher(entries: Sequence[str]) -> Callable[[str], bool]:
    """Return a function that says whether a name is one of ``entries``: names, globs, and regular
    expressions behind ``re:``.
    """
    regexes = Names([entry for entry in entries if entry.startswith("re:")])
    is_glob = name_matcher([entry for entry in entries if not entry.startswith("re:")])
    return lambda name: is_glob(name) or name in regexes


def _module(parts: Parts, settings: Json) -> QuantizedModule:
    spec = _first(settings.get("weight"))
    if parts["weight"].dtype == "I32" or spec.get("dtype") in ("int4", "uint4"):
        raise _not_read(parts, "packed int4")
    if str(spec.get("dtype")).startswith("fp6"):
        raise _not_read(parts, "FP6")
    weights, shape = weights_of(parts, in_blocks=spec.get("qscheme") == "per_block")
    _check_weights(parts, spec, weights)
    activations = _activations(parts, settings.get("input_tensors"), weights)
    if activations and activations.needs_data and not _has_input_scale(parts):
        parts["input_scale"]
    return QuantizedModule(parts.name, Scheme(weights, activations), shape, kept_tensors(parts))


def _has_input_scale(parts: Parts) -> bool:
    return any(suffix in parts for suffix in INPUT_SCALES)


def _check_weights(parts: Parts, spec: Json, weights: Weights) -> None:
    """Refuse a layer whose tensors are not what its settings say."""
    said = FORMATS.get(str(spec.get("dtype"))), spec.get("qscheme")
    if said != (weights.format, f"per_{weights.granularity}"):
        raise refused(
            "E_QUANT_CONFIG",
            f"`{parts.name}`: the config says {spec.get('dtype')} {spec.get('qscheme')}, and its "
            f"tensors hold {weights}",
        )


def _first(settings: object) -> Json:
    """Return the settings of one tensor; of NVFP4's two levels the first."""
    first = settings[0] if isinstance(settings, list) else settings
    if not isinstance(first, Mapping):
        raise TypeError(f"the settings of a tensor are {first!r}")
    return first


def _activations(parts: Parts, settings: object, weights: Weights) -> Activations | None:
    """Return what an input is rounded to."""
    if settings is None:
        return None
    spec = _first(settings)
    dtype, qscheme = str(spec.get("dtype")), str(spec.get("qscheme"))
    if isinstance(settings, list) and len(settings) > 1:
        if weights == SCHEMES["NVFP4"].weights and FORMATS.get(dtype) == "fp4":
            return SCHEMES["NVFP4"].activations
        raise _not_read(parts, f"{dtype} inputs in two steps")
    inputs = INPUTS.get((FORMATS.get(dtype, ""), qscheme, spec.get("group_size")))
    is_static = spec.get("is_dynamic") is not True
    if inputs is None or (is_static and inputs.granularity != "tensor"):
        raise _not_read(parts, f"{dtype} {qscheme} inputs")
    is_asymmetric = inputs.format == "int8" and spec.get("symmetric") is False
    return replace(inputs, dynamic=not is_static, symmetric=not is_asymmetric)


def _not_read(parts: Parts, what: str) -> Exception:
    return refused(
        "E_QUANT_ALGORITHM",
        f"`{parts.name}`: Quark's {what} is not read",
        "vLLM and SGLang may run it on AMD GPUs; read are FP8, INT8, MXFP4, MXFP8 and NVFP4",
    )
