"""The tensors of a GGUF file as transformers names and arranges them."""

from __future__ import annotations

from collections.abc import Iterator

from qtool.checkpoint.arrangement import Arrangement
from qtool.checkpoint.gguf_fields import bad_shape
from qtool.checkpoint.gguf_header import MAX_TENSORS, GgufHeader, GgufTensor
from qtool.checkpoint.gguf_names import GATE_UP, ROPE_FACTORS, Architecture, Target, target_of
from qtool.checkpoint.gguf_types import QUANTIZED
from qtool.checkpoint.model import TensorInfo
from qtool.checkpoint.strict_json import Json, refused


def gguf_tensors(
    header: GgufHeader, architecture: Architecture, config: Json
) -> dict[str, TensorInfo]:
    """Return the tensors of ``header`` in transformers' names.

    Experts of a stack are tensors of their own, or lie as ``architecture`` says.
    Raises: CheckpointRefused, for a tensor that the architecture does not have.
    """
    stacks = [tensor for tensor in header.tensors.values() if len(tensor.shape) == 3]
    if sum(tensor.shape[0] for tensor in stacks) > MAX_TENSORS:
        largest = max(stacks, key=lambda tensor: tensor.shape[0])
        raise bad_shape(largest, f"at most {MAX_TENSORS:,} experts in all layers")
    tensors: dict[str, TensorInfo] = {}
    for tensor in header.tensors.values():
        for info in _infos(header, architecture, config, tensor):
            if info.name in tensors:
                raise refused(
                    "E_DUPLICATE", f"{tensor.file}: `{tensor.name}` and another are `{info.name}`"
                )
            tensors[info.name] = info
    return tensors


def _infos(
    header: GgufHeader, architecture: Architecture, config: Json, tensor: GgufTensor
) -> Iterator[TensorInfo]:
    if tensor.name in ROPE_FACTORS:
        return
    target = _target(architecture, tensor)
    if target.expert_layer and architecture.experts == "apart":
        yield from _experts_apart(tensor, target)
    elif target.expert_layer:
        yield from _stacked_experts(header, tensor, target)
    else:
        yield _info(architecture, config, tensor, target)


def _target(architecture: Architecture, tensor: GgufTensor) -> Target:
    """Return where ``tensor`` belongs; CheckpointRefused when nowhere."""
    target = target_of(architecture, tensor.name)
    if target is None:
        raise refused(
            "E_GGUF_TENSOR",
            f"{tensor.file}: tensor `{tensor.name}` is none of the architecture "
            f"`{architecture.name}` as qtool knows it",
            "llama.cpp may load it: the model has parts that transformers' class lacks",
        )
    if tensor.type in QUANTIZED and (len(tensor.shape) < 2 or target.suffix != "weight"):
        raise refused(
            "E_GGUF_TENSOR",
            f"{tensor.file}: tensor `{tensor.name}` is {tensor.type}, and only matrices are "
            "quantized",
        )
    return target


def _info(
    architecture: Architecture, config: Json, tensor: GgufTensor, target: Target
) -> TensorInfo:
    shape = tensor.shape
    if target.stem == "ffn_gate_inp_shexp" and len(shape) == 1:  # of one output
        shape = (1, *shape)
    arrangement = _arrangement(architecture, config, tensor, target)
    return TensorInfo(
        target.name, tensor.type, shape, tensor.file, tensor.offset, tensor.size_bytes, arrangement
    )


def _arrangement(
    architecture: Architecture, config: Json, tensor: GgufTensor, target: Target
) -> Arrangement | None:
    """Return what undoes what llama.cpp's converter did to ``tensor``."""
    if field := architecture.permuted_heads(target.stem):
        heads = int(config[field])
        if tensor.shape[0] % (2 * heads):
            raise bad_shape(tensor, f"{heads} heads of pairs of channels")
        return Arrangement(heads=heads)
    shift = architecture.norm_shift_of(target.stem)
    if not shift:
        return None
    if tensor.type != "F32":
        raise refused(
            "E_GGUF_TENSOR", f"{tensor.file}: the norm `{tensor.name}` is {tensor.type}, not F32"
        )
    return Arrangement(shift=-shift)


def _experts_apart(tensor: GgufTensor, target: Target) -> Iterator[TensorInfo]:
    _check_stack(tensor, target)
    count, *shape = tensor.shape
    size = tensor.size_bytes // count
    for expert in range(count):
        yield TensorInfo(
            f"{target.name}.{expert}.{target.expert_layer}.{target.suffix}",
            tensor.type,
            tuple(shape),
            tensor.file,
            tensor.offset + expert * size,
            size,
        )


def _check_stack(tensor: GgufTensor, target: Target) -> None:
    if len(tensor.shape) != (3 if target.suffix == "weight" else 2):
        raise bad_shape(tensor, "a stack of experts")


def _stacked_experts(
    header: GgufHeader, tensor: GgufTensor, target: Target
) -> Iterator[TensorInfo]:
    """Yield the stack that ``tensor`` is, or makes with another, whose rows come between."""
    _check_stack(tensor, target)
    is_weight = target.suffix == "weight"
    if target.expert_layer == "up_proj":
        _partner(header, tensor, "ffn_up_exps", "ffn_gate_exps")
        return  # its rows come with those of gate
    other, shape = None, tensor.shape
    if target.expert_layer == "gate_proj":
        partner = _partner(header, tensor, "ffn_gate_exps", "ffn_up_exps")
        other = partner.file, partner.offset
        shape = (shape[0], 2 * shape[1], *shape[2:])
    arrangement = Arrangement(other=other)
    if is_weight and tensor.type not in QUANTIZED:
        shape = (shape[0], shape[2], shape[1])
        arrangement = arrangement._replace(is_transposed=True)
    parameter = GATE_UP if target.expert_layer == "gate_proj" else target.expert_layer
    yield TensorInfo(
        f"{target.name}.{parameter}{'' if is_weight else '_bias'}",
        tensor.type,
        shape,
        tensor.file,
        tensor.offset,
        tensor.size_bytes * (2 if other else 1),
        None if arrangement == Arrangement() else arrangement,
    )


def _partner(header: GgufHeader, tensor: GgufTensor, stem: str, other: str) -> GgufTensor:
    """Return the tensor with ``other`` instead of ``stem`` in its name.

    Raises: CheckpointRefused, when there is none of the same type and shape.
    """
    found = header.tensors.get(tensor.name.replace(stem, other))
    if found is None or (found.type, found.shape) != (tensor.type, tensor.shape):
        raise refused(
            "E_GGUF_TENSOR",
            f"{tensor.file}: `{tensor.name}` has no {other} of the same type and shape",
        )
    return found
