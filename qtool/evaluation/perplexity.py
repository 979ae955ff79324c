"""Perplexity of a checkpoint of any format, dequantized, with its input rounding simulated."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from qtool import formats
from qtool.checkpoint import Checkpoint
from qtool.errors import CheckpointRefused, DataRefused
from qtool.formats import Layout, QuantizedModule
from qtool.formats.packing import read_tensor
from qtool.name_map import LinearWeight
from qtool.runtime.causal_lm import CausalLM
from qtool.runtime.experts.stacks import ExpertStacks, stacked_biases
from qtool.runtime.skeleton import Skeleton
from qtool.weight import Activation, QuantizedWeight, dequantize, fake_quantize_input


def load_dequantized(checkpoint: Checkpoint, *, dtype: torch.dtype = torch.bfloat16) -> CausalLM:
    """Return the transformers model of ``checkpoint``, dequantized, on the CPU, in eval mode.

    Each quantized linear layer first multiplies its input by ``pre_scale`` and rounds it as its
    activation format says, so the logits are those of an engine that computes in the quantized
    formats. The KV cache is not rounded.

    Args:
        checkpoint: a checkpoint of any format that qtool reads.
        dtype: of all weights.
    Raises: CheckpointRefused, when the tensors do not fit the model, or its rotations are applied
        at run time.
    """
    layout = formats.detect(checkpoint)
    if layout and layout.rotates_inputs:
        raise CheckpointRefused(
            "E_TRANSFORM",
            f"{checkpoint.source} rotates inputs at run time (QuIP, SpinQuant R3/R4), which qtool "
            "does not simulate",
        )
    skeleton = Skeleton(checkpoint, layout, dtype)
    layers = {
        name: module
        for name, module in (layout.modules if layout else {}).items()
        if skeleton.is_loaded(f"{name}.weight")
    }
    apart = _experts_apart(skeleton, layers)
    state: dict[str, Tensor] = {}
    rounding: dict[str, _InputRounding] = {}
    stacks = ExpertStacks()
    for name, module in layers.items():
        target = skeleton.target(name)
        assert layout is not None
        weight = formats.read(checkpoint, layout, name)
        matrix, rounds = dequantize(weight, dtype), _InputRounding.of(weight)
        if name in apart:
            for number, part in enumerate(matrix.chunk(module.experts)):
                expert = number if module.experts > 1 else target.expert
                stacks.add(replace(target, expert=expert), _expert(part, rounds))
            continue
        state[f"{name}.weight"] = matrix
        if rounds.does_something:
            rounding[target.module] = rounds
    for name in apart.keys() - layers:
        stacks.add(apart[name], _expert(read_tensor(checkpoint, f"{name}.weight").to(dtype)))
    state |= _unquantized_state(skeleton, layout, apart)
    model = skeleton.materialize({*apart.values()}, state, torch.device("cpu"))
    for path, rounds in rounding.items():
        model.get_submodule(path).register_forward_pre_hook(rounds)
    stacks.install(model)
    return model


def _experts_apart(
    skeleton: Skeleton, layers: Mapping[str, QuantizedModule]
) -> dict[str, LinearWeight]:
    """Return the experts, quantized or not, that transformers cannot put in stacks: it has no
    names for them, or their inputs are rounded.
    """
    targets = {name: skeleton.target(name) for name in layers}
    holders = {
        target.module
        for name, target in targets.items()
        if target.parameter
        and (target.is_split or layers[name].experts > 1 or layers[name].scheme.activations)
    }
    experts = {
        name: target
        for name, target in {**skeleton.names.linears, **targets}.items()
        if target.parameter and (name in targets or not target.is_stacked)
    }
    return {
        name: target
        for name, target in experts.items()
        if target.is_split or target.module in holders
    }


def _expert(matrix: Tensor, rounds: _InputRounding | None = None) -> nn.Linear:
    linear = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(matrix, requires_grad=False)
    if rounds and rounds.does_something:
        linear.register_forward_pre_hook(rounds)
    return linear


def _unquantized_state(
    skeleton: Skeleton, layout: Layout | None, apart: Mapping[str, LinearWeight]
) -> dict[str, Tensor]:
    """Return the tensors that are not quantized, biases included."""
    checkpoint = skeleton.checkpoint
    modules = layout.modules.values() if layout else ()
    biases = [module.tensors["bias"].name for module in modules if "bias" in module.tensors]
    built = {f"{name}.{suffix}" for name in apart for suffix in ("weight", "bias")}
    state = {
        name: read_tensor(checkpoint, name)
        for name in (*formats.unquantized_tensors(checkpoint, layout), *biases)
        if name not in built and skeleton.is_loaded(name)
    }
    return state | stacked_biases(
        apart.items(), lambda name: read_tensor(checkpoint, name), checkpoint.tensors
    )


@torch.inference_mode()
def perplexity(
    model: nn.Module, token_sequences: Iterable[Sequence[int]], max_tokens: int = 512
) -> float:
    """Return exp of the mean negative log-likelihood of every predicted token.

    Args:
        model: a transformers model.
        token_sequences: texts as token ids.
        max_tokens: of each text; what follows is left out.
    Raises: DataRefused, when no sequence has two tokens.
    """
    device = next(model.parameters()).device
    total = 0.0
    count = 0
    for sequence in token_sequences:
        ids = torch.tensor([list(sequence[:max_tokens])], device=device)
        if ids.shape[1] < 2:
            continue
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        total += float(nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
        count += ids.shape[1] - 1
    if not count:
        raise DataRefused("E_NO_TOKENS", "no text of two tokens or more to measure perplexity on")
    return math.exp(total / count) if math.isfinite(total) and total / count < 700 else math.inf


@dataclass(frozen=True)
class _InputRounding:
    """A forward pre-hook that does to a layer's input what the checkpoint's engine would do."""

    pre_scale: Tensor | None
    activation: Activation | None

    @property
    def does_something(self) -> bool:
        return self.pre_scale is not None or self.activation is not None

    @classmethod
    def of(cls, weight: QuantizedWeight) -> _InputRounding:
        return cls(weight.pre_scale, weight.activation)

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x, *rest = args
        if self.pre_scale is not None:
            x = x * self.pre_scale.to(x)
        if self.activation:
            scale, zero = (
                None if part is None else part.to(x.device)
                for part in (self.activation.scale, self.activation.zero)
            )
            x = fake_quantize_input(x, self.activation.format, scale, zero)
        return (x, *rest)
