"""What rules can ask: values of a checkpoint, of each linear layer and of each fused layer.

A field's name is the key that rules use in YAML.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Literal, get_args, get_origin, get_type_hints

Scope = Literal["checkpoint", "module", "group"]
Stored = Literal["quantized", "plain"]
Axis = Literal["rows", "columns"]
Role = Literal["linear", "expert", "router", "head", "tower", "embedding"]
Weight = Literal[
    "int2", "int3", "int4", "int5", "int6", "int7", "int8", "fp4", "fp8", "nf4", "bnb_fp4", "iq4_nl"
]
Granularity = Literal["tensor", "channel", "token", "group", "block"]
Format = Literal[
    "compressed-tensors",
    "modelopt",
    "awq",
    "gptq",
    "fp8_block",
    "mxfp4",
    "quark",
    "torchao",
    "bitsandbytes",
    "gguf",
]
ScaleFormat = Literal["float", "e4m3", "e8m0"]
Container = Literal["packed", "int8", "float8", "other"]
DataType = Literal["int", "fp", "mx_fp", "nv_fp", "other"]
Agreement = Literal["equal", "differ"]


@dataclass(frozen=True)
class CheckpointInputs:
    """The checkpoint as a whole, its config, and the GPUs it is to run on."""

    quant_method: str | None
    named: bool
    """Whether the config itself names the method, so that it need not be told from other fields."""
    by_modelopt: bool
    """Whether the config names ModelOpt as its producer."""
    readable: bool
    """Whether qtool reads the format, so that there are modules to check."""
    format: Format | None
    algorithm: str | None
    """ModelOpt's ``quant_algo``."""
    packing: str | None
    """AutoRound's ``packing_format``."""
    data_type: DataType | None
    """The family of AutoRound's ``data_type``."""
    sidecar: bool
    """Whether the quantization config stands in a file beside config.json."""
    config_keys: frozenset[str]
    """The keys of the quantization config."""
    weight_keys: frozenset[str]
    """The keys of its groups of weights and activations."""
    order: frozenset[str]
    """The values of ``actorder``."""
    order_without_groups: bool
    """Whether some ``actorder`` stands where weights have no groups."""
    desc_act: bool
    """GPTQ's act-order, in groups."""
    sparse: bool
    inverse_scales: bool
    """Whether scales divide, as those of GPTQModel's FP8 do."""
    model_type: str | None
    """As config.json has it."""
    single_experts: bool
    """Whether experts have tensors of their own, ``experts.0.down_proj``."""
    expert_stacks: bool
    """Whether the quantized experts of a layer are one tensor, ``experts.down_proj``."""
    groups: int
    """How many config groups name weights."""
    class_targets: bool
    """Whether a config group targets a class, ``Linear``."""
    transforms: frozenset[str]
    """The locations of online rotations."""
    kv_cache: str | None
    kv_granularity: Literal["tensor", "channel", "token", "group", "block", "attn_head"] | None
    kv_symmetric: bool
    kv_dynamic: bool
    kv_scales: bool
    """Whether there are tensors with scales of the KV cache."""
    tied: bool
    """Whether the output head is the embedding matrix."""
    head: Stored | None
    """How the output head is stored; None when it has no tensor."""
    spare_heads: int
    """Attention heads that are left over when the ranks divide them."""
    split_cache_heads: bool
    """Whether neither the ranks nor the key-value heads are a multiple of the other."""
    gpu: int | None
    """Compute capability times ten."""
    ranks: int


@dataclass(frozen=True)
class SchemeInputs:
    """What the scheme of a linear layer says; all None or default for a layer in 16 bits."""

    scheme: str | None = None
    weights: Weight | None = None
    bits: int | None = None
    granularity: Granularity | None = None
    group_size: int | None = None
    block_rows: int | None = None
    block_columns: int | None = None
    symmetric: bool = True
    scale: ScaleFormat | None = None
    activations: Weight | None = None
    act_granularity: Granularity | None = None
    act_dynamic: bool = True
    act_symmetric: bool = True
    native_gpu: int | None = None
    """The first GPU that computes in the formats of the scheme."""


@dataclass(frozen=True, kw_only=True)
class ModuleInputs(SchemeInputs):
    """A linear layer as one rank holds it."""

    role: Role
    kind: str
    """The last part of its name."""
    stored: Stored
    """How its tensors are stored."""
    says: Stored
    """What the engine concludes from names and config."""
    says_weights: Weight | None
    """The weight format that the config gives it."""
    differs: bool
    """Whether its weight format or group size is not what the config gives it."""
    algorithm_here: str | None
    """Its own ``quant_algo`` in a checkpoint of MIXED_PRECISION; None when the config has none."""
    container: Container | None
    """The dtype of its codes."""
    scale_name: str | None
    """The tensor with the scales of its weight, e.g. ``weight_scale_inv``."""
    padded: bool
    """Whether codes are packed so that none crosses a word."""
    pre_scale: bool
    """Whether its input is multiplied by a factor first."""
    split: Axis | None
    """What tensor parallelism cuts."""
    uneven: bool
    """Whether the ranks cannot divide it evenly."""
    rows: int
    columns: int
    fused_rows: int
    """Rows of the layer it is merged into."""
    last: bool
    """Whether no other layer is merged behind it."""


@dataclass(frozen=True)
class GroupInputs:
    """Layers that an engine runs as one."""

    fused: str
    """The engine's name for the whole; ``experts`` for all experts of a layer."""
    schemes: int
    """How many different schemes they have."""
    plain: int
    """How many of them are left in 16 bits."""
    weights: Weight | None
    scale: ScaleFormat | None
    scales: Agreement
    """Whether the scale that each has for its whole matrix is the same."""
    orders: Agreement
    """Whether their act-order is the same."""


@dataclass(frozen=True)
class InputType:
    """What values an input can have."""

    choices: tuple[object, ...] | None = None
    """All of them, where they are few."""
    is_set: bool = False


def _input_types(kind: type) -> dict[str, InputType]:
    return {name: _input_type(hint) for name, hint in get_type_hints(kind).items()}


def _input_type(hint: object) -> InputType:
    if get_origin(hint) is frozenset:
        return InputType(is_set=True)
    for option in (hint, *get_args(hint)):
        if get_origin(option) is Literal:
            return InputType(choices=(*get_args(option), None))
    return InputType()


RULE_INPUTS: Mapping[Scope, Mapping[str, InputType]] = {
    "checkpoint": _input_types(CheckpointInputs),
    "module": _input_types(ModuleInputs),
    "group": _input_types(GroupInputs),
}


def as_dict(inputs: CheckpointInputs | ModuleInputs | GroupInputs) -> dict[str, object]:
    """Return ``inputs`` by name."""
    return {field.name: getattr(inputs, field.name) for field in fields(inputs)}
