"""A checkpoint as a model that runs: each linear layer read straight into the form its kernel
wants, layers that share an input fused.
"""

from __future__ import annotations

import ctypes
import os
import sys
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from qtool import formats
from qtool.checkpoint import Checkpoint, open_checkpoint, resolve_model
from qtool.errors import CheckpointRefused, ResourceError, UsageError, one_line
from qtool.formats import Layout
from qtool.formats.packing import read_tensor
from qtool.modules import decoder_layer_number, parse_cache_scale
from qtool.runtime.kernels import Choice, LinearSpec, choose, current, device_of
from qtool.runtime.linear import ExpertStack, FusedLinear, QuantizedLinear, SharedInput
from qtool.runtime.online import left_plain, schemes_to_run
from qtool.runtime.skeleton import Place, Skeleton
from qtool.scheme import Scheme
from qtool.weight import Activation, QuantizedWeight, quantize

OnProgress = Callable[[int, int], None]  # layers done, layers in all
RawTensors = dict[str, Tensor]
SECOND_COPY_SHARE = 1 / 8
DTYPES = {
    **{
        "auto": None,
        "bfloat16": torch.bfloat16,
        "float16": torch.float16,
        "float32": torch.float32,
    },
    **{"half": torch.float16, "float": torch.float32},
}
READERS = min(8, os.cpu_count() or 1)


@dataclass(frozen=True)
class Source:
    """A linear layer of the checkpoint: its name there, where it goes, N outputs and K inputs, and
    the scheme it runs in, None for a plain one.

    ``experts``: how many matrices of N / experts outputs are stacked in it.
    """

    name: str
    place: Place
    shape: tuple[int, int]
    scheme: Scheme | None
    experts: int = 1


@dataclass(frozen=True)
class Group:
    """Layers that become one: they share an input and a scheme."""

    sources: tuple[Source, ...]
    spec: LinearSpec
    choice: Choice


@dataclass(frozen=True)
class LoadPlan:
    """What each quantized layer of a checkpoint becomes on a device, decided from headers."""

    checkpoint: Checkpoint
    layout: Layout | None
    skeleton: Skeleton
    device: torch.device
    groups: tuple[Group, ...]
    second_copy: bool
    """Whether kernels for few tokens may have one."""
    beside: tuple[Source, ...]
    """Plain layers of experts others of which are quantized."""
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the plan for ``--json``."""
        rows = [
            {
                "layers": [source.name for source in group.sources],
                "shape": group.spec.shape,
                "scheme": group.spec.scheme.name,
                "kernel": group.choice.kernel,
                "few_tokens": group.choice.few
                and {"kernel": group.choice.few.kernel, "most": group.choice.few.most},
                "refused": dict(group.choice.refused),
            }
            for group in self.groups
        ]
        return {
            "model": str(self.checkpoint.path),
            "device": str(device_of(self.device)),
            "groups": rows,
            "warnings": list(self.warnings),
        }


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


def device_named(name: str | torch.device | None) -> torch.device:
    """Return the device ``name``, or the best there is.

    Raises: UsageError for no name of a device, ResourceError for one that is missing.
    """
    if name in (None, "auto"):
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(str(name).lower())
    except RuntimeError as error:
        raise UsageError(
            "E_DEVICE", f"`{name}` is no device", hint="cpu, cuda or cuda:1"
        ) from error
    if device.type not in ("cpu", "cuda"):
        raise UsageError(
            "E_DEVICE", f"there are no kernels for `{device.type}`", hint="cpu, cuda or cuda:1"
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ResourceError(
            "E_NO_DEVICE",
            f"`{name}` is not there: torch sees {torch.cuda.device_count()} CUDA devices",
            hint="use --device cpu",
        )
    return device


def dtype_named(name: str | torch.dtype | None) -> torch.dtype | None:
    """Return the dtype ``name``, None for ``auto``.

    Raises: UsageError for one that models are not computed in.
    """
    plain = str(name or "auto").removeprefix("torch.").lower()
    if plain not in DTYPES:
        raise UsageError("E_DTYPE", f"`{name}` is no dtype to compute in", hint=", ".join(DTYPES))
    return DTYPES[plain]


def plan_load(
    checkpoint: Checkpoint,
    device: torch.device,
    quantization: str | None = None,
    dtype: str | torch.dtype | None = None,
) -> LoadPlan:
    """Decide what each quantized layer of ``checkpoint`` becomes on ``device``.

    Reads no weights.
    """
    layout = formats.detect(checkpoint)
    if layout and layout.rotates_inputs:
        raise CheckpointRefused(
            "E_TRANSFORM",
            f"{checkpoint.path} rotates inputs at run time (QuIP, SpinQuant R3/R4), which qtool "
            "does not do",
        )
    schemes = schemes_to_run(checkpoint, layout, quantization)
    skeleton = Skeleton(checkpoint, dtype_named(dtype) or _dtype(checkpoint, device))
    warned = [*left_plain(checkpoint, layout, quantization)]
    if any(skeleton.beyond(name) for name in checkpoint.tensors):
        warned.append("layers after the last, for multi-token prediction, are left out")
    sources = [
        _source(skeleton, layout, name, scheme)
        for name, scheme in schemes.items()
        if not skeleton.beyond(name)
    ]
    sharing: list[list[str]] = []
    if sources:
        try:
            called, sharing = skeleton.trace()
        except Exception as error:  # the code of any architecture
            warned.append(
                f"layers are not fused: the model does not run without data ({one_line(error)})"
            )
        else:
            sources = _called(checkpoint, layout, sources, called, warned)
    members = list(_fusible(sharing, sources))
    groups = [_group(together, skeleton.dtype, device, second_copy=True) for together in members]
    if not (second_copy := _has_room(groups, device)):
        groups = [
            _group(together, skeleton.dtype, device, second_copy=False) for together in members
        ]
    stacks = {
        (source.place.module, source.place.parameter)
        for source in sources
        if source.place.parameter
    }
    beside = [
        Source(name, place, _matrix(checkpoint.tensors[f"{name}.weight"].shape), None)
        for name in _plain_experts(checkpoint, schemes)
        if stacks and (place := skeleton.place(name)) and (place.module, place.parameter) in stacks
    ]
    if missing := skeleton.missing_experts([source.place for source in [*sources, *beside]]):
        message = (
            f"{checkpoint.path} has no weights for {len(missing)} experts or parts of them, e.g. "
            f"{missing[0]}"
        )
        raise CheckpointRefused(
            "E_TENSORS", message, hint="download or export the checkpoint again"
        )
    warned += _dequantized(groups, device)
    return LoadPlan(
        checkpoint,
        layout,
        skeleton,
        device,
        tuple(groups),
        second_copy,
        tuple(beside),
        tuple(warned),
    )


def _dequantized(groups: Sequence[Group], device: torch.device) -> Iterator[str]:
    """Yield what there is to say of the groups that no kernel but the plain one takes."""
    slow = Counter(
        (group.spec.scheme.name, tuple(group.choice.refused.items()))
        for group in groups
        if group.choice.kernel == "reference"
    )
    for (scheme, refused), count in slow.items():
        reasons = "; ".join(f"{kernel}: {reason}" for kernel, reason in refused)
        yield (
            f"{count} layers of {scheme} are dequantized at every step, for no kernel of "
            f"{device_of(device)} takes them ({reasons})"
        )


def _dtype(checkpoint: Checkpoint, device: torch.device) -> torch.dtype:
    configs = (checkpoint.text_config, checkpoint.config)
    named = next(
        (
            str(name)
            for config in configs
            for key in ("dtype", "torch_dtype")
            if (name := config.get(key))
        ),
        "",
    )
    return (
        torch.float16
        if device.type == "cuda" and named.removeprefix("torch.") == "float16"
        else torch.bfloat16
    )


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


def _matrix(shape: Sequence[int]) -> tuple[int, int]:
    rows, columns = shape
    return rows, columns


def _source(skeleton: Skeleton, layout: Layout | None, name: str, scheme: Scheme) -> Source:
    module = layout.modules.get(name) if layout else None
    shape = module.shape if module else _matrix(skeleton.checkpoint.tensors[f"{name}.weight"].shape)
    return Source(name, skeleton.place(name), shape, scheme, module.experts if module else 1)


def _plain_experts(checkpoint: Checkpoint, schemes: Mapping[str, Scheme]) -> list[str]:
    names = (
        name.removesuffix(".weight")
        for name, tensor in checkpoint.tensors.items()
        if name.endswith(".weight") and len(tensor.shape) == 2
    )
    return [name for name in names if ".experts." in name and name not in schemes]


def _called(
    checkpoint: Checkpoint,
    layout: Layout | None,
    sources: Sequence[Source],
    called: set[str],
    warned: list[str],
) -> list[Source]:
    """Return the sources whose modules are called; the weight of the others is read by their
    parents, so they must be plain.
    """
    read = [
        source.name
        for source in sources
        if not source.place.parameter and source.place.module not in called
    ]
    if read and layout:
        message = (
            f"{checkpoint.path}: `{read[0]}` is quantized, and the model multiplies with its "
            "weight by itself"
        )
        raise CheckpointRefused(
            "E_NO_LINEAR", message, hint="quantize the model again and leave such layers out"
        )
    if read:
        warned.append(
            f"layers whose weights the model itself multiplies with stay in 16 bits: {len(read)}, "
            f"e.g. `{read[0]}`"
        )
    return [source for source in sources if source.name not in read]


def _fusible(sharing: Sequence[Sequence[str]], sources: Sequence[Source]) -> Iterator[list[Source]]:
    """Yield the sources in groups of one scheme that share an input, in the order of the
    checkpoint.
    """
    together = {name: number for number, names in enumerate(sharing) for name in names}
    groups: dict[tuple[object, ...], list[Source]] = {}
    for source in sources:
        place = source.place
        shared = (
            (place.module, place.parameter, place.expert)
            if place.parameter
            else together.get(place.module, place.module)
        )
        groups.setdefault((shared, source.scheme, source.shape[1]), []).append(source)
    for members in groups.values():
        members.sort(key=lambda source: source.place.part)
        block = members[0].scheme.weights.block if members[0].scheme else None
        # a block would reach over two layers
        if block and any(source.shape[0] % block[0] for source in members):
            yield from ([source] for source in members)
        else:
            yield members


def _has_room(groups: Sequence[Group], device: torch.device) -> bool:
    """Whether the second copies that `FEW_TOKENS` asks for take at most a share of the memory of
    the device: the KV cache lives there too.
    """
    repacked = [source for group in groups if group.choice.few for source in group.sources]
    size = sum(
        source.scheme.weights.size_bytes(*source.shape) for source in repacked if source.scheme
    )
    return (
        not size
        or size <= torch.cuda.get_device_properties(device).total_memory * SECOND_COPY_SHARE
    )


def _group(
    sources: Sequence[Source], dtype: torch.dtype, device: torch.device, *, second_copy: bool
) -> Group:
    scheme = sources[0].scheme
    assert scheme is not None
    rows = sum(source.shape[0] // source.experts for source in sources)
    activations = scheme.activations
    static = activations is not None and activations.needs_data
    spec = LinearSpec(scheme, (rows, sources[0].shape[1]), dtype, static)
    return Group(tuple(sources), spec, _choose(spec, device_of(device), second_copy=second_copy))


_choose = lru_cache(maxsize=None)(choose)


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
            for place, module in _built(plan, group, raw):
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
            linear = _plain_linear(plan, source)
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


def _weight(
    plan: LoadPlan, source: Source, tensors: RawTensors
) -> tuple[QuantizedWeight, Tensor | None]:
    """Return the weight that ``tensors``, which are taken, stand for, and its bias, on the
    device.
    """
    moved = {suffix: tensors.pop(suffix).to(plan.device) for suffix in list(tensors)}
    bias = moved.pop("bias", None)
    scheme = source.scheme
    assert scheme is not None
    if plan.layout is None or source.name not in plan.layout.modules:
        return quantize(moved["weight"], scheme), bias
    module = plan.layout.modules[source.name]
    weight = formats.FORMATS[plan.layout.format].read(module, moved)
    if scheme.activations != module.scheme.activations:
        weight = replace(
            weight, activation=Activation(scheme.activations) if scheme.activations else None
        )
    return weight, bias


def _built(
    plan: LoadPlan, group: Group, raw: Sequence[RawTensors]
) -> Iterator[tuple[Place, nn.Module]]:
    """Yield the modules that the layers of ``group`` become: one for all where what they ask of
    their input is the same.
    """
    weights = [
        _weight(plan, source, tensors) for source, tensors in zip(group.sources, raw, strict=True)
    ]
    if group.sources[0].experts > 1:
        (source,), ((weight, _),) = group.sources, weights
        rows = source.shape[0] // source.experts
        for expert in range(source.experts):
            piece = _rows(weight, expert * rows, (expert + 1) * rows)
            yield (
                replace(source.place, expert=expert),
                QuantizedLinear(group.spec, group.choice, piece),
            )
        return
    members = list(zip(group.sources, weights, strict=True))
    del weights
    while members:
        alike = [member for member in members if _same_input(members[0][1][0], member[1][0])]
        members = [member for member in members if all(member is not other for other in alike)]
        yield from _fused(plan, alike)


def _fused(
    plan: LoadPlan, members: list[tuple[Source, tuple[QuantizedWeight, Tensor | None]]]
) -> Iterator[tuple[Place, nn.Module]]:
    """Yield the modules of layers that become one matrix; ``members`` are taken, so that their
    weights need not outlive it.
    """
    sources = [source for source, _ in members]
    weight, bias = (
        _stacked([weight for _, (weight, _) in members]),
        _stacked_bias([bias for _, (_, bias) in members], sources),
    )
    members.clear()
    group = _group(sources, plan.skeleton.dtype, plan.device, second_copy=plan.second_copy)
    spec, choice = group.spec, group.choice
    if spec.scheme.weights.granularity == "tensor" and bool(
        (weight.scale != weight.scale[0]).any()
    ):
        spec = replace(
            spec,
            scheme=replace(
                spec.scheme, weights=replace(spec.scheme.weights, granularity="channel")
            ),
        )
        choice = _choose(spec, device_of(plan.device), second_copy=plan.second_copy)
    whole = QuantizedLinear(spec, choice, weight, bias)
    if len(sources) == 1 or sources[0].place.parameter:
        yield sources[0].place, whole
        return
    shared = SharedInput(whole, [source.shape[0] for source in sources])
    for index, source in enumerate(sources):
        yield source.place, FusedLinear(shared, index)


def _same_input(one: QuantizedWeight, other: QuantizedWeight) -> bool:
    pairs = zip(_asked_of_input(one), _asked_of_input(other), strict=True)
    return all(a is b or (a is not None and b is not None and torch.equal(a, b)) for a, b in pairs)


def _asked_of_input(weight: QuantizedWeight) -> tuple[Tensor | None, ...]:
    activation = weight.activation
    static = (activation.scale, activation.zero) if activation else (None, None)
    return weight.perm, weight.pre_scale, *static


def _stacked(weights: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """Return ``weights``, which ask the same of their input, as one of all their outputs."""
    first = weights[0]
    if len(weights) == 1:
        return first
    dtype = (
        first.scale.dtype if len({weight.scale.dtype for weight in weights}) == 1 else torch.float32
    )

    def joined(name: str) -> Tensor | None:
        parts = [part for weight in weights if (part := getattr(weight, name)) is not None]
        return torch.cat(parts) if parts else None

    scale = torch.cat([weight.scale.to(dtype) for weight in weights])
    return replace(
        first,
        data=torch.cat([weight.data for weight in weights]),
        scale=scale,
        scale2=joined("scale2"),
        zero=joined("zero"),
    )


def _stacked_bias(biases: Sequence[Tensor | None], sources: Sequence[Source]) -> Tensor | None:
    present = next((bias for bias in biases if bias is not None), None)
    if present is None:
        return None
    return torch.cat(
        [
            present.new_zeros(source.shape[0]) if bias is None else bias
            for bias, source in zip(biases, sources, strict=True)
        ]
    )


def _rows(weight: QuantizedWeight, start: int, stop: int) -> QuantizedWeight:
    """Return the outputs ``start`` to ``stop`` of ``weight``, whose scales cover one row each."""
    parts = {
        name: part[start:stop]
        for name in ("data", "scale", "scale2", "zero")
        if (part := getattr(weight, name)) is not None
    }
    return replace(weight, **parts)


def _plain_linear(plan: LoadPlan, source: Source) -> nn.Linear:
    weight = read_tensor(plan.checkpoint, f"{source.name}.weight").to(
        plan.device, plan.skeleton.dtype
    )
    bias = f"{source.name}.bias"
    linear = nn.Linear(
        source.shape[1], source.shape[0], bias=bias in plan.checkpoint.tensors, device="meta"
    )
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if linear.bias is not None:
        linear.bias = nn.Parameter(
            read_tensor(plan.checkpoint, bias).to(plan.device, plan.skeleton.dtype),
            requires_grad=False,
        )
    return linear
