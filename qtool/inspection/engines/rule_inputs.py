"""What the rules know of a checkpoint: facts of the whole, of each linear layer as one rank holds
it, and of each fused layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

Scope = Literal["checkpoint", "module", "group"]
Stored = Literal["quantized", "plain"]
Weight = Literal["int2", "int3", "int4", "int5", "int6", "int7", "int8", "fp4", "fp8"]
Granularity = Literal["tensor", "channel", "token", "group", "block"]


@dataclass(frozen=True)
class CheckpointFacts:
    """The checkpoint as a whole, its config, and where it is to run.

    ``readable``: qtool reads the format, so that there are modules. ``algorithm`` is ModelOpt's.
        ``sidecar``: config.json says nothing of quantization. ``config_keys`` and ``weight_keys``
        are the keys found. ``order`` holds the values of ``actorder``; ``order_without_groups``:
    one stands where there are no groups. ``desc_act``: GPTQ's, with groups. ``inverse_scales``:
    those of GPTQModel's FP8, which divide.
    ``transforms`` are the locations of online rotations. ``head``: how the output head is stored.
    ``spare_heads`` are those left when the ranks have shared; ``split_cache_heads``: neither the
    ranks nor the key-value heads are a multiple of the other.
    """

    quant_method: str | None
    readable: bool
    format: (
        Literal["compressed-tensors", "modelopt", "awq", "gptq", "fp8_block", "mxfp4", "torchao"]
        | None
    )
    algorithm: str | None
    sidecar: bool
    config_keys: frozenset[str]
    weight_keys: frozenset[str]
    order: frozenset[str]
    order_without_groups: bool
    desc_act: bool
    sparse: bool
    inverse_scales: bool
    groups: int
    class_targets: bool
    transforms: frozenset[str]
    kv_cache: str | None
    kv_granularity: Literal["tensor", "channel", "token", "group", "block", "attn_head"] | None
    kv_symmetric: bool
    kv_dynamic: bool
    kv_scales: bool
    tied: bool
    head: Stored | None
    spare_heads: int
    split_cache_heads: bool
    gpu: int | None
    ranks: int


@dataclass(frozen=True)
class ModuleFacts:
    """A linear layer [``rows``, ``columns``] as one rank holds it; ``fused_rows`` with all that is
    merged into one layer with it.

    ``says`` is what the engine concludes from names and config, ``stored`` what the tensors show;
    ``says_weights`` is the weight format that
    the config gives it, and ``differs`` whether that or the group size is another. ``last``: no
    other layer is merged behind it. ``padded``: codes that do not cross words. ``native_gpu`` is
    the first GPU that computes in the scheme's formats.
    """

    role: Literal["linear", "expert", "router", "head", "tower"]
    kind: str
    stored: Stored
    says: Stored
    says_weights: Weight | None
    differs: bool
    scheme: str | None
    weights: Weight | None
    bits: int | None
    granularity: Granularity | None
    group_size: int | None
    block_rows: int | None
    block_columns: int | None
    symmetric: bool
    scale: Literal["float", "e4m3", "e8m0"] | None
    container: Literal["packed", "int8", "float8", "other"] | None
    padded: bool
    pre_scale: bool
    activations: Weight | None
    act_granularity: Granularity | None
    act_dynamic: bool
    act_symmetric: bool
    split: Literal["rows", "columns"] | None
    uneven: bool
    rows: int
    columns: int
    fused_rows: int
    last: bool
    native_gpu: int | None


@dataclass(frozen=True)
class GroupFacts:
    """Layers that an engine runs as one: ``fused`` is its name for them, ``experts`` for all
    experts of a layer.

    ``schemes`` counts the different ones, ``plain`` the layers left in 16 bits. ``scales``: whether
    the one scale that each has for its whole matrix is the same; ``orders``: whether their
    act-order is.
    """

    fused: str
    schemes: int
    plain: int
    weights: Weight | None
    scale: Literal["float", "e4m3", "e8m0"] | None
    scales: Literal["equal", "differ"]
    orders: Literal["equal", "differ"]


def _choices(kind: Any) -> dict[str, Any]:
    """Return for each field of ``kind`` the values it can have, where they are few; the type
    ``frozenset`` for a set; else None.
    """
    choices: dict[str, Any] = {}
    for name, hint in get_type_hints(kind).items():
        options = [option for option in get_args(hint) or (hint,) if option is not type(None)]
        literal = (
            hint
            if get_origin(hint) is Literal
            else next((option for option in options if get_origin(option) is Literal), None)
        )
        choices[name] = (
            (*get_args(literal), None)
            if literal
            else frozenset
            if get_origin(hint) is frozenset
            else None
        )
    return choices


FACTS: Mapping[Scope, Mapping[str, Any]] = {
    "checkpoint": _choices(CheckpointFacts),
    "module": _choices(ModuleFacts),
    "group": _choices(GroupFacts),
}


def as_dict(facts: CheckpointFacts | ModuleFacts | GroupFacts) -> dict[str, Any]:
    """Return ``facts`` by name."""
    return {field.name: getattr(facts, field.name) for field in fields(facts)}
