"""The rotary embedding of a GGUF file, as config.json has it.

Source: llama.cpp, `convert_hf_to_gguf.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from qtool.checkpoint.gguf_fields import SCALING, Fields
from qtool.checkpoint.gguf_names import LLAMA3_FACTORS, LONG_FACTORS
from qtool.checkpoint.strict_json import JsonDict, refused


def rope_fields(fields: Fields, config: JsonDict) -> JsonDict:
    """Return the fields of the rotary embedding."""
    head_dim = config["head_dim"]
    if fields.size("attention.value_length") not in (None, head_dim):
        raise fields.refused("attention.value_length", f"{head_dim}, as attention.key_length")
    rotated = fields.size("rope.dimension_count") or head_dim
    found = _partial(fields, rotated, head_dim)
    scaling = _rope_scaling(fields, config, rotated)
    if scaling is None and fields.architecture.name == "gpt-oss":
        scaling = {"rope_type": "default"}  # a config that says nothing has YaRN in transformers
    if scaling:
        found["rope_scaling"] = scaling
        if scaling["rope_type"] == "longrope":
            found["original_max_position_embeddings"] = scaling["original_max_position_embeddings"]
    return found


def _partial(fields: Fields, rotated: int, head_dim: int) -> JsonDict:
    """Return what is said where only some channels of a head rotate, as in some of Phi."""
    if rotated == head_dim:
        return {}
    if fields.architecture.name != "phi3" or rotated > head_dim:
        raise fields.refused("rope.dimension_count", f"{head_dim}, all channels of a head")
    return {"partial_rotary_factor": rotated / head_dim}


def _rope_scaling(fields: Fields, config: JsonDict, rotated: int) -> JsonDict | None:
    if freqs := fields.factors(LLAMA3_FACTORS):
        return _llama3_scaling(fields, config, freqs, rotated)
    if any(name in fields.header.tensors for name in LONG_FACTORS):
        return _long_scaling(fields, rotated)
    if fields.number(f"{SCALING}attn_factor") not in (None, 1):
        raise fields.refused(f"{SCALING}attn_factor", "1, but for factors of Phi 3")
    return _scaling_of_type(fields)


def _scaling_of_type(fields: Fields) -> JsonDict | None:
    """Return the scaling that the metadata name, and no tensor has."""
    kind = fields.found.get(f"{SCALING}type", "none")
    factor = fields.number(f"{SCALING}factor")
    if kind == "none":
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor} if factor not in (None, 1) else None
    if kind == "yarn" and factor:
        return _yarn_scaling(fields, factor)
    raise fields.refused(f"{SCALING}type", "none, linear or yarn, with its factor")


def _long_scaling(fields: Fields, rotated: int) -> JsonDict:
    """Return the scaling of Phi 3, with a factor for each frequency."""
    long, short = (fields.factors(name) or [] for name in LONG_FACTORS)
    original = fields.size(f"{SCALING}original_context_length")
    if not original or {len(long), len(short)} != {rotated // 2}:
        raise refused(
            "E_GGUF_ROPE",
            f"{fields.file}: long and short factors of the rotary embedding, or "
            "rope.scaling.original_context_length, are missing or do not fit",
        )
    scaling: JsonDict = {
        "rope_type": "longrope",
        "long_factor": long,
        "short_factor": short,
        "original_max_position_embeddings": original,
    }
    attention = fields.number(f"{SCALING}attn_factor")
    return scaling if attention is None else {**scaling, "attention_factor": attention}


def _yarn_scaling(fields: Fields, factor: float) -> JsonDict:
    original = fields.size(f"{SCALING}original_context_length")
    if not original:
        raise fields.refused(f"{SCALING}original_context_length", "the context before scaling")
    scaling: JsonDict = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": original,
    }
    if fields.architecture.name == "gpt-oss":
        scaling.update(truncate=False, beta_fast=32.0, beta_slow=1.0)
    for key in ("beta_fast", "beta_slow"):
        if (value := fields.number(f"{SCALING}yarn_{key}")) is not None:
            scaling[key] = value
    return scaling


def _llama3_scaling(fields: Fields, config: JsonDict, freqs: list[float], rotated: int) -> JsonDict:
    """Return the scaling of Llama 3 that the converter made ``freqs`` of.

    Raises: CheckpointRefused, when there is none.
    """
    factor = max(freqs)
    for original in (8192, *(1 << power for power in range(5, 21))):
        scaling = {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": original,
        }
        expected = llama3_factors(scaling, config.get("rope_theta") or 10_000.0, rotated)
        if len(freqs) == len(expected) and all(
            math.isclose(one, other, rel_tol=1e-5)
            for one, other in zip(freqs, expected, strict=True)
        ):
            return scaling
    raise refused(
        "E_GGUF_ROPE",
        f"{fields.file}: the frequencies in `rope_freqs.weight` are not those of Llama 3's scaling",
        "llama.cpp may load it; or take the safetensors version",
    )


def llama3_factors(scaling: Mapping[str, Any], theta: float, rotated: int) -> list[float]:
    """Return by what Llama 3's ``scaling`` divides each of the rotated / 2 frequencies.

    Source: transformers 5.17, `_compute_llama3_parameters`.
    """
    factor, low, high = (
        float(scaling[key]) for key in ("factor", "low_freq_factor", "high_freq_factor")
    )
    original = scaling["original_max_position_embeddings"]
    factors = []
    for channel in range(0, rotated, 2):
        wavelength = 2 * math.pi * theta ** (channel / rotated)
        if wavelength < original / high:
            factors.append(1.0)
        elif wavelength > original / low:
            factors.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return factors
