"""Decides what becomes of the tensors that are no part of a converted layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from qtool.checkpoint import TensorInfo
from qtool.checkpoint.shards import TensorSpec
from qtool.conversion.layers import Layer, Write
from qtool.conversion.request import ConversionRequest, model_dtype
from qtool.conversion.targets import UNQUANTIZED
from qtool.formats import PACKED_DTYPES
from qtool.modules import CacheScale, parse_cache_scale

SCALE_ENDINGS = ("_scale_inv", "_scales", "_blocks", ".weight_scale", ".scales")


@dataclass(frozen=True)
class Copies:
    """The tensors that are copied or cast."""

    writes: Mapping[str, tuple[Write, ...]]
    """By the name of the source's tensor."""
    dropped: int
    """How many scales of the KV cache have no place in the target."""

    @property
    def has_scale_per_head(self) -> bool:
        """Whether the KV cache has a scale for each head."""
        return any(
            parse_cache_scale(write.spec.name) and len(write.spec.shape) == 3
            for writes in self.writes.values()
            for write in writes
        )


def plan_copies(request: ConversionRequest, layers: Iterable[Layer]) -> Copies:
    """Return what becomes of the tensors that no layer in ``layers`` converts.

    Raises: CheckpointRefused, when the target has no place for one.
    """
    converted = {tensor.name for layer in layers for tensor in _converted_tensors(layer)}
    cast_dtypes: set[str] = set()
    if request.dequantizes:
        cast_dtypes = {*UNQUANTIZED.values(), model_dtype(request.checkpoint)}
    if request.checkpoint.gguf_file:  # its norms and biases are F32 in all models
        cast_dtypes.add("F32")
    writes: dict[str, tuple[Write, ...]] = {}
    dropped = 0
    for name, tensor in request.checkpoint.tensors.items():
        if scale := parse_cache_scale(name):
            writes[name] = _cache_scale_writes(request, scale, tensor)
            dropped += len(writes[name]) < len(scale.kind)
        elif name not in converted:
            _check_is_no_code(request, tensor)
            dtype = request.dtype if tensor.dtype in cast_dtypes else tensor.dtype
            writes[name] = (Write(TensorSpec(name, dtype, tensor.shape), tensor),)
    _check_cache_format(request, dropped)
    return Copies(writes, dropped)


def _converted_tensors(layer: Layer) -> list[TensorInfo]:
    """Return the tensors of ``layer`` but its bias, which is copied."""
    tensors = layer.source.tensors.values()
    return [tensor for tensor in tensors if not tensor.name.endswith(".bias")]


def _cache_scale_writes(
    request: ConversionRequest, scale: CacheScale, tensor: TensorInfo
) -> tuple[Write, ...]:
    """Return what a scale of the KV cache becomes; one of keys and values becomes two."""
    if request.dequantizes:
        return ()
    targets = [request.format.cache_scale(scale.module, kind, tensor.count) for kind in scale.kind]
    if None in targets and not request.requantize:
        raise request.cannot_hold(
            f"`{tensor.name}`: kv-cache: there is no place for the {tensor.count} scale(s) of the "
            "KV cache",
            "--requantize leaves them out",
        )
    return tuple(
        Write(TensorSpec(target[0], tensor.dtype, target[1]), tensor)
        for target in targets
        if target
    )


def _check_is_no_code(request: ConversionRequest, tensor: TensorInfo) -> None:
    if tensor.dtype in PACKED_DTYPES or tensor.name.endswith(SCALE_ENDINGS):
        raise request.cannot_hold(
            f"layout: `{tensor.name}` holds {tensor.dtype} codes or scales of no layer that qtool "
            "reads",
            "`qtool inspect` lists what was read; quantize the original again",
        )


def _check_cache_format(request: ConversionRequest, dropped: int) -> None:
    kv_cache = request.layout.kv_cache if request.layout else None
    if kv_cache not in (None, "fp8") and not dropped:
        raise request.cannot_hold(
            f"kv-cache: its scales are for {kv_cache}, and only those for fp8 are converted",
            "quantize the original again",
        )
