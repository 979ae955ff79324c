"""`load` makes a checkpoint a model that runs, its layers packed for the fastest kernels."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import nn

from qtool import formats
from qtool.checkpoint import Checkpoint, open_checkpoint, resolve_model
from qtool.formats.packing import read_tensor
from qtool.modules import decoder_layer_number, parse_cache_scale
from qtool.runtime.build import (
    RawTensors,
    build_modules,
    build_unquantized,
    dequantized_weights,
    read_checked,
)
from qtool.runtime.causal_lm import CausalLM
from qtool.runtime.devices import device_named
from qtool.runtime.encoder import make_encoder
from qtool.runtime.experts.stacks import ExpertStacks, stacked_biases
from qtool.runtime.kernels import current
from qtool.runtime.load_plan import Group, LoadPlan, plan_load
from qtool.runtime.mtp import attach_mtp
from qtool.runtime.source import Source

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
) -> CausalLM:
    """Load a checkpoint as a transformers model with the fastest kernels for ``device``.

    Args:
        model_path: a folder, or a name on the Hub.
        device: ``cpu``, ``cuda``, ``cuda:1`` or ``auto``: the first GPU, or else the CPU.
        dtype: what unquantized layers compute in: ``bfloat16``, ``float16``, ``float32``, or
            ``auto`` for that of the checkpoint; bfloat16 on a CPU.
        quantization: how to quantize an unquantized model while it loads, a name in
            `qtool.runtime.online.ONLINE`. A quantized checkpoint needs none.
        revision: the branch, tag or commit on the Hub.
        on_progress: called with the number of layers that are ready, and of all layers.
    Returns: the model in evaluation mode; ``generate`` works on it.
    Raises: CheckpointRefused; UsageError, for an unknown ``quantization``; ResourceError, for a
        device that this machine lacks.
    """
    checkpoint = open_checkpoint(resolve_model(os.fspath(model_path), revision=revision))
    plan = plan_load(checkpoint, device_named(device), quantization, dtype)
    if plan.layout and plan.layout.kv_cache:
        message = (
            f"only `qtool.Engine` uses the scales of the KV cache ({plan.layout.kv_cache}): here "
            "keys and values stay in 16 bits"
        )
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    return materialize(plan, on_progress=on_progress)


def materialize(plan: LoadPlan, *, on_progress: OnProgress | None = None) -> CausalLM:
    """Load the weights of ``plan`` and return the model.

    Needs memory for the model and one group of layers.
    """
    for warning in plan.warnings:
        warnings.warn(warning, RuntimeWarning, stacklevel=3)
    stacks = ExpertStacks(plan.experts)
    with _readers() as pool, current(plan.device):
        reading = {name: pool.submit(read_checked, plan, name) for name in _unquantized_names(plan)}
        model: CausalLM | None = None
        built: list[tuple[str, nn.Module]] = []
        for done, (group, raw) in enumerate(_read_ahead(plan, pool), 1):
            for target, module in build_modules(plan, group, raw):
                if target.parameter:
                    stacks.add(target, module)
                elif isinstance(module, nn.Module):
                    built.append((target.module, module))
            # layers are also built while unquantized weights are still being read
            if model is None and all(tensor.done() for tensor in reading.values()):
                model = _make_model(plan, reading)
            if model is not None:
                _install(model, built, stacks)
            _trim_heap()
            if on_progress:
                on_progress(done, len(plan.groups))
        if model is None:
            model = _make_model(plan, reading)
            _install(model, built, stacks)
        for source in plan.unquantized_experts:
            stacks.add(source.target, build_unquantized(plan, source))
    stacks.install(model)
    if plan.mtp is not None:
        attach_mtp(plan, model)
    return model if plan.encoding is None else make_encoder(plan, model)


@contextlib.contextmanager
def _readers() -> Iterator[ThreadPoolExecutor]:
    """Yield a pool of threads that read tensors; an error cancels the reads that have not begun."""
    with ThreadPoolExecutor(READERS) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _install(model: CausalLM, built: list[tuple[str, nn.Module]], stacks: ExpertStacks) -> None:
    """Move the modules of ``built`` and complete stacks to their places in ``model``."""
    for name, module in built:
        model.set_submodule(name, module)
    built.clear()
    stacks.install_complete(model)


def _unquantized_names(plan: LoadPlan) -> list[str]:
    """Return the names of the tensors that the model loads unquantized."""
    built_later = {
        f"{source.name}.{suffix}" for source in plan.sources for suffix in ("weight", "bias")
    }
    return [
        name
        for name in formats.unquantized_tensors(plan.checkpoint, plan.layout)
        if name not in built_later and plan.skeleton.is_loaded(name)
    ]


def _make_model(plan: LoadPlan, reading: dict[str, Future[torch.Tensor]]) -> CausalLM:
    """Return the model with its unquantized weights; quantized layers are installed later.

    Empties ``reading``, the unquantized tensors by name, so that nothing else holds them.
    """
    state = {name: tensor.result() for name, tensor in reading.items()}
    reading.clear()
    state |= dequantized_weights(plan)
    state |= stacked_biases(
        ((source.name, source.target) for source in plan.sources),
        lambda name: read_checked(plan, name),
        plan.checkpoint.tensors,
    )
    return plan.skeleton.materialize({source.target for source in plan.sources}, state, plan.device)


def _trim_heap() -> None:
    """Return freed memory to the system: glibc keeps what each reader had, and that adds up."""
    # musl has none
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)


def _read_ahead(
    plan: LoadPlan, pool: ThreadPoolExecutor
) -> Iterator[tuple[Group, list[RawTensors]]]:
    """Yield each group with the tensors of its layers, in host memory, while the next are read.

    On a CPU one group is read ahead, on a GPU one for each reader.
    """
    most = READERS if plan.device.type == "cuda" else 1
    waiting: deque[tuple[Group, list[Future[RawTensors]]]] = deque()
    for group in plan.groups:
        waiting.append((group, [pool.submit(_read, plan, source) for source in group.sources]))
        if len(waiting) > most:
            yield _wait(*waiting.popleft())
    while waiting:
        yield _wait(*waiting.popleft())


def _wait(group: Group, reading: list[Future[RawTensors]]) -> tuple[Group, list[RawTensors]]:
    return group, [tensors.result() for tensors in reading]


def _read(plan: LoadPlan, source: Source) -> RawTensors:
    """Return the tensors of a layer by suffix, as they are in the file."""
    module = plan.layout.modules.get(source.name) if plan.layout else None
    names = (
        {"weight": f"{source.name}.weight"}
        if module is None
        else {suffix: tensor.name for suffix, tensor in module.tensors.items() if suffix != "bias"}
    )
    bias = f"{source.name}.bias"
    if bias in plan.checkpoint.tensors and not source.target.parameter:
        names["bias"] = bias
    return {suffix: read_checked(plan, name) for suffix, name in names.items()}


def cache_scales(checkpoint: Checkpoint) -> dict[int, tuple[float, float]]:
    """Return the scales of keys and values in an 8-bit KV cache, by layer.

    Only scales with one number for each layer count; a layer that has just one of them gets 1.0
    for the other.
    """
    found: dict[int, dict[str, float]] = {}
    for name, tensor in checkpoint.tensors.items():
        scale = parse_cache_scale(name)
        layer = decoder_layer_number(name)
        if scale and scale.kind != "q" and layer is not None and tensor.count == 1:
            value = float(read_tensor(checkpoint, name).float().reshape(()))
            found.setdefault(layer, {}).update(dict.fromkeys(scale.kind, value))
    return {layer: (scales.get("k", 1.0), scales.get("v", 1.0)) for layer, scales in found.items()}
