"""The quantization config of ModelOpt: flat in config.json, nested in hf_quant_config.json.

Source: nvidia-modelopt 0.47, `torch/export/quant_utils.py`, `torch/export/unified_export_hf.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import translate
from functools import cache

from qtool.checkpoint import Checkpoint, read_json
from qtool.checkpoint.strict_json import Json, JsonDict
from qtool.formats.layout import QuantizedModule, by_scheme, check_skipped, refused
from qtool.modules import expert_stack, last_part, other_names
from qtool.scheme import FORMAT_BITS, Activations, Weights

ALGORITHM_OF_SCHEME: Mapping[str, str] = {  # spelled as ModelOpt spells them
    "FP8": "FP8",
    "FP8_DYNAMIC": "FP8_PER_CHANNEL_PER_TOKEN",
    "FP8_BLOCK_W8A16": "fp8_pb_wo",
    # TensorRT-LLM's name; ModelOpt's own blocks leave inputs in 16 bits
    "FP8_BLOCK": "FP8_BLOCK_SCALES",
    "NVFP4": "NVFP4",
    "NVFP4A16": "W4A16_NVFP4",
    "NVFP4AFP8": "W4A8_NVFP4_FP8",
    "MXFP4": "mxfp4",
    "MXFP4AFP8": "W4A8_MXFP4_FP8",
    "MXFP8": "MXFP8",
    "W4A16": "W4A16_AWQ",
    "W4AFP8_STATIC": "W4A8_AWQ",
    "W8A8_STATIC": "W8A8_SQ_PER_CHANNEL",
    "W8A16_CHANNEL": "W8A16",
}
MIXED = "MIXED_PRECISION"  # of a checkpoint whose layers have several algorithms
WITH_INPUT_FACTORS = ("W4A16_AWQ", "W4A8_AWQ", "W8A8_SQ_PER_CHANNEL", "NVFP4")
WITH_GROUPS_IN_CONFIG = ("FP8", "NVFP4", "W4A16_NVFP4", MIXED)
WILDCARDS = frozenset("*?[")
PRODUCER = {"name": "modelopt", "version": "0.47.0"}


def quantization_config(
    modules: Sequence[QuantizedModule], unquantized: Sequence[str], kv_cache: str | None
) -> dict[str, JsonDict]:
    """Return the flat config and the nested one of hf_quant_config.json, which says more.

    Raises: CheckpointRefused, when layers of one algorithm have different groups, or engines would
        skip a quantized layer.
    """
    layers = {module.name: {"quant_algo": _name(module), **_group(module)} for module in modules}
    algorithm = _shared_algorithm(layers)
    check_skipped(unquantized, modules)
    nested = {
        **_shared_options(layers, algorithm, modules),
        "kv_cache_quant_algo": "FP8" if kv_cache else None,
        "exclude_modules": list(unquantized),
    }
    flat: JsonDict = {
        "quant_method": "modelopt",
        "quant_algo": algorithm,
        "ignore": list(unquantized),
        "producer": PRODUCER,
    }
    if algorithm == MIXED:
        flat["quantized_layers"] = layers
    if algorithm in WITH_GROUPS_IN_CONFIG:
        flat["config_groups"] = _config_groups(modules, by_name=algorithm == MIXED)
    if kv_cache:
        flat["kv_cache_scheme"] = {"dynamic": False, "num_bits": 8, "type": "float"}
    return {
        "config.json": {"quantization_config": flat},
        "hf_quant_config.json": {"producer": PRODUCER, "quantization": nested},
    }


def _shared_algorithm(layers: Mapping[str, JsonDict]) -> str | None:
    """Return the algorithm of all ``layers``, or that there are several; None for no layer.

    Raises: CheckpointRefused, when layers of one algorithm have different groups.
    """
    kinds = {tuple(layer.items()) for layer in layers.values()}
    algorithms = {str(layer["quant_algo"]) for layer in layers.values()}
    if len(kinds) > len(algorithms):
        raise refused(
            "E_CANNOT_HOLD",
            f"group_size: ModelOpt has one for each algorithm, found {sorted(map(str, kinds))}",
            "convert to gptq",
        )
    if len(algorithms) > 1:
        return MIXED
    return algorithms.pop() if algorithms else None  # none: the KV cache alone is quantized


def _shared_options(
    layers: Mapping[str, JsonDict], algorithm: str | None, modules: Sequence[QuantizedModule]
) -> JsonDict:
    """Return what the nested config says of all layers, or of each where they differ."""
    options: JsonDict = {}
    if algorithm == MIXED:
        options["quantized_layers"] = layers
    elif algorithm is not None:
        options |= next(iter(layers.values()))
    options["quant_algo"] = algorithm
    if algorithm in WITH_INPUT_FACTORS and algorithm != "NVFP4":
        options["has_zero_point"] = False
        options["pre_quant_scale"] = any("pre_quant_scale" in each.tensors for each in modules)
    return options


def _config_groups(modules: Sequence[QuantizedModule], *, by_name: bool) -> JsonDict:
    """Return a group for each scheme, which targets its layers ``by_name`` or all by class."""
    return {
        f"group_{index}": {
            "weights": _arguments(scheme.weights),
            "input_activations": _arguments(scheme.activations) if scheme.activations else None,
            "targets": [module.name for module in members] if by_name else ["Linear"],
        }
        for index, (scheme, members) in enumerate(by_scheme(modules).items())
    }


def algorithm_of(module: QuantizedModule) -> str | None:
    """Return the algorithm of the scheme of ``module``; None when ModelOpt exports none."""
    scheme = module.scheme
    if scheme.weights.format == "int4" and scheme.weights.granularity == "group":
        scheme = scheme.with_group_size(128)  # the algorithms are named for any group size
    return ALGORITHM_OF_SCHEME.get(scheme.name)


def _name(module: QuantizedModule) -> str:
    name = algorithm_of(module) or ""
    return "NVFP4_AWQ" if name == "NVFP4" and "pre_quant_scale" in module.tensors else name


def _group(module: QuantizedModule) -> dict[str, int]:
    size = module.scheme.weights.group_size
    return {"group_size": size} if size and _name(module) != "mxfp4" else {}


def _arguments(numbers: Weights | Activations) -> JsonDict:
    size = {"group_size": numbers.group_size} if numbers.group_size else {}
    return {
        "dynamic": False,
        "num_bits": FORMAT_BITS[numbers.format],
        "type": "float" if numbers.format.startswith("fp") else "int",
        **size,
    }


def layer_settings(layers: Json) -> Callable[[str], Json | None]:
    """Return a function that gives the settings of a layer in ``quantized_layers``.

    They are those of its name, of the layer that engines run it in, or of a module that it is in,
    as experts are of ``mlp.experts``; under whatever prefix of the decoder.
    """

    tells_experts_apart = any(expert_stack(name) for name in layers)

    @cache
    def find(name: str) -> Json | None:
        return next((layers[each] for each in _names_of(name) if each in layers), None)

    def settings_of(name: str) -> Json | None:
        stack = None if tells_experts_apart else expert_stack(name)
        return find(f"{stack}.{last_part(name)}" if stack else name)

    return settings_of


def _names_of(name: str) -> Iterator[str]:
    """Yield the names by which a config may mean the layer ``name``, the most precise first."""
    stack = expert_stack(name)
    in_stack = (f"{stack}.{last_part(name)}",) if stack else ()
    for each in (name, *in_stack, *_parents(name)):
        yield each
        yield from other_names(each)


def _parents(name: str) -> Iterator[str]:
    while name := name.rpartition(".")[0]:
        yield name


def name_matcher(patterns: Sequence[str]) -> Callable[[str], bool]:
    """Return a function that says whether a name is one of ``patterns``, names and globs."""
    exact = frozenset(pattern for pattern in patterns if WILDCARDS.isdisjoint(pattern))
    globs = re.compile(
        "|".join(translate(pattern) for pattern in patterns if pattern not in exact) or "(?!)"
    )
    return lambda name: name in exact or globs.match(name) is not None


def merged_config(checkpoint: Checkpoint, config: Json) -> Json:
    """Return the nested and the flat config in one, flat."""
    file = checkpoint.path / "hf_quant_config.json"
    nested = (
        config.get("quantization")
        or (read_json(file).get("quantization") if file.is_file() else None)
        or {}
    )
    flat = {key: value for key, value in config.items() if value is not None}
    return {**nested, **flat}  # config.json wins where both speak


def kv_cache_format(config: Json) -> str | None:
    """Return the format of the KV cache, e.g. ``fp8``; None when it is not quantized."""
    name, scheme = config.get("kv_cache_quant_algo"), config.get("kv_cache_scheme")
    if name is None and isinstance(scheme, Mapping):
        name = f"{'FP' if scheme.get('type') == 'float' else 'INT'}{scheme.get('num_bits', 8)}"
    said = str(name or scheme or "").lower()
    if not said:
        return None
    return said if said.isalnum() else "unknown"
