"""A checkpoint as a model that runs: each linear layer read straight into the form its kernel
wants, layers that share an input fused.
"""

from __future__ import annotations

import ctypes
import os
import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import nn

from qtool import formats
from qtool.checkpoint import Checkpoint, open_checkpoint, resolve_model
from qtool.formats.packing import read_tensor
from qtool.modules import decoder_layer_number, parse_cache_scale
from qtool.runtime.build import RawTensors, build_modules, build_unquantized
from qtool.runtime.devices import device_named
from qtool.runtime.experts import ExpertStack
from qtool.runtime.kernels import current
from qtool.runtime.load_plan import Group, LoadPlan, Source, plan_load

OnProgress = Callable[[int, int], None]  # layers done, layers in all
READERS = min(8, os.cpu_count() or 1)


def load(
    model_path: str | os.PathLike[str],
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    quantization: str | None = None,
    revision: str | None = None,
    on_progress: OnProgress | None = None,
) -> Any:
    """Return the transformers model of a checkpoint, its quantized layers multiplied by the best
    kernel of ``device``.

    Args:
        model_path: a folder, or a name on the Hub.
        device: ``cuda``, ``cuda:1``, ``cpu`` or ``auto``: the first GPU, where there is one.
        dtype: what is not quantized is computed in: ``bfloat16``, ``float16``, ``float32`` or
            ``auto``, that of the checkpoint, or bfloat16 on a CPU.
        quantization: how to quantize a plain model while it loads (`qtool.runtime.online.ONLINE`);
            a quantized one needs none.
        on_progress: is called with the number of layers that are ready, and of all.
    Returns: the model in evaluation mode; ``generate`` works on it.
    Raises: CheckpointRefused; UsageError, for an unknown ``quantization``; ResourceError, for a
        device that is not there.
    """
    checkpoint = open_checkpoint(resolve_model(os.fspath(model_path), revision=revision))
    plan = plan_load(checkpoint, device_named(device), quantization, dtype)
    if plan.layout and plan.layout.kv_cache:
        message = (
            f"the scales of the KV cache ({plan.layout.kv_cache}) are used by `qtool.Engine` "
            "alone: here keys and values stay in 16 bits"
        )
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    return materialize(plan, on_progress=on_progress)


def materialize(plan: LoadPlan, *, on_progress: OnProgress | None = None) -> Any:
    """Load the weights of ``plan`` and return the model. Holds beside it one group at a time."""
    for warning in plan.warnings:
        warnings.warn(warning, RuntimeWarning, stacklevel=3)
    checkpoint, skeleton = plan.checkpoint, plan.skeleton
    sources = [source for group in plan.groups for source in group.sources]
    rounded = {
        f"{source.name}.{suffix}"
        for source in [*sources, *plan.beside]
        for suffix in ("weight", "bias")
    }
    with ThreadPoolExecutor(READERS) as pool, current(plan.device):
        names = [
            name
            for name in formats.unquantized_tensors(checkpoint, plan.layout)
            if name not in rounded and not skeleton.beyond(name)
        ]
        state = dict(
            zip(names, pool.map(lambda name: read_tensor(checkpoint, name), names), strict=True)
        )
        model = skeleton.materialize(
            {source.place for source in [*sources, *plan.beside]}, state, plan.device
        )
        del state
        stacks: dict[tuple[str, str], dict[int, list[tuple[int, nn.Module]]]] = {}
        for done, (group, raw) in enumerate(_read_ahead(plan, pool), 1):
            for place, module in build_modules(plan, group, raw):
                if place.parameter:
                    stacks.setdefault((place.module, place.parameter), {}).setdefault(
                        place.expert or 0, []
                    ).append((place.part, module))
                else:
                    model.set_submodule(place.module, module)
            _give_back()
            if on_progress:
                on_progress(done, len(plan.groups))
        for source in plan.beside:
            linear = build_unquantized(plan, source)
            stacks[source.place.module, source.place.parameter].setdefault(
                source.place.expert or 0, []
            ).append((source.place.part, linear))
    for (holder, parameter), experts in stacks.items():
        parts = [
            [module for _, module in sorted(experts[number], key=lambda part: part[0])]
            for number in sorted(experts)
        ]
        setattr(model.get_submodule(holder), parameter, ExpertStack(parts))
    return model


def _give_back() -> None:
    """Return freed memory to the system: glibc keeps what each reader had, and that adds up."""
    # musl has none
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)


def _read_ahead(
    plan: LoadPlan, pool: ThreadPoolExecutor
) -> Iterator[tuple[Group, list[RawTensors]]]:
    """Yield each group and the tensors of its layers, in host memory, while the next are read: one
    group on a CPU, else one for each reader.
    """
    waiting: deque[tuple[Group, list[Future[RawTensors]]]] = deque()
    for group in plan.groups:
        waiting.append((group, [pool.submit(_read, plan, source) for source in group.sources]))
        if len(waiting) > (READERS if plan.device.type == "cuda" else 1):
            yield _ready(*waiting.popleft())
    while waiting:
        yield _ready(*waiting.popleft())


def _ready(group: Group, reading: Sequence[Future[RawTensors]]) -> tuple[Group, list[RawTensors]]:
    return group, [tensors.result() for tensors in reading]


def _read(plan: LoadPlan, source: Source) -> RawTensors:
    """Return the tensors of a layer by suffix, as they are in the file."""
    module = plan.layout.modules.get(source.name) if plan.layout else None
    names = (
        {"weight": f"{source.name}.weight"}
        if module is None
        else {suffix: tensor.name for suffix, tensor in module.tensors.items()}
    )
    if (bias := f"{source.name}.bias") in plan.checkpoint.tensors:
        names["bias"] = bias
    return {suffix: read_tensor(plan.checkpoint, name) for suffix, name in names.items()}


def cache_scales(checkpoint: Checkpoint) -> dict[int, tuple[float, float]]:
    """Return by layer what keys and values in an 8-bit cache are multiplied with, where
    ``checkpoint`` has one number for each.
    """
    found: dict[int, dict[str, float]] = {}
    for name, tensor in checkpoint.tensors.items():
        scale = parse_cache_scale(name)
        layer = decoder_layer_number(name)
        if scale and scale.kind != "q" and layer is not None and tensor.count == 1:
            value = float(read_tensor(checkpoint, name).float().reshape(()))
            found.setdefault(layer, {}).update(dict.fromkeys(scale.kind, value))
    return {layer: (scales.get("k", 1.0), scales.get("v", 1.0)) for layer, scales in found.items()}
