"""AutoRound's own words: its tensors are those of GPTQ, AWQ, compressed-tensors or `fp8`, and its
config says so under keys of its own.

Source: auto-round 0.15, `export/export_to_autoround`; vLLM 0.33, `layers/quantization/inc`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from qtool.checkpoint.strict_json import Json, JsonDict
from qtool.errors import CheckpointRefused
from qtool.formats.layout import refused
from qtool.formats.patterns import config_patterns

METHODS = ("auto-round", "intel/auto-round")
GPTQ_PACKING = "auto_round:auto_gptq"  # where the config names none
UNQUANTIZED_BITS = 16  # from here on, what the config says of a layer means 16 bits
REGEX_CHARACTERS = frozenset("*+?^$()[]{}|\\")
ROTATIONS = ("rotation_config", "transform_config", "spinquant_config")


class LayerOptions:
    """What holds for single layers: the config's ``extra_config`` and ``block_name_to_quantize``.

    An exact name comes first, then the end of a name, then the first pattern found in a name.
    """

    def __init__(self, config: Json) -> None:
        self._config = config
        self._extra = _extra_config(config)
        self._blocks = tuple(_block_names(config))
        compiler = config_patterns()
        self._patterns = [
            (compiler.compile(f".*(?:{key})"), options)
            for key, options in self._extra.items()
            if not REGEX_CHARACTERS.isdisjoint(key)
        ]

    def options(self, name: str) -> Json | None:
        """Return the config as it holds for the layer ``name``; None when it is left out."""
        extra = self._extra_of(name)
        if extra is None:
            is_inside = not self._blocks or name.startswith(self._blocks)
            return self._config if is_inside else None
        return None if _is_unquantized(extra) else {**self._config, **extra}

    def _extra_of(self, name: str) -> Json | None:
        if name in self._extra:
            return self._extra[name]
        for key, options in self._extra.items():
            if name.endswith(f".{key}"):
                return options
        return next((options for pattern, options in self._patterns if pattern.match(name)), None)


def is_auto_round(config: Json) -> bool:
    """Whether ``config`` uses AutoRound's own words."""
    return config.get("quant_method") in METHODS


def is_from_auto_round(config: Json) -> bool:
    """Whether ``config`` was in AutoRound's words, so that `LayerOptions` read it."""
    return "extra_config" in config


def in_words_of_format(config: Json) -> Json:
    """Return ``config`` in the words of the format that its tensors have; as it is when it does not
    use AutoRound's. `LayerOptions` still read what holds for single layers.

    Raises: CheckpointRefused, for rotated inputs and packings that no format of qtool has.
    """
    if not is_auto_round(config):
        return config
    if rotation := next((key for key in ROTATIONS if config.get(key)), None):
        raise refused(
            "E_TRANSFORM",
            f"AutoRound's `{rotation}` rotates inputs at run time, which qtool does not support",
            "quantize the 16-bit model again without rotations",
        )
    LayerOptions(config)  # refuses what it cannot understand
    packing = _packing(config)
    if is_float(config) or "llm_compressor" in packing:
        return _fp8(config) if "fp8" in packing else _compressed_tensors(config)
    if (config.get("act_bits") or UNQUANTIZED_BITS) < UNQUANTIZED_BITS:
        raise _unknown_packing(f"integers with inputs of {config['act_bits']} bits, `{packing}`")
    if "awq" in packing:
        own = {"quant_method": "awq", "version": "gemm"}
    else:
        own = {"quant_method": "gptq", "checkpoint_format": _gptq_version(packing)}
    return {"extra_config": {}, **config, **own}


def is_float(config: Json) -> bool:
    """Whether the weights are floats: `fp`, `mx_fp`, `nv_fp`."""
    return "fp" in str(config.get("data_type", "int"))


def _packing(config: Json) -> str:
    """Return the packing; old files call it ``backend``, which today is what runs the model."""
    named = config.get("packing_format") or config.get("backend") or ""
    is_packing = isinstance(named, str) and ("round" in named or "gptq" in named or "awq" in named)
    return named if is_packing else GPTQ_PACKING


def _gptq_version(packing: str) -> str:
    """Return GPTQ's ``checkpoint_format``: AutoRound's own packing stores zeros as they are."""
    return "gptq" if "gptq" in packing and "gptqmodel" not in packing else "gptq_v2"


def _extra_config(config: Json) -> Mapping[str, Json]:
    """Return the options of single layers; CheckpointRefused when they are none."""
    found = config.get("extra_config") or {}
    if isinstance(found, Mapping) and all(isinstance(each, Mapping) for each in found.values()):
        return found
    raise _bad_field("extra_config", "map names of layers to their options")


def _bad_field(key: str, wanted: str) -> CheckpointRefused:
    return refused(
        "E_QUANT_CONFIG",
        f"`{key}` of the quantization config must {wanted}",
        "compare it with the config.json of the original",
    )


def _is_unquantized(extra: Json) -> bool:
    return (extra.get("bits") or 0) >= UNQUANTIZED_BITS


def _block_names(config: Json) -> Iterable[str]:
    named = config.get("block_name_to_quantize") or config.get("to_quant_block_names") or ()
    names = named.split(",") if isinstance(named, str) else named
    if not isinstance(names, list | tuple):
        raise _bad_field("block_name_to_quantize", "be a list of names")
    return (name.strip() for name in names if isinstance(name, str) and name.strip())


def _fp8(config: Json) -> JsonDict:
    """Return the config as the `fp8` method has it; a group size of two numbers is a block's."""
    size = config.get("group_size")
    block = {"weight_block_size": size} if isinstance(size, list) else {}
    kept = {key: value for key, value in config.items() if key != "group_size"}
    return {**kept, "quant_method": "fp8", **block}


def _compressed_tensors(config: Json) -> JsonDict:
    """Return the config as compressed-tensors has it: a group for each layer that differs."""
    groups = {"group_0": {"targets": ["Linear"], **_arguments(config)}}
    ignored = []
    for key, extra in _extra_config(config).items():
        target = key if REGEX_CHARACTERS.isdisjoint(key) else f"re:.*(?:{key})"
        if _is_unquantized(extra):
            ignored.append(target)
        elif extra:
            arguments = _arguments({**config, **extra})
            groups[f"group_{len(groups)}"] = {"targets": [target], **arguments}
    return {
        "quant_method": "compressed-tensors",
        "format": "mixed-precision",
        "config_groups": groups,
        "ignore": ["lm_head", *ignored],
    }


def _arguments(config: Json) -> JsonDict:
    bits = config.get("act_bits") or UNQUANTIZED_BITS
    inputs = None
    if bits < UNQUANTIZED_BITS:
        data_type = config.get("act_data_type") or config.get("data_type")
        inputs = _numbers(str(data_type), bits, config.get("act_group_size"))
        inputs["dynamic"] = "local" if inputs["strategy"] == "tensor_group" else True
    weights = _numbers(str(config.get("data_type")), config.get("bits", 4), config["group_size"])
    return {"weights": weights, "input_activations": inputs}


def _numbers(data_type: str, bits: int, group_size: object) -> JsonDict:
    """Return the `QuantizationArgs` that AutoRound's ``data_type`` stands for."""
    for beginning, make in _FAMILIES.items():
        if data_type.startswith(beginning):
            return {"num_bits": bits, "type": "float", "symmetric": True, **make(group_size)}
    raise _unknown_packing(f"`{data_type}` of {bits} bits")


_FAMILIES: Mapping[str, Callable[[object], JsonDict]] = {
    "mx_fp": lambda size: {
        "strategy": "group",
        "group_size": size,
        "scale_dtype": "torch.uint8",
        "dynamic": False,
    },
    "nv_fp": lambda size: {
        "strategy": "tensor_group",
        "group_size": size,
        "scale_dtype": "torch.float8_e4m3fn",
        "dynamic": False,
    },
}


def _unknown_packing(what: str) -> Exception:
    return refused(
        "E_KERNEL_LAYOUT",
        f"AutoRound's {what} are not read; integers, `mx_fp`, `nv_fp` and `fp` weights are",
        "auto-round reads it with transformers; or quantize the 16-bit model again",
    )
