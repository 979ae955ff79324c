"""What detection finds: each quantized linear layer as the tensors on disk show it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

from qtool.checkpoint import Checkpoint, TensorInfo
from qtool.checkpoint.strict_json import Json, JsonDict
from qtool.errors import CheckpointRefused
from qtool.modules import is_embedding, table_of_shard
from qtool.scheme import Scheme, Weights, number_format

if TYPE_CHECKING:
    from torch import Tensor

    from qtool.weight import QuantizedWeight

SCALE_DTYPES = ("F16", "BF16", "F32")
TRUNCATED = "the file is shorter than its header says: download or copy it again"
PER_HEAD = " per head"  # behind the format of a KV cache whose scales are one for each head


@dataclass(frozen=True)
class QuantizedModule:
    """One quantized linear layer."""

    name: str
    scheme: Scheme
    shape: tuple[int, int]
    """N outputs and K inputs, whatever the shapes of packed tensors."""
    tensors: Mapping[str, TensorInfo]
    """By suffix, e.g. ``weight_packed``."""
    variant: str = ""
    """Tells layouts of one format apart, e.g. GPTQ's versions."""
    experts: int = 1
    """How many matrices of N / experts outputs are stacked in it."""
    act_order: bool = False
    """Whether its groups are scattered over the inputs; only data can tell, so detection leaves it
    False and `export` finds it.
    """

    @property
    def size_bytes(self) -> int:
        """Bytes of all its tensors, the bias included."""
        return sum(tensor.size_bytes for tensor in self.tensors.values())

    @property
    def config_group_size(self) -> int:
        """The group size as configs say it: -1 for one scale a row."""
        return self.scheme.weights.group_size or -1


@dataclass(frozen=True)
class Layout:
    """A quantized checkpoint as its headers and configs show it."""

    format: str
    modules: Mapping[str, QuantizedModule]
    """The quantized layers by name."""
    kv_cache: str | None
    """Format of the KV cache, e.g. ``fp8``; None when it is not quantized."""
    warnings: tuple[str, ...]
    """Where the config and the tensors disagree."""
    rotates_inputs: bool = False
    """At run time (QuIP, SpinQuant R3/R4): the weights alone are not the model."""

    @cached_property
    def owned(self) -> frozenset[str]:
        """The names of all tensors that belong to a quantized layer, biases included."""
        return frozenset(
            tensor.name for module in self.modules.values() for tensor in module.tensors.values()
        )


class Detector(Protocol):
    """An on-disk format that is read: a module of this package with these functions. Tensors go by
    suffix, without the name of their layer.
    """

    def matches_config(self, config: Json) -> bool:
        """Whether the quantization ``config`` of a checkpoint is of this format."""

    def detect(self, checkpoint: Checkpoint, config: Json) -> Layout:
        """Return the layout that config and tensors describe together, and where they disagree."""

    def read(self, module: QuantizedModule, tensors: Mapping[str, Tensor]) -> QuantizedWeight:
        """Return the common form of ``tensors``."""


class Format(Detector, Protocol):
    """An on-disk format that is read and written."""

    def unsupported_reason(self, module: QuantizedModule, weight: QuantizedWeight) -> str | None:
        """Return which constraint keeps this format from holding ``weight`` as it is, by name; None
        when it can.
        """

    def write(self, module: QuantizedModule, weight: QuantizedWeight) -> dict[str, Tensor]:
        """Return the tensors that hold ``weight``: the inverse of `read`."""

    def quantization_config(
        self, modules: Sequence[QuantizedModule], unquantized: Sequence[str], kv_cache: str | None
    ) -> dict[str, JsonDict]:
        """Return the JSON keys that describe a checkpoint of this format, by file name.

        Args:
            modules: the quantized layers.
            unquantized: names of the linear layers that stay in 16 bits.
            kv_cache: format of the KV cache, e.g. ``fp8``; None when it is not quantized.
        """

    def cache_scale(
        self, attention: str, which: str, count: int
    ) -> tuple[str, tuple[int, ...]] | None:
        """Return name and shape of the KV-cache scale ``which`` (k, v or q) of an attention module;
        None when it has no place.
        """

    def fallbacks(self) -> tuple[str, ...]:
        """Return the names of the schemes, fewest bits first, that weights are rounded to when this
        format cannot hold theirs.
        """


@dataclass(frozen=True)
class Parts:
    """The tensors of one module by suffix, before anything is known about it."""

    name: str
    tensors: Mapping[str, TensorInfo] = field(default_factory=dict)
    """By suffix, e.g. ``weight``."""

    def __contains__(self, suffix: str) -> bool:
        return suffix in self.tensors

    def __getitem__(self, suffix: str) -> TensorInfo:
        """Return the tensor ``suffix``; CheckpointRefused when the module has none."""
        if suffix not in self.tensors:
            found = ", ".join(
                f"{found} {tensor.dtype}" for found, tensor in sorted(self.tensors.items())
            )
            message = (
                f"`{self.name}` is quantized and its tensor `{self.name}.{suffix}` is missing "
                f"(found: {found})"
            )
            raise refused(
                "E_MISSING_TENSOR", message, "take config.json and all weights from one export"
            )
        return self.tensors[suffix]

    def matrix(self, suffix: str, *dtypes: str) -> tuple[int, int]:
        """Return the shape of the tensor ``suffix``, which must have two dimensions and one of
        ``dtypes``.
        """
        tensor = self[suffix]
        if tensor.dtype not in dtypes:
            raise self.misfit(suffix, f"a matrix of {' or '.join(dtypes)}", code="E_TENSOR_DTYPE")
        if len(tensor.shape) != 2 or not tensor.count:
            raise self.misfit(suffix, "a matrix that is not empty")
        return tensor.shape[0], tensor.shape[1]

    def misfit(self, suffix: str, expected: str, *, code: str = "") -> CheckpointRefused:
        """Return the error that says that the tensor ``suffix`` is not what was ``expected``."""
        tensor = self[suffix]
        if not code and "scale" in suffix:
            code = "E_SCALE_SHAPE"
        elif not code:
            code = "E_ZERO_SHAPE" if "zero" in suffix else "E_TENSOR_SHAPE"
        return refused(
            code,
            f"`{tensor.name}` in {tensor.file.name} is {tensor.dtype} {list(tensor.shape)}; "
            f"expected {expected}",
        )


def modules_of(checkpoint: Checkpoint) -> Iterator[Parts]:
    """Yield every module that owns tensors, in the order of the headers; shards of a table have the
    scales that lie on the table, `ngram_embedding.weight_scale` of `ngram_embedding.shard_0`.
    """
    modules: dict[str, dict[str, TensorInfo]] = {}
    for name, tensor in checkpoint.tensors.items():
        module, _, suffix = name.rpartition(".")
        modules.setdefault(module, {})[suffix] = tensor
    tables = {module: table for module in modules if (table := table_of_shard(module))}
    with_shards = frozenset(tables.values())
    for module, tensors in modules.items():
        if module in with_shards and "weight" not in tensors:
            continue
        if module in tables:
            shared = modules.get(tables[module], {})
            scales = {suffix: tensor for suffix, tensor in shared.items() if "scale" in suffix}
            tensors = {**scales, **tensors}
        yield Parts(module, tensors)


def group_size(columns: int, groups: int, configured: int | None = None) -> int:
    """Return how many of ``columns`` inputs share one of ``groups`` scales: ``configured`` where it
    fits, else what divides evenly. The last group may be short, if the others are in eights.
    """
    if not configured or configured < 0 or math.ceil(columns / configured) != groups:
        return math.ceil(columns / groups)
    is_whole = columns % configured == 0 or configured % 8 == 0
    return configured if is_whole else math.ceil(columns / groups)


def grouped_integers(
    bits: int, columns: int, groups: int, configured: int | None, *, symmetric: bool
) -> Weights:
    """Return integer weights with ``groups`` scales for a row of ``columns``; one scale is a
    channel's, unless the config has that group.
    """
    size = group_size(columns, groups, configured)
    format = number_format(bits, is_float=False)
    if groups == 1 and configured != size:
        return Weights(format, "channel", symmetric=symmetric)
    return Weights(format, "group", size, symmetric=symmetric)


def block_size(size: int, blocks: int) -> int:
    """Return the length of blocks that cut ``size`` into ``blocks``; the last may be short, so a
    power of two is preferred.
    """
    candidates = [128, *(2**bits for bits in range(size.bit_length() + 1))]
    return next(
        (length for length in candidates if math.ceil(size / length) == blocks),
        math.ceil(size / blocks),
    )


def by_scheme(modules: Sequence[QuantizedModule]) -> dict[Scheme, list[QuantizedModule]]:
    """Return the modules of each scheme, the most common scheme first."""
    counts = Counter(module.scheme for module in modules)
    return {
        scheme: [module for module in modules if module.scheme == scheme]
        for scheme, _ in counts.most_common()
    }


def shared_unsupported_reason(
    module: QuantizedModule,
    weight: QuantizedWeight,
    *,
    act_order: bool = False,
    pre_scale: bool = False,
    embeddings: bool = False,
) -> str | None:
    """Return the constraint that a format without stacked experts and, by default, without
    act-order, input factors and embeddings, does not meet.
    """
    if weight.offset is not None:
        return (
            "offset: a float is added to each group, as GGUF's types with a minimum have it, and "
            "there is no place for one here"
        )
    if is_embedding(module.name) and not embeddings:
        return "embeddings: rows are looked up in them, and here all layers multiply"
    if weight.codebook is not None:
        return (
            f"codebook: codes of {module.scheme.weights.format} are indices of a table, and here "
            "they are numbers"
        )
    if module.experts > 1:
        return (
            f"experts: {module.experts} matrices are stacked in one tensor, and each linear layer "
            "has tensors of its own here"
        )
    if weight.perm is not None and not act_order:
        return "act-order: groups are scattered over the inputs (g_idx), and here they lie in order"
    if weight.pre_scale is not None and not pre_scale:
        return (
            "pre_quant_scale: the input is multiplied by a stored factor, and there is no place "
            "for one here"
        )
    return _input_scale_reason(module, weight)


def _input_scale_reason(module: QuantizedModule, weight: QuantizedWeight) -> str | None:
    activations = module.scheme.activations
    if activations is None or not activations.needs_data:
        return None
    if weight.activation is not None and weight.activation.scale is not None:
        return None
    return (
        f"input_scale: {activations} inputs need a scale that calibration finds, and there is none"
    )


def check_skipped(unquantized: Sequence[str], modules: Sequence[QuantizedModule]) -> None:
    """Raise CheckpointRefused when an engine would skip one of ``modules`` with ``unquantized``.

    They look for each name of ``unquantized`` inside the names of all layers.
    """
    for name in unquantized:
        if hidden := next((module.name for module in modules if name in module.name), None):
            message = (
                f"ignore list: `{name}` stays in 16 bits, and engines, which look for names "
                f"inside names, would skip `{hidden}` with it"
            )
            raise refused(
                "E_CANNOT_HOLD", message, "convert to compressed-tensors, which has whole names"
            )


def refused(
    code: str,
    message: str,
    hint: str = "config and tensors do not fit each other: take both from one export",
) -> CheckpointRefused:
    """Return the error for a checkpoint whose parts do not fit together."""
    return CheckpointRefused(code, message, hint=hint)
