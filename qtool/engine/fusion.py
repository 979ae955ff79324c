"""Replace the decoder layers of a model by `FusedLayer`, where that is seen to compute the same.

No name is trusted: each layer of transformers runs beside its replacement, and the model stays as
it is unless they agree.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from qtool.engine.attention.interface import recording, running
from qtool.engine.attention.pages import (
    KVPages,
    LayerCache,
    LayerGeometry,
    Packed,
    StateGeometry,
)
from qtool.engine.decoder_layers import FusedLayer, layout_of
from qtool.engine.fused_attention import Angles, RotaryMismatch
from qtool.engine.kv_cache import allocate_pages, allocate_states
from qtool.engine.layer_kinds import kind_of, repeats, skipping
from qtool.engine.norms import (
    ROUNDED_TOLERANCE,
    TOLERANCE,
    Norm,
    NotFused,
    Sum,
    distance,
    random_input,
)
from qtool.engine.routers import fuse_routers
from qtool.errors import one_line
from qtool.runtime.causal_lm import CausalLM, Decoder
from qtool.runtime.experts.grouped import ExpertsStandIn, GroupedExperts
from qtool.runtime.kernels import current
from qtool.runtime.linear import FusedLinear, QuantizedLinear, SharedInput

LOG = logging.getLogger("qtool.engine")
TOKENS = 6  # of the input that layers are compared with
FIRST = 3  # layers that are also compared together; over many, differences grow without end
WHOLE_TOLERANCE = 0.1  # of these; a residual that is lost is more
# in the order that they are tried
ANGLES: tuple[Angles | None, ...] = (
    *("twice", "once", "interleaved", "repeated", "parted", "complex"),
    None,
)


Arguments = dict[str, object]


@dataclass(frozen=True)
class DryRun:
    """What a pass of a few tokens through a decoder shows."""

    output: Tensor
    """[1, T, H]"""
    geometry: Mapping[int, LayerGeometry | StateGeometry]
    """By layer index."""
    arguments: Mapping[nn.Module, Arguments]
    """What each layer was called with."""


def fuse(model: CausalLM) -> bool:
    """Replace the decoder layers of ``model``, and its last norm, by `FusedLayer`, if it can be
    seen to compute the same. Logs why not.

    The attention of the model is `qtool.engine.attention.interface`'s already. Peak memory: the
    model, and the weights of a layer.
    """
    device = next(iter(model.parameters())).device
    name = type(model).__name__
    try:
        with torch.no_grad(), current(device):
            fuse_routers(model)
            _fuse(model.get_decoder(), device)
    except NotFused as error:
        LOG.info("the layers of %s run as transformers has them: %s", name, error)
        return False
    except Exception as error:  # the code of an architecture may raise anything
        LOG.info("the layers of %s run as transformers has them: %s", name, one_line(error))
        return False
    return True


def compile_ahead(model: CausalLM, run_steps: Callable[[], object]) -> frozenset[Hashable]:
    """Launch the kernels that `fuse` will launch, then those of steps through fused layers, so that
    they compile; results are not compared. ``model`` is unchanged afterwards.

    Args:
        model: as `fuse` takes it.
        run_steps: runs steps of ``model``, while its layers are fused with the first angles that
            fit, which `fuse` may not choose.
    Returns: the kinds of the layers that ``run_steps`` ran; empty if the model's code or
        ``run_steps`` failed.
    """
    decoder = model.get_decoder()
    before = decoder.layers, decoder.norm
    layers = list(decoder.layers)
    device = next(iter(model.parameters())).device
    repeated = repeats(layers)
    try:
        with torch.no_grad(), current(device):
            with skipping(repeated, layers):
                seen = _dry_run(decoder, device)
            fused = [
                layer if number in repeated else _fuse_unchecked(layer, seen)
                for number, layer in enumerate(layers)
            ]
            decoder.layers, decoder.norm = nn.ModuleList(fused), Norm.of(decoder.norm)
            with skipping(repeated, fused):
                run_steps()
        return frozenset(kind_of(layer) for layer in fused if isinstance(layer, FusedLayer))
    except Exception as error:  # the code of an architecture may raise anything
        LOG.debug("kernels compile at their first launch: %s", one_line(error))
        return frozenset()
    finally:
        decoder.layers, decoder.norm = before


def _fuse_unchecked(layer: nn.Module, seen: DryRun) -> FusedLayer:
    """Return ``layer`` fused with the first angles that it takes; launches the kernels that
    `_proven` launches, without a look at their results.

    Raises: NotFused, if no angles fit.
    """
    check = _check_of(layer, seen)
    for angles in ANGLES:
        with suppress(RotaryMismatch):
            for kinds in ((QuantizedLinear, GroupedExperts), (GroupedExperts,)):
                with stand_ins(layer, *kinds):
                    check(angles=angles)
            return FusedLayer(layer, seen.geometry[_index(layer)], angles=angles)
    raise NotFused("no angles fit")


def _fuse(decoder: Decoder, device: torch.device) -> None:
    layers = list(decoder.layers)
    norm = Norm.of(decoder.norm)
    seen = _dry_run(decoder, device)
    fused = []
    for number, layer in enumerate(layers):
        try:
            fused.append(_proven(layer, seen))
        except NotFused as error:
            raise NotFused(f"layer {number}: {error}") from None
        if device.type == "cuda":
            # the weights that were joined leave pieces too small for the next ones
            torch.cuda.empty_cache()
    before = decoder.layers, decoder.norm
    first = nn.ModuleList(layers[:FIRST])
    try:
        # in both: what experts add would hide the error of a layer, or differ by chance
        with stand_ins(nn.ModuleList([*first, *fused[:FIRST]]), GroupedExperts):
            decoder.layers = first
            expected = _dry_run(decoder, device).output
            decoder.layers = nn.ModuleList(fused[:FIRST])
            decoder.norm = norm
            off = distance(_dry_run(decoder, device).output, expected, expected)
        if not off <= WHOLE_TOLERANCE:
            raise NotFused(
                f"the model does something between its layers (relative error {off:.1e})"
            )
        decoder.layers = nn.ModuleList(fused)
        _dry_run(decoder, device)
    except Exception:
        decoder.layers, decoder.norm = before
        raise


def _dry_run(decoder: Decoder, device: torch.device) -> DryRun:
    arguments: dict[nn.Module, Arguments] = {}

    def note(module: nn.Module, _: object, given: Arguments) -> None:
        arguments[module] = given

    positions = torch.arange(TOKENS, device=device)[None]
    handles = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in decoder.layers]
    try:
        with recording() as found:
            output = decoder(input_ids=positions + 1, position_ids=positions, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    kept: list[LayerGeometry | StateGeometry] = [*found.layers, *found.states]
    return DryRun(output[0], {layer.layer_idx: layer for layer in kept}, arguments)


def _proven(layer: nn.Module, seen: DryRun) -> FusedLayer:
    """Return ``layer`` fused.

    Raises: NotFused, unless both make the same of a random input, and write the same to the cache.
    """
    name = type(layer).__name__
    check = _check_of(layer, seen)
    tolerance = TOLERANCE[next(layer.parameters()).dtype]
    with stand_ins(layer, QuantizedLinear, GroupedExperts):
        errors = {}
        for angles in ANGLES:
            with suppress(RotaryMismatch):
                errors[angles] = check(angles=angles)
                if errors[angles] <= tolerance:
                    break
    angles, error = min(errors.items(), key=lambda item: (math.isnan(item[1]), item[1]))
    if error <= tolerance:
        with stand_ins(layer, GroupedExperts):
            error = check(angles=angles)
        if error <= ROUNDED_TOLERANCE:
            return FusedLayer(layer, seen.geometry[_index(layer)], angles=angles)
    raise NotFused(f"{name} is not what its parts seem to be (relative error {error:.1e})")


def _check_of(layer: nn.Module, seen: DryRun) -> Callable[..., float]:
    """Return `_error` of ``layer`` at a random input."""
    name = type(layer).__name__
    number = _index(layer)
    if layer not in seen.arguments:
        raise NotFused(f"{name} is not called")
    if number not in seen.geometry:
        raise NotFused(f"{name} has no `self_attn` that attends, nor a delta net")
    arguments = seen.arguments[layer]
    positions = arguments.get("position_ids")
    if isinstance(positions, Tensor):
        # shows a layer that looks at positions by itself, as those do that temper their attention
        arguments = {**arguments, "position_ids": positions + 100_000}
    first = next(filter(None, layout_of(layer)))
    weight = Norm.of(layer.get_submodule(first)).weight
    x = random_input((1, TOKENS, len(weight)), weight)
    return partial(_error, layer, seen.geometry[number], x, arguments)


def _index(layer: nn.Module) -> int:
    """Return the number of ``layer`` in the cache, -1 if it has none."""
    mixer = getattr(layer, "self_attn", getattr(layer, "linear_attn", None))
    number: int = getattr(mixer, "layer_idx", -1)
    return number


def _error(
    layer: nn.Module,
    geometry: LayerGeometry | StateGeometry,
    x: Tensor,
    arguments: Arguments,
    *,
    angles: Angles | None,
) -> float:
    """Return how far a fused ``layer`` is from itself at ``x`` [1, T, H]."""
    added = _run_on_scratch(layer, x, geometry, arguments)[0] - x
    # as large as what the layer adds: neither then hides in the other's rounding
    x = x * (added.norm() / x.norm()).clamp(1e-3, 1e3)
    fused = FusedLayer(layer, geometry, angles=angles)
    return _difference(
        _run_on_scratch(fused, x, geometry, arguments),
        _run_on_scratch(layer, x, geometry, arguments),
        x,
    )


class StandIn(nn.Module):
    """In place of a quantized layer while a decoder layer is compared: linear, cheap, and without
    codes that move at the least difference.
    """

    def __init__(self, linear: QuantizedLinear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., N]: for each output the sum of two inputs, with factors."""
        n = torch.arange(self.out_features, device=x.device)
        one, other = ((n * step + 3) % self.in_features for step in (7919, 104729))
        factors = (n % 13 - 6).to(x.dtype) / 8, (n % 7 - 3).to(x.dtype) / 4
        return x[..., one] * factors[0] + x[..., other] * factors[1]


@contextmanager
def stand_ins(layer: nn.Module, *kinds: type[nn.Module]) -> Iterator[None]:
    """Put a stand-in in place of each quantized layer in ``layer`` that is one of ``kinds``."""
    taken = [member for member in _quantized_members(layer) if isinstance(member[2], kinds)]
    stand_ins: dict[nn.Module, nn.Module] = {
        module: ExpertsStandIn() if isinstance(module, GroupedExperts) else StandIn(module)
        for _, _, module in taken
    }
    try:
        for holder, name, linear in taken:
            setattr(holder, name, stand_ins[linear])
        yield
    finally:
        for holder, name, linear in taken:
            setattr(holder, name, linear)


def _quantized_members(
    layer: nn.Module,
) -> Iterator[tuple[nn.Module | SharedInput, str, QuantizedLinear | GroupedExperts]]:
    """Yield who holds each quantized layer, under which name, and the layer."""
    for module in layer.modules():
        for name, child in module.named_children():
            if isinstance(child, QuantizedLinear | GroupedExperts):
                yield module, name, child
        if isinstance(module, FusedLinear):
            yield module.shared, "whole", module.shared.whole


def _run_on_scratch(
    layer: nn.Module,
    x: Tensor,
    geometry: LayerGeometry | StateGeometry,
    arguments: Arguments,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what ``layer`` makes of ``x`` [1, T, H], one sequence, and what it keeps of it: keys
    and values, or its states.
    """
    ints = partial(torch.tensor, dtype=torch.int32, device=x.device)
    packed = Packed(
        ints([[1]]), ints([0] * TOKENS), ints(range(TOKENS)), 0, ints([0, TOKENS]), longest=TOKENS
    ).expand([(0, TOKENS)])
    if isinstance(geometry, LayerGeometry):
        caches = dict[int, LayerCache](allocate_pages(1, [geometry], x.dtype, x.device, {}))
    else:
        caches = dict[int, LayerCache](allocate_states(1, [geometry], x.dtype, x.device))
    with running(packed, caches):
        result = layer(x, **arguments)
    if not isinstance(result, Tensor | Sum):
        raise NotFused(f"{type(layer).__name__} returns a {type(result).__name__}")
    kept = caches[geometry.layer_idx]
    both = (
        (kept.k, kept.v) if isinstance(kept, KVPages) else (kept.conv_state, kept.recurrent_state)
    )
    return result.total()[None] if isinstance(result, Sum) else result, *both


def _difference(result: tuple[Tensor, ...], expected: tuple[Tensor, ...], x: Tensor) -> float:
    """Return the largest relative error of what a layer adds to ``x``, and of what it keeps."""
    references = (expected[0] - x, *expected[1:])
    return max(distance(*three) for three in zip(result, expected, references, strict=True))
