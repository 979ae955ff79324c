"""AMD Quark: FP8, INT8, MXFP4, MXFP8 and NVFP4; read only.

The tensors say what weights are, and the config what inputs are rounded to: for all layers, or for
those that a pattern names.

Source: vLLM 0.32, `layers/quantization/quark`; SGLang 0.5.23, `layers/quantization/quark`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from qtool.checkpoint import Checkpoint
from qtool.checkpoint.strict_json import Json
from qtool.formats.layout import Layout, Parts, QuantizedModule, modules_of, refused
from qtool.formats.modelopt_config import name_matcher
from qtool.formats.patterns import Names
from qtool.formats.scaled import is_quantized, kept_tensors, read, weights_of
from qtool.modules import has_key_scales
from qtool.scheme import SCHEMES, Activations, Format, Granularity, Scheme

__all__ = ["detect", "matches_config", "read"]

FORMATS: Mapping[str, Format] = {
    "fp8_e4m3": "fp8",
    "fp8_e4m3fn": "fp8",
    "int8": "int8",
    "fp4": "fp4",
    "fp4_e2m1": "fp4",
}
GRANULARITIES: Mapping[str, Granularity] = {
    "per_tensor": "tensor",
    "per_channel": "token",  # of the input: a row of it is a token
    "per_token": "token",
    "per_group": "group",
}
MX_GROUP = 32


def matches_config(config: Json) -> bool:
    """Whether ``config`` is of this format."""
    return config.get("quant_method") == "quark"


def detect(checkpoint: Checkpoint, config: Json) -> Layout:
    """Return the layout that ``config`` and the tensors of ``checkpoint`` describe together."""
    settings_of = _layer_settings(config)
    excluded = _matcher(config.get("exclude") or [])
    modules: dict[str, QuantizedModule] = {}
    warnings: list[str] = []
    for parts in modules_of(checkpoint):
        if is_quantized(parts):
            modules[parts.name] = _module(parts, settings_of(parts.name))
            if excluded(parts.name):
                warnings.append(f"`{parts.name}` is quantized and the config excludes it")
    kv_cache = "fp8" if has_key_scales(checkpoint.tensors) else None
    return Layout("quark", modules, kv_cache, tuple(warnings))


def _layer_settings(config: Json) -> Callable[[str], Json]:
    """Return the function that gives the settings of a layer: the first pattern that matches its
    name, or else those of all layers.
    """
    patterns = [
        (_matcher([pattern]), settings)
        for pattern, settings in (config.get("layer_quant_config") or {}).items()
    ]
    by_type = (config.get("layer_type_quant_config") or {}).get("Linear")
    others: Json = by_type or config.get("global_quant_config") or {}

    def settings_of(name: str) -> Json:
        return next((settings for matches, settings in patterns if matches(name)), others)

    return settings_of


def _matcher(entries: Sequence[str]) -> Callable[[str], bool]:
    """Return a function that says whether a name is one of ``entries``: names, globs, and regular
    expressions behind ``re:``.
    """
    regexes = Names([entry for entry in entries if entry.startswith("re:")])
    is_glob = name_matcher([entry for entry in entries if not entry.startswith("re:")])
    return lambda name: is_glob(name) or name in regexes


def _module(parts: Parts, settings: Json) -> QuantizedModule:
    weight = _only(settings.get("weight"))
    if parts["weight"].dtype == "I32" or weight.get("dtype") in ("int4", "uint4"):
        raise _not_read(parts, "packed int4")
    if str(weight.get("dtype")).startswith("fp6"):
        raise _not_read(parts, "FP6")
    weights, shape = weights_of(parts, in_blocks=weight.get("qscheme") == "per_block")
    activations = _activations(parts, settings.get("input_tensors"))
    if activations and activations.needs_data and not _has_input_scale(parts):
        parts["input_scale"]
    return QuantizedModule(parts.name, Scheme(weights, activations), shape, kept_tensors(parts))


def _has_input_scale(parts: Parts) -> bool:
    return "input_scale" in parts or "input_scale_2" in parts


def _only(settings: object) -> Json:
    """Return the settings of one tensor; of NVFP4's two levels the first."""
    first = settings[0] if isinstance(settings, list) and settings else settings
    return first if isinstance(first, Mapping) else {}


def _activations(parts: Parts, settings: object) -> Activations | None:
    """Return what an input is rounded to."""
    if not settings:
        return None
    if isinstance(settings, list) and len(settings) > 1:
        return SCHEMES["NVFP4"].activations
    spec = _only(settings)
    dtype, granularity = str(spec.get("dtype")), GRANULARITIES.get(str(spec.get("qscheme")))
    if dtype not in FORMATS or granularity is None:
        raise _not_read(parts, f"{dtype} inputs {spec.get('qscheme')}")
    size = spec.get("group_size") if granularity == "group" else None
    return Activations(
        FORMATS[dtype],
        granularity,
        size,
        dynamic=spec.get("is_dynamic") is True,
        symmetric=spec.get("symmetric") is not False,
        scale="e8m0" if size == MX_GROUP else "float",
    )


def _not_read(parts: Parts, what: str) -> Exception:
    return refused(
        "E_QUANT_ALGORITHM",
        f"`{parts.name}`: Quark's {what} is not read",
        "vLLM and SGLang may run it on AMD GPUs; read are FP8, INT8, MXFP4, MXFP8 and NVFP4",
    )
