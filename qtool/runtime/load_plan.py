"""What each quantized layer of a checkpoint becomes on a device, decided from headers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from qtool import formats
from qtool.checkpoint import Checkpoint
from qtool.errors import CheckpointRefused, one_line
from qtool.formats import Layout
from qtool.runtime.devices import dtype_named
from qtool.runtime.kernels import Choice, LinearSpec, choose, device_of
from qtool.runtime.online import left_plain, schemes_to_run
from qtool.runtime.skeleton import Place, Skeleton
from qtool.scheme import Scheme

SECOND_COPY_SHARE = 1 / 8


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
    groups = [
        make_group(together, skeleton.dtype, device, second_copy=True) for together in members
    ]
    if not (second_copy := _has_room(groups, device)):
        groups = [
            make_group(together, skeleton.dtype, device, second_copy=False) for together in members
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


def make_group(
    sources: Sequence[Source], dtype: torch.dtype, device: torch.device, *, second_copy: bool
) -> Group:
    """Return ``sources``, which share an input and a scheme, as one layer with its kernel."""
    scheme = sources[0].scheme
    assert scheme is not None
    rows = sum(source.shape[0] // source.experts for source in sources)
    activations = scheme.activations
    static = activations is not None and activations.needs_data
    spec = LinearSpec(scheme, (rows, sources[0].shape[1]), dtype, static)
    return Group(
        tuple(sources), spec, cached_choice(spec, device_of(device), second_copy=second_copy)
    )


cached_choice = lru_cache(maxsize=None)(choose)
