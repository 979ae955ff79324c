"""`LoadPlan`: what each quantized layer of a checkpoint becomes on a device, found from headers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from qtool import formats
from qtool.architecture import check_model
from qtool.architecture.mtp import MtpNames, find_mtp, loaded_shapes, with_mtp_layer
from qtool.checkpoint import Checkpoint
from qtool.checkpoint.encoding import Encoding
from qtool.errors import CheckpointRefused, one_line
from qtool.formats import Layout
from qtool.name_map import LinearWeight
from qtool.runtime.devices import dtype_named
from qtool.runtime.encoder_names import head_of, without_head
from qtool.runtime.experts.plan import GroupedPlan, plan_experts
from qtool.runtime.kernels import (
    Choice,
    Device,
    LinearSpec,
    cached_choice,
    device_of,
    linear_spec,
    load_kernel,
)
from qtool.runtime.online import schemes_to_run, skip_reasons
from qtool.runtime.skeleton import Skeleton
from qtool.runtime.source import Source
from qtool.scheme import GGUF_INPUTS, Scheme

# of the device's memory, for second copies of weights; the rest is for the KV cache
SECOND_COPY_SHARE = 1 / 8


@dataclass(frozen=True)
class Group:
    """Layers that share an input and a scheme, and become one."""

    sources: tuple[Source, ...]
    spec: LinearSpec
    choice: Choice

    def to_dict(self) -> dict[str, object]:
        """Return the group for ``--json``."""
        few = self.choice.few
        return {
            "layers": [source.name for source in self.sources],
            "shape": self.spec.shape,
            "scheme": self.spec.scheme.name,
            "kernel": self.choice.kernel,
            "few_tokens": few and {"kernel": few.kernel, "most": few.most},
            "refused": dict(self.choice.refused),
        }


@dataclass(frozen=True, kw_only=True)
class LoadPlan:
    """What each quantized layer of a checkpoint becomes on a device."""

    checkpoint: Checkpoint
    layout: Layout | None
    skeleton: Skeleton
    device: torch.device
    groups: tuple[Group, ...]
    second_copy: bool
    """Whether there is memory for a second copy of weights, packed for few tokens."""
    experts: Mapping[str, GroupedPlan]
    """The modules of experts that are packed as a whole, by name."""
    unquantized_experts: tuple[Source, ...]
    """Experts that stay in 16 bits while others of their stack are quantized."""
    dequantized: tuple[Source, ...] = ()
    """Quantized layers that the model needs in 16 bits: embeddings, whose rows it looks up, and
    those whose weights it reads directly.
    """
    warnings: tuple[str, ...]
    mtp: MtpNames | None = None
    """The layer that drafts tokens; None if it is left out. The skeleton's last layer is in it."""
    encoding: Encoding | None = None
    """What the model returns for a text; None if it continues it."""

    @property
    def sources(self) -> list[Source]:
        """All layers that qtool builds itself."""
        quantized = [source for group in self.groups for source in group.sources]
        return [*quantized, *self.unquantized_experts]

    def to_dict(self) -> dict[str, object]:
        """Return the plan for ``--json``."""
        return {
            "model": str(self.checkpoint.source),
            "device": str(device_of(self.device)),
            "groups": [group.to_dict() for group in self.groups],
            "warnings": list(self.warnings),
        }


def plan_load(
    checkpoint: Checkpoint,
    device: torch.device,
    quantization: str | None = None,
    dtype: str | torch.dtype | None = None,
    *,
    mtp: bool = False,
    encoding: Encoding | None = None,
) -> LoadPlan:
    """Decide what each quantized layer of ``checkpoint`` becomes; reads no weights.

    Args:
        device: where the model will run.
        quantization: as in `qtool.runtime.online.schemes_to_run`.
        dtype: what unquantized layers compute in; None for that of the checkpoint.
        mtp: load the layer for multi-token prediction, too.
        encoding: load the model without the head for the next token, for `runtime.encoder`.
    Raises: CheckpointRefused.
    """
    layout = formats.detect(checkpoint)
    if layout and layout.rotates_inputs:
        message = (
            f"{checkpoint.source} rotates inputs at run time (QuIP, SpinQuant R3/R4), which qtool "
            "does not support"
        )
        raise CheckpointRefused("E_TRANSFORM", message)
    schemes = schemes_to_run(checkpoint, layout, quantization)
    computed_in = dtype_named(dtype) or _checkpoint_dtype(checkpoint, device)
    if layout and layout.format == "gguf" and device.type == "cpu":
        schemes = _with_rounded_inputs(layout, schemes, computed_in)
    names = find_mtp(checkpoint) if mtp else None
    whole = with_mtp_layer(checkpoint) if names else checkpoint
    built = whole if encoding is None else without_head(checkpoint)
    moved = (names.block, names.target) if names else None
    skeleton = Skeleton(built, layout, computed_in, moved)
    head = head_of(skeleton, encoding) if encoding is not None else None
    warned = [
        *checkpoint.notes,
        *skip_reasons(checkpoint, layout, quantization),
        *_left_out(skeleton, names, head),
    ]
    sources = [
        _source(skeleton, layout, name, scheme)
        for name, scheme in schemes.items()
        if skeleton.is_loaded(f"{name}.weight")
    ]
    sources, sharing, read_directly = _trace(skeleton, sources, warned)
    dequantized = read_directly if layout else []
    if dequantized:
        warned.append(
            "quantized embeddings, and layers whose weights the model reads directly, are "
            f"dequantized to 16 bits: {_shorten(dequantized)}"
        )
    elif read_directly:
        warned.append(
            "layers whose weights the model reads directly stay in 16 bits: "
            f"{_shorten(read_directly)}"
        )
    if names and layout and names.projection in layout.modules:
        warned.append(f"`{names.projection}` is dequantized to 16 bits")
    experts, one_by_one = plan_experts(skeleton, sources, device)
    groups, second_copy = _make_groups(sources, sharing, experts, skeleton.dtype, device)
    unquantized = _unquantized_experts(skeleton, schemes, sources)
    _check_experts(skeleton, [*sources, *unquantized])
    check_model(whole, layout, loaded_shapes(whole, layout, names) if names else None)
    return LoadPlan(
        checkpoint=checkpoint,
        layout=layout,
        skeleton=skeleton,
        device=device,
        groups=tuple(groups),
        second_copy=second_copy,
        experts=experts,
        unquantized_experts=tuple(unquantized),
        dequantized=tuple(dequantized),
        warnings=(*warned, *one_by_one, *_slow_groups(groups, device)),
        mtp=names,
        encoding=encoding,
    )


def _with_rounded_inputs(
    layout: Layout, schemes: Mapping[str, Scheme], dtype: torch.dtype
) -> dict[str, Scheme]:
    """Return ``schemes`` with inputs rounded as llama.cpp rounds them on a CPU, for the layers that
    a kernel multiplies so.
    """
    device = Device("cpu")
    kernel = load_kernel("int8_groups")

    def round_inputs(name: str, scheme: Scheme) -> Scheme:
        module = layout.modules[name]
        rounded = replace(scheme, activations=GGUF_INPUTS)
        spec = linear_spec(rounded, module.shape, dtype)
        is_taken = module.experts == 1 and kernel.unsupported_reason(spec, device) is None
        return rounded if is_taken else scheme

    return {name: round_inputs(name, scheme) for name, scheme in schemes.items()}


def _left_out(skeleton: Skeleton, mtp: MtpNames | None, head: str | None) -> Iterator[str]:
    """Say what of the checkpoint is not loaded; ``head`` is made into another layer."""
    parts = mtp.modules if mtp else ()
    own = tuple(f"{name}." for name in (*parts, head) if name)
    unused = Counter(
        reason for name, reason in skeleton.names.unused.items() if not name.startswith(own)
    )
    for reason, count in unused.items():
        yield f"{count} tensors are left out: {reason}"
    if skeleton.towers:
        towers = ", ".join(skeleton.towers)
        yield f"only the language model is loaded, for requests of text, without {towers}"


def _checkpoint_dtype(checkpoint: Checkpoint, device: torch.device) -> torch.dtype:
    """Return the dtype to compute in: float16 where the config says so on a GPU, else bfloat16."""
    for config in (checkpoint.text_config, checkpoint.config):
        if name := config.get("dtype") or config.get("torch_dtype"):
            is_half = str(name).removeprefix("torch.") == "float16"
            return torch.float16 if is_half and device.type == "cuda" else torch.bfloat16
    return torch.bfloat16


def _source(skeleton: Skeleton, layout: Layout | None, name: str, scheme: Scheme) -> Source:
    module = layout.modules.get(name) if layout else None
    if module:
        return Source(name, skeleton.target(name), module.shape, scheme, module.experts)
    shape = _weight_shape(skeleton.checkpoint, name)
    return Source(name, skeleton.target(name), shape, scheme)


def _weight_shape(checkpoint: Checkpoint, name: str) -> tuple[int, int]:
    rows, columns = checkpoint.tensors[f"{name}.weight"].shape
    return rows, columns


def _trace(
    skeleton: Skeleton, sources: Sequence[Source], warned: list[str]
) -> tuple[list[Source], Sequence[Sequence[str]], list[Source]]:
    """Return the sources that the model calls, the names of layers that share an input, and the
    sources whose weights the model reads directly. Appends to ``warned`` what goes wrong.
    """
    looked_up = [source for source in sources if source.name in skeleton.names.embeddings]
    linears = [source for source in sources if source not in looked_up]
    if not linears:
        return [], [], looked_up
    try:
        trace = skeleton.trace()
    except Exception as error:  # the code of any architecture
        warned.append(
            f"layers are not fused: the model does not run without data ({one_line(error)})"
        )
        return linears, [], looked_up
    called = [
        source
        for source in linears
        if source.target.parameter or source.target.module in trace.called
    ]
    read_directly = [source for source in linears if source not in called]
    return called, trace.sharing, [*looked_up, *read_directly]


def _shorten(sources: Sequence[Source]) -> str:
    shown = f"`{sources[0].name}`"
    return f"{shown} and {len(sources) - 1} more" if len(sources) > 1 else shown


def _make_groups(
    sources: Sequence[Source],
    sharing: Sequence[Sequence[str]],
    experts: Mapping[str, GroupedPlan],
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[list[Group], bool]:
    """Return the groups, and whether there is memory for second copies of their weights."""
    fusible = _fusible(sharing, sources)

    def make(*, second_copy: bool) -> list[Group]:
        groups = (make_group(each, dtype, device, second_copy=second_copy) for each in fusible)
        return [_packed_as_a_whole(group, experts) for group in groups]

    groups = make(second_copy=True)
    if _has_room(groups, device):
        return groups, True
    return make(second_copy=False), False


def _packed_as_a_whole(group: Group, experts: Mapping[str, GroupedPlan]) -> Group:
    """Return ``group`` with the kernel of its layer of experts, if that is packed as a whole."""
    layer = experts.get(group.sources[0].target.module)
    return replace(group, choice=Choice(layer.kernel, {})) if layer else group


def _fusible(sharing: Sequence[Sequence[str]], sources: Sequence[Source]) -> list[list[Source]]:
    """Return the sources in lists that share an input and a scheme, in the checkpoint's order."""
    input_of = {name: number for number, names in enumerate(sharing) for name in names}
    groups: dict[tuple[object, ...], list[Source]] = {}
    for source in sources:
        key = (_input_key(source.target, input_of), source.scheme, source.shape[1])
        groups.setdefault(key, []).append(source)
    fusible = []
    for members in groups.values():
        members.sort(key=lambda source: source.target.part)
        fusible += [members] if _can_join(members) else [[source] for source in members]
    return fusible


def _input_key(target: LinearWeight, input_of: Mapping[str, int]) -> object:
    """Return what layers with the same input have in common."""
    if target.parameter:
        return target.module, target.parameter, target.expert
    return input_of.get(target.module, target.module)


def _can_join(members: Sequence[Source]) -> bool:
    """Whether the outputs of the layers lie side by side, and no block of weights under one scale
    would reach over two of them.
    """
    if any(source.target.is_interleaved for source in members):
        return False
    block = members[0].scheme.weights.block if members[0].scheme else None
    return not block or all(source.shape[0] % block[0] == 0 for source in members)


def _has_room(groups: Sequence[Group], device: torch.device) -> bool:
    """Whether the second copies that `FEW_TOKENS` asks for take no more than their share."""
    repacked = [source for group in groups if group.choice.few for source in group.sources]
    size = sum(
        source.scheme.weights.size_bytes(*source.shape) for source in repacked if source.scheme
    )
    if not size:
        return True
    return size <= torch.cuda.get_device_properties(device).total_memory * SECOND_COPY_SHARE


def make_group(
    sources: Sequence[Source], dtype: torch.dtype, device: torch.device, *, second_copy: bool
) -> Group:
    """Return ``sources``, which share an input and a scheme, as one layer with its kernel."""
    scheme = sources[0].scheme
    assert scheme is not None
    rows = sum(source.shape[0] // source.experts for source in sources)
    spec = linear_spec(scheme, (rows, sources[0].shape[1]), dtype)
    choice = cached_choice(spec, device_of(device), second_copy=second_copy)
    return Group(tuple(sources), spec, choice)


def _unquantized_experts(
    skeleton: Skeleton, schemes: Mapping[str, Scheme], sources: Sequence[Source]
) -> list[Source]:
    """Return the experts that are not quantized, beside experts that are or that transformers
    loads in stacks alone.
    """
    holders = {source.target.module for source in sources if source.target.parameter}
    return [
        Source(name, linear, linear.shape, scheme=None)
        for name, linear in skeleton.names.linears.items()
        if linear.parameter
        and not linear.is_stacked
        and name not in schemes
        and (linear.is_split or linear.module in holders)
    ]


def _check_experts(skeleton: Skeleton, sources: Sequence[Source]) -> None:
    """Raise CheckpointRefused if a stack of experts is not complete."""
    missing = skeleton.missing_experts([source.target for source in sources])
    if missing:
        raise CheckpointRefused(
            "E_TENSORS",
            f"{skeleton.checkpoint.source} lacks the weights of {len(missing)} experts or parts of "
            f"them, e.g. {missing[0]}",
            hint="take config.json and all weights from one export",
        )


def _slow_groups(groups: Sequence[Group], device: torch.device) -> Iterator[str]:
    """Yield a warning for each kind of layers that only the `reference` kernel supports."""
    slow = Counter(
        (group.spec.scheme.name, tuple(group.choice.refused.items()))
        for group in groups
        if group.choice.kernel == "reference"
    )
    for (scheme, refused), count in slow.items():
        reasons = "; ".join(f"{kernel}: {reason}" for kernel, reason in refused)
        yield (
            f"{count} layers of {scheme} are dequantized at every step: no kernel for "
            f"{device_of(device)} supports them ({reasons})"
        )
