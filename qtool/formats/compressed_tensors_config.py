"""The quantization config of compressed-tensors: read into groups, written from schemes.

Source: compressed-tensors 0.19, `quantization/quant_args.py`, `utils/match.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from qtool.checkpoint.strict_json import Json, JsonDict
from qtool.formats.layout import PER_HEAD, QuantizedModule, by_scheme, refused
from qtool.formats.patterns import Names, config_patterns
from qtool.modules import is_embedding, is_expert, is_head
from qtool.scheme import FORMAT_BITS, Activations, Format, Scheme, Weights, number_format

VERSION = "0.19.0"  # from 0.18 on, codes of 3, 5, 6 and 7 bits are packed densely
ACT_ORDER_VERSION = "0.18.0"  # the last that takes a g_idx
CLASS = "Linear"  # a target that means every linear layer
EMBEDDING = "Embedding"
EXPERTS = "Experts"
SCALE_DTYPE = {"e4m3": "torch.float8_e4m3fn", "e8m0": "torch.uint8"}
SPARSE_FORMATS = ("marlin-24", "sparse-24-bitmask", "sparse-bitmask")
KV_CACHE = Activations("fp8", "tensor", dynamic=False)


@dataclass(frozen=True)
class Arguments:
    """The `QuantizationArgs` of the weights or the inputs of a group."""

    bits: int
    is_float: bool
    symmetric: bool
    dynamic: bool
    strategy: str
    """As the config names it, or as it follows from the group size."""
    group_size: int | None
    block_structure: str | Sequence[int] | None
    scale_dtype: str | None
    """Old files leave it out, and mean that of the MX formats where scales have one."""

    @property
    def format(self) -> Format:
        """The format of the numbers, e.g. ``int4``."""
        return number_format(self.bits, is_float=self.is_float)

    @property
    def block(self) -> tuple[int, int] | None:
        """Rows and columns under one scale."""
        sizes = self.block_structure
        if isinstance(sizes, str):
            sizes = [int(size) for size in sizes.split("x")]
        return (int(sizes[0]), int(sizes[1])) if sizes else None

    @property
    def is_mx(self) -> bool:
        """Whether inputs have scales that are powers of two."""
        is_e8m0 = self.scale_dtype == SCALE_DTYPE["e8m0"]
        return self.is_float and self.group_size == 32 and is_e8m0


@dataclass(frozen=True, eq=False)
class Group:
    """A group of the config that quantizes weights."""

    targets: tuple[str, ...]
    weights: Arguments
    inputs: Arguments | None
    """None when inputs stay in 16 bits."""


class Targets:
    """Which group each layer is in."""

    def __init__(self, groups: Sequence[Group]) -> None:
        self._by_name = _targets_by_name(groups)
        self._by_class: dict[str, Group] = {}
        for group in groups:
            for target in group.targets:
                self._by_class.setdefault(class_of_target(target), group)

    def group_of(self, name: str) -> Group | None:
        """Return the group of the layer ``name``: by name, else by class."""
        by_name = next((group for names, group in self._by_name if name in names), None)
        return by_name or next(filter(None, map(self._by_class.get, classes_of(name))), None)

    def names(self, name: str) -> bool:
        """Whether a target names the layer ``name``, so that its class does not matter."""
        return any(name in names for names, _ in self._by_name)


def class_of_target(target: str) -> str:
    """Return the class of modules that ``target`` means, `CLASS`, `EMBEDDING` or `EXPERTS`; empty
    for a name.

    Classes of engines and of transformers have these words in their names, e.g. ``RoutedExperts``,
    ``Qwen3MoeExperts``, ``VocabParallelEmbedding``, ``QKVParallelLinear``.
    """
    if "." in target or target.startswith("re:") or not target[:1].isupper():
        return ""
    if EXPERTS in target or "MoE" in target or "Moe" in target:
        return EXPERTS
    return next((each for each in (EMBEDDING, CLASS) if each in target), "")


def classes_of(name: str) -> tuple[str, ...]:
    """Return the classes of the module ``name``, as far as its name tells: its own first."""
    if is_embedding(name):
        return (EMBEDDING,)
    return (EXPERTS, CLASS) if is_expert(name) else (CLASS,)


def check_dense(config: Json, where: object) -> None:
    """Raise CheckpointRefused when the weights are sparse."""
    sparsity = (config.get("sparsity_config") or {}).get("format", "dense")
    if sparsity != "dense" or config.get("format") in SPARSE_FORMATS:
        raise refused(
            "E_SPARSE",
            f"{where}: sparse compressed-tensors ({sparsity}, {config.get('format')}) is not read",
            "quantize the original again, without sparsity",
        )


def weight_groups(config: Json) -> list[Group]:
    """Return the groups of ``config`` that quantize weights."""
    groups = []
    for name, group in (config.get("config_groups") or {}).items():
        if isinstance(group, list):
            raise refused(
                "E_QUANT_PRESET",
                f"config group `{name}` is only a preset's name, which compressed-tensors reads "
                "and never writes",
                "write the group out, with `targets` and `weights`",
            )
        if group.get("weights"):
            groups.append(_group(group))
    return groups


def kv_cache_format(config: Json) -> str | None:
    """Return the format of the KV cache, e.g. ``fp8``; None when it is not quantized."""
    args = config.get("kv_cache_scheme")
    if not args:
        return None
    return f"{'fp' if args.get('type', 'int') == 'float' else 'int'}{int(args.get('num_bits', 8))}"


def has_online_transforms(config: Json) -> bool:
    """Whether ``config`` rotates inputs at run time, beyond what is merged into the weights."""
    groups = (config.get("transform_config") or {}).get("config_groups") or {}
    return any(
        not str(apply.get("location", "")).startswith("weight_")
        for group in groups.values()
        for apply in group.get("apply") or []
    )


def tensor_format(scheme: Scheme) -> str:
    """Return the name of the tensors' layout, by the rules of compressed-tensors 0.18 and up; but
    integers with FP8 inputs are packed, as vLLM's kernel for them takes nothing else.
    """
    weights = scheme.weights
    if weights.scale == "e8m0":
        return "mxfp4-pack-quantized" if weights.format == "fp4" else "mxfp8-quantized"
    if weights.format == "fp4":
        return "nvfp4-pack-quantized"
    if weights.format.startswith("int"):
        activations = scheme.activations
        is_packed = activations is None or (weights.bits < 8 and activations.format == "fp8")
        return "pack-quantized" if is_packed else "int-quantized"
    return "float-quantized" if scheme.activations else "naive-quantized"


def quantization_config(
    modules: Sequence[QuantizedModule], unquantized: Sequence[str], kv_cache: str | None
) -> dict[str, JsonDict]:
    """Return the config: one group for each scheme, by class where there is one, else by name."""
    schemes = by_scheme(modules)
    groups = {
        f"group_{index}": _group_config(scheme, members, is_only=len(schemes) == 1)
        for index, (scheme, members) in enumerate(schemes.items())
    }
    formats = {group["format"] for group in groups.values()}
    config = {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": list(unquantized),
        "kv_cache_scheme": _kv_cache_scheme(kv_cache) if kv_cache else None,
        "global_compression_ratio": None,
        "version": ACT_ORDER_VERSION if any(module.act_order for module in modules) else VERSION,
    }
    return {"config.json": {"quantization_config": config}}


def only_targets(names: Iterable[str]) -> list[str]:
    """Return the targets of a group that has all quantized layers: their classes, and the output
    head by its name, because no engine matches it by class.

    Args:
        names: of the layers.
    """
    names = list(names)
    classes = dict.fromkeys(classes_of(name)[-1] for name in names)
    return [*classes, *(name for name in names if is_head(name))]


def _group(group: Json) -> Group:
    targets = group.get("targets") or ()
    inputs = group.get("input_activations")
    return Group(
        targets=(targets,) if isinstance(targets, str) else tuple(targets),
        weights=_arguments(group["weights"]),
        inputs=_arguments(inputs) if inputs else None,
    )


def _arguments(args: Json) -> Arguments:
    size = args.get("group_size")
    return Arguments(
        bits=int(args.get("num_bits", 8)),
        is_float=args.get("type", "int") == "float",
        symmetric=bool(args.get("symmetric", True)),
        dynamic=bool(args.get("dynamic", False)),
        strategy=str(args.get("strategy") or _strategy_of(size)),
        group_size=size,
        block_structure=args.get("block_structure"),
        scale_dtype=args.get("scale_dtype", SCALE_DTYPE["e8m0"]),
    )


def _strategy_of(group_size: int | None) -> str:
    """Return the strategy that a group size means where the config names none."""
    if group_size is None:
        return "tensor"
    return "group" if group_size > 0 else "channel"


def _targets_by_name(groups: Sequence[Group]) -> list[tuple[Names, Group]]:
    """Return what each group targets by name: exact names first, then patterns, the smallest string
    first, as compressed-tensors takes them.
    """
    exact, patterns = [], []
    for index, group in enumerate(groups):
        names = [target for target in group.targets if not class_of_target(target)]
        exact.append((Names(name for name in names if not name.startswith("re:")), group))
        patterns += [(name, index) for name in names if name.startswith("re:")]
    compiler = config_patterns()
    return exact + [
        (Names([pattern], compiler), groups[index]) for pattern, index in sorted(patterns)
    ]


def _group_config(scheme: Scheme, members: Sequence[QuantizedModule], *, is_only: bool) -> JsonDict:
    names = [module.name for module in members]
    act_order = any(module.act_order for module in members)
    return {
        "targets": only_targets(names) if is_only else names,
        "weights": _arguments_config(scheme.weights, act_order=act_order),
        "input_activations": _arguments_config(scheme.activations) if scheme.activations else None,
        "output_activations": None,
        "format": tensor_format(scheme),
    }


def _arguments_config(numbers: Weights | Activations, *, act_order: bool = False) -> JsonDict:
    """Return the `QuantizationArgs` that stand for ``numbers``."""
    two_levels = numbers.scale == "e4m3"
    block: tuple[int, int] | None = None
    dynamic: bool | str = False
    if isinstance(numbers, Weights):
        block = numbers.block
    elif numbers.dynamic:
        dynamic = "local" if two_levels else True
    return {
        "num_bits": FORMAT_BITS[numbers.format],
        "type": "float" if numbers.format.startswith("fp") else "int",
        "symmetric": numbers.symmetric,
        "strategy": "tensor_group" if two_levels else numbers.granularity,
        "group_size": numbers.group_size,
        "block_structure": list(block) if block else None,
        "dynamic": dynamic,
        "actorder": "group" if act_order else None,
        "scale_dtype": SCALE_DTYPE.get(numbers.scale),
        "zp_dtype": None if numbers.symmetric else "torch.int8",
    }


def _kv_cache_scheme(kv_cache: str) -> Mapping[str, object]:
    scheme = _arguments_config(KV_CACHE)
    if kv_cache.endswith(PER_HEAD):
        scheme["strategy"] = "attn_head"
    return scheme
