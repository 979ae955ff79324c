"""Quantized stacks of experts: one tensor for all experts of a layer, ``experts.gate_up_proj``, and
its scales beside it. Each expert is read as layers of its own, ``experts.0.gate_proj``: the same
bytes, at their place in the file.

ModelOpt writes those of Llama 4 [E, inputs, outputs], transformers those of Gemma 4 and Mistral
Small 4 [E, outputs, inputs]; a scale is one for all experts, for each, or lies as the weights do.

Source: nvidia-modelopt 0.47, `torch/export/unified_export_hf.py`; transformers 5.17,
    `integrations/finegrained_fp8.py` FP8Experts; vLLM 0.33, `models/llama4.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from qtool.checkpoint.arrangement import Arrangement
from qtool.checkpoint.model import Checkpoint, TensorInfo
from qtool.checkpoint.strict_json import refused
from qtool.errors import CheckpointRefused

GATED = ("gate_proj", "up_proj")
"""The layers of an expert whose outputs lie side by side in a stack ``gate_up_proj``."""
CODES = ("F8_E4M3", "I8", "U8")
SCALES = {  # behind the name of a stack -> the tensor of a layer
    "_weight_scale": "weight_scale",
    "_weight_scale_2": "weight_scale_2",
    "_input_scale": "input_scale",
    "_scale_inv": "weight_scale_inv",
    "_activation_scale": "activation_scale",
}
MULTIPLIERS = ("_weight_scale", "_scale_inv")
OF_A_BYTE = ("F8_E4M3", "F8_E8M0", "U8")  # dtypes of the scales of groups of FP4
MAX_TENSORS = 400_000
_NAME = re.compile(r"(.*\bexperts)\.(gate_up_proj|gate_proj|up_proj|down_proj)(_\w+)?")
_HINT = "take config.json and all weights from one export"


@dataclass(frozen=True)
class _Stack:
    """One projection of all experts of a layer."""

    holder: str
    """The module of the experts."""
    projection: str
    weight: TensorInfo
    scales: Mapping[str, TensorInfo]
    """By what stands behind the name of the stack, a key of `SCALES`."""
    is_transposed: bool = False
    """Whether it is [E, inputs, outputs]."""

    @property
    def kinds(self) -> tuple[str, ...]:
        """The layers of an expert in it, whose outputs lie side by side."""
        return GATED if self.projection == "gate_up_proj" else (self.projection,)

    @property
    def multiplier(self) -> TensorInfo:
        """The scales of its weights."""
        return next(self.scales[suffix] for suffix in MULTIPLIERS if suffix in self.scales)

    @property
    def codes_in_a_byte(self) -> int:
        """Two for FP4, whose groups have scales of a byte."""
        is_fp4 = self.weight.dtype != "F8_E4M3" and self.multiplier.dtype in OF_A_BYTE
        return 2 if is_fp4 else 1

    @property
    def outputs(self) -> int:
        """Of all layers of an expert in it."""
        return self.weight.shape[2 if self.is_transposed else 1]

    @property
    def hidden_size(self) -> int:
        """Outputs of `down_proj` and inputs of the others."""
        if self.projection == "down_proj":
            return self.outputs
        return self.weight.shape[1 if self.is_transposed else 2] * self.codes_in_a_byte


def with_experts_apart(checkpoint: Checkpoint) -> Checkpoint:
    """Return ``checkpoint`` with a tensor for each layer of each expert instead of the quantized
    stacks in it. Stacks of other forms stay, for the formats to refuse.

    Raises: CheckpointRefused, when a stack and its scales do not fit each other or the config.
    """
    if not any(map(_may_be_stack, checkpoint.tensors.values())):
        return checkpoint
    stacks = _in_order(checkpoint, list(_stacks(checkpoint.tensors)))
    _check_count(checkpoint, stacks)
    _check_blocks(checkpoint, stacks)
    layers = {
        tensor.name: list(_layers(stack, tensor, suffix))
        for stack in stacks
        for suffix, tensor in {"": stack.weight, **stack.scales}.items()
    }
    return replace(
        checkpoint,
        tensors=_with_layers(checkpoint, layers),
        expert_stacks=tuple(stack.weight.name for stack in stacks),
    )


def _with_layers(
    checkpoint: Checkpoint, layers: Mapping[str, Sequence[TensorInfo]]
) -> dict[str, TensorInfo]:
    """Return the tensors of ``checkpoint``, where ``layers`` take the places of those they name."""
    tensors: dict[str, TensorInfo] = {}
    for name, tensor in checkpoint.tensors.items():
        if name not in layers:
            tensors[name] = tensor
            continue
        found = {layer.name: layer for layer in layers[name]}
        if both := sorted(found.keys() & checkpoint.tensors.keys()):
            raise refused(
                "E_DUPLICATE",
                f"{checkpoint.path}: `{both[0]}` and the stack `{name}` are one layer",
                "take all files from one export",
            )
        tensors |= found
    return tensors


def _may_be_stack(tensor: TensorInfo) -> bool:
    return len(tensor.shape) == 3 and tensor.dtype in CODES


def _stacks(tensors: Mapping[str, TensorInfo]) -> Iterator[_Stack]:
    """Yield the stacks that are taken apart: of FP8, int8 or FP4, and all that lies beside them is
    known. Biases are gpt-oss', whose gate and up alternate.

    Raises: CheckpointRefused, when a stack has lost its scales.
    """
    for (holder, projection), parts in _found(tensors).items():
        weight = parts.pop("")
        if not parts.keys() <= SCALES.keys():
            continue
        if parts.keys().isdisjoint(MULTIPLIERS):
            raise refused(
                "E_MISSING_TENSOR",
                f"`{weight.name}` holds {weight.dtype} codes of experts, and its scale "
                f"(`{weight.name}{MULTIPLIERS[0]}` or `{weight.name}{MULTIPLIERS[1]}`) is missing",
                _HINT,
            )
        stack = _Stack(holder, projection, weight, parts)
        if weight.dtype != "U8" or stack.codes_in_a_byte == 2:
            yield stack


def _found(tensors: Mapping[str, TensorInfo]) -> dict[tuple[str, str], dict[str, TensorInfo]]:
    """Return what may be stacks, and what lies beside them, by the end of the name."""
    found: dict[tuple[str, str], dict[str, TensorInfo]] = {}
    for name, tensor in tensors.items():
        if match := _NAME.fullmatch(name):
            found.setdefault((match[1], match[2]), {})[match[3] or ""] = tensor
    return {
        stack: parts for stack, parts in found.items() if "" in parts and _may_be_stack(parts[""])
    }


def _in_order(checkpoint: Checkpoint, stacks: Sequence[_Stack]) -> list[_Stack]:
    """Return ``stacks`` with the order of inputs and outputs in each layer. Those of Llama 4 are
    transposed; of other models, where the hidden size is says so.

    Raises: CheckpointRefused, when it is nowhere, or two stacks of a layer differ.
    """
    is_llama_4 = str(checkpoint.config.get("model_type")).startswith("llama4")
    hidden = checkpoint.text_config.get("hidden_size")
    transposed: dict[str, _Stack] = {}
    others: dict[str, _Stack] = {}
    for stack in stacks:
        turned = replace(stack, is_transposed=True)
        as_it_is = stack.hidden_size == hidden and not is_llama_4
        if not stack.weight.count or (not as_it_is and turned.hidden_size != hidden):
            raise _misfit(stack.weight, f"experts whose hidden size is {hidden}")
        if not as_it_is:
            transposed[stack.holder] = turned
        elif turned.hidden_size != hidden:
            others[stack.holder] = stack
    for holder in sorted(transposed.keys() & others.keys()):
        name = others[holder].weight.name
        raise _misfit(transposed[holder].weight, f"outputs and inputs in the order of `{name}`")
    return [replace(stack, is_transposed=stack.holder in transposed) for stack in stacks]


def _check_count(checkpoint: Checkpoint, stacks: Sequence[_Stack]) -> None:
    count = sum(
        stack.weight.shape[0] * len(stack.kinds) * (1 + len(stack.scales)) for stack in stacks
    )
    if count > MAX_TENSORS:
        raise refused(
            "E_TENSOR_COUNT",
            f"{checkpoint.path}: its stacks hold {count:,} tensors of experts, more than any model "
            "known",
            "is it one model?",
        )


def _check_blocks(checkpoint: Checkpoint, stacks: Sequence[_Stack]) -> None:
    """Raise CheckpointRefused when a block, whose sides the config gives as they lie in the file,
    has outputs of two layers.
    """
    block = (checkpoint.quantization_config or {}).get("weight_block_size")
    if not isinstance(block, list) or [type(side) for side in block] != [int, int]:
        return
    for stack in stacks:
        height = max(1, block[1 if stack.is_transposed else 0])
        is_cut = stack.outputs // len(stack.kinds) % height
        if is_cut and len(stack.kinds) > 1 and stack.multiplier.count > 1:
            raise _misfit(
                stack.weight, f"gate and up whose outputs are cut into blocks of {height}"
            )


def _layers(stack: _Stack, tensor: TensorInfo, suffix: str) -> Iterator[TensorInfo]:
    """Yield what ``tensor``, the stack or what lies beside it, is for each layer of each expert."""
    last = SCALES[suffix] if suffix else "weight"
    experts = stack.weight.shape[0]
    first = _first_expert(tensor, experts)
    parts = [_of_layer(stack, first, part) for part in range(len(stack.kinds))]
    step = 0 if tensor.count == 1 else first.size_bytes
    for expert in range(experts):
        for kind, part in zip(stack.kinds, parts, strict=True):
            yield TensorInfo(
                f"{stack.holder}.{expert}.{kind}.{last}",
                part.dtype,
                part.shape,
                part.file,
                part.offset + expert * step,
                part.size_bytes,
                part.arrangement,
            )


def _first_expert(tensor: TensorInfo, experts: int) -> TensorInfo:
    """Return what ``tensor`` has for the first expert; one scale is that of all."""
    if tensor.count == 1:
        return tensor._replace(shape=())
    if len(tensor.shape) > 3 or tensor.shape[:1] != (experts,) or not tensor.count:
        raise _misfit(tensor, f"one scale, or scales of {experts} experts")
    return tensor._replace(shape=tensor.shape[1:], size_bytes=tensor.size_bytes // experts)


def _of_layer(stack: _Stack, tensor: TensorInfo, part: int) -> TensorInfo:
    """Return the ``part`` of ``tensor``, of one expert, that is of one layer."""
    if tensor.count == 1:
        return tensor
    # a scale for each output lies [outputs, 1] in both orders
    is_column = tensor.shape == (stack.outputs, 1)
    in_columns = stack.is_transposed and len(tensor.shape) == 2 and not is_column
    if tensor.shape[1 if in_columns else 0] % len(stack.kinds):
        whole = tensor._replace(shape=(stack.weight.shape[0], *tensor.shape))
        raise _misfit(whole, f"as many for {' as for '.join(stack.kinds)}")
    return (_columns if in_columns else _rows)(tensor, part, len(stack.kinds))


def _rows(tensor: TensorInfo, part: int, parts: int) -> TensorInfo:
    """Return the ``part`` of the rows of ``tensor`` [N, ...], which are of ``parts`` layers."""
    rows, *others = tensor.shape
    size = tensor.size_bytes // parts
    return tensor._replace(
        shape=(rows // parts, *others), offset=tensor.offset + part * size, size_bytes=size
    )


def _columns(tensor: TensorInfo, part: int, parts: int) -> TensorInfo:
    """Return the ``part`` of the columns of ``tensor`` [K, N] as rows, [N / parts, K]."""
    rows, columns = tensor.shape
    return tensor._replace(
        shape=(columns // parts, rows),
        size_bytes=tensor.size_bytes // parts,
        arrangement=Arrangement(is_transposed=True, part=(part, parts)),
    )


def _misfit(tensor: TensorInfo, expected: str) -> CheckpointRefused:
    code = "E_SCALE_SHAPE" if "scale" in tensor.name.rpartition(".")[2] else "E_TENSOR_SHAPE"
    return refused(
        code,
        f"`{tensor.name}` in {tensor.file.name} is {tensor.dtype} {list(tensor.shape)}; expected "
        f"{expected}",
        _HINT,
    )
