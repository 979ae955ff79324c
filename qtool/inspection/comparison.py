"""One checkpoint against another: how far the weights of each layer are apart."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from qtool.architecture import map_names
from qtool.checkpoint import Checkpoint, TensorInfo
from qtool.errors import CheckpointRefused
from qtool.formats import Layout, QuantizedModule, detect
from qtool.modules import is_expert, is_linear
from qtool.name_map import LinearWeight

if TYPE_CHECKING:
    from torch import Tensor

Linear = QuantizedModule | TensorInfo | LinearWeight
WORST_DB = -300.0  # also given to NaN, so that it comes first
RESCALED_BELOW_DB = 15.0  # below this, the layer may have been rescaled
RESCALED_GAIN_DB = 6.0  # factors of rows and columns that are fitted to noise gain less


@dataclass(frozen=True)
class Difference:
    """How far one linear layer of a checkpoint is from the same layer of another."""

    name: str
    sqnr_db: float | None
    """Signal to quantization noise in decibels; None when the weights are equal."""
    max_error: float
    """The largest difference of a weight."""
    rescaled: bool = False
    """Whether rows or columns had been scaled, as SmoothQuant and AWQ do; they fold the factors
    into the layer before. The numbers are then those after undoing it."""


@dataclass(frozen=True)
class Comparison:
    """A checkpoint against a base checkpoint."""

    base: str
    """Name of the base checkpoint."""
    modules: tuple[Difference, ...]
    """The linear layers that both have, the worst first."""
    only_here: tuple[str, ...]
    """Layers that the base does not have."""
    only_there: tuple[str, ...]
    """Layers that only the base has."""

    def to_dict(self) -> dict[str, object]:
        """Return the comparison for ``--json``."""
        return asdict(self)


def compare(checkpoint: Checkpoint, base: Checkpoint) -> Comparison:
    """Return how far the linear layers of ``checkpoint`` are from those of ``base``.

    Either may be in 16 bits or quantized in any format; one layer is in memory at a time.
    Raises: CheckpointRefused, when they have no layer in common, or the shapes of a layer differ.
    """
    layout, base_layout = detect(checkpoint), detect(base)
    here, there = dict(_linears(checkpoint, layout)), dict(_linears(base, base_layout))
    here |= _stacked(checkpoint, layout, there.keys() - here)
    there |= _stacked(base, base_layout, here.keys() - there)
    common = [name for name in here if name in there]
    if not common:
        message = f"{checkpoint.source} and {base.source} have no linear layer in common"
        raise CheckpointRefused(
            "E_NOT_COMPARABLE", message, hint="give the model that this one was made of"
        )
    differences = [
        _difference(
            name, _values(checkpoint, layout, here[name]), _values(base, base_layout, there[name])
        )
        for name in common
    ]
    return Comparison(
        base=base.name,
        modules=tuple(sorted(differences, key=_decibels)),
        only_here=tuple(name for name in here if name not in there),
        only_there=tuple(name for name in there if name not in here),
    )


def _decibels(difference: Difference) -> float:
    return math.inf if difference.sqnr_db is None else difference.sqnr_db


def _stacked(
    checkpoint: Checkpoint, layout: Layout | None, wanted: Collection[str]
) -> Mapping[str, Linear]:
    """Return those of ``wanted``, layers of the other checkpoint alone, that are experts in a stack
    here.
    """
    if not any(map(_is_expert_stack, checkpoint.tensors.values())) or not any(
        map(is_expert, wanted)
    ):
        return {}
    linears = map_names(checkpoint, layout).linears
    return {name: linears[name] for name in wanted if name in linears and linears[name].is_stacked}


def _linears(checkpoint: Checkpoint, layout: Layout | None) -> Mapping[str, Linear]:
    """Return every linear layer by name.

    Stacked experts in 16 bits, [E, K, N], are among them: in the other checkpoint, MXFP4 may pack
    them.
    """
    quantized = layout.modules if layout else {}
    owned = layout.owned if layout else frozenset()
    unquantized = {
        tensor.name.removesuffix(".weight"): tensor
        for tensor in checkpoint.tensors.values()
        if tensor.name not in owned and (is_linear(tensor) or _is_expert_stack(tensor))
    }
    return {**quantized, **unquantized}


def _is_expert_stack(tensor: TensorInfo) -> bool:
    return len(tensor.shape) == 3 and ("experts." in tensor.name or "moe." in tensor.name)


def _values(checkpoint: Checkpoint, layout: Layout | None, source: Linear) -> Tensor:
    import torch

    from qtool.formats.packing import expert_matrix
    from qtool.formats.stored_layer import Source, dense, read_value

    if isinstance(source, LinearWeight):
        return expert_matrix(_stack(checkpoint.tensors[source.tensor]), source).float()
    value = read_value(checkpoint, layout, Source.of(checkpoint, source))
    values = dense(value, torch.float32)
    return values.transpose(1, 2).flatten(0, 1) if values.dim() == 3 else values


@lru_cache(maxsize=2)  # of either checkpoint: the experts of a stack follow each other
def _stack(info: TensorInfo) -> Tensor:
    from qtool.formats.packing import read_stored

    return read_stored(info)


def _difference(name: str, here: Tensor, there: Tensor) -> Difference:
    import torch

    if here.shape != there.shape:
        message = f"`{name}` is {list(here.shape)} here and {list(there.shape)} in the base"
        raise CheckpointRefused(
            "E_NOT_COMPARABLE", message, hint="give the model that this one was made of"
        )
    if torch.equal(here, there):
        return Difference(name, None, 0.0)
    decibels = _sqnr_db(here, there)
    rescaled = False
    if WORST_DB < decibels < RESCALED_BELOW_DB:
        fitted = max(
            (_rescaled(here, there, dims) for dims in ((0, 1), (1, 0))),
            key=lambda each: _sqnr_db(each, there),
        )
        if _sqnr_db(fitted, there) > decibels + RESCALED_GAIN_DB:
            here = fitted
            decibels = _sqnr_db(fitted, there)
            rescaled = True
    largest = (here - there).abs().max().nan_to_num(nan=torch.finfo(torch.float32).max)
    return Difference(name, decibels, float(largest), rescaled)


def _sqnr_db(here: Tensor, there: Tensor) -> float:
    signal = float(there.square().sum())
    noise = float((there - here).square().sum())
    if not math.isfinite(noise + signal):
        return WORST_DB
    return max(WORST_DB, 10 * math.log10(max(signal, 1e-30) / max(noise, 1e-30)))


def _rescaled(here: Tensor, there: Tensor, dims: Sequence[int]) -> Tensor:
    """Return ``here`` scaled to come nearest to ``there``.

    Factors of columns (0) and rows (1) are fitted in the order of ``dims``, twice.
    """
    for dim in (*dims, *dims):
        here = here * (
            (here * there).sum(dim, keepdim=True)
            / here.square().sum(dim, keepdim=True).clamp(min=1e-30)
        )
    return here
