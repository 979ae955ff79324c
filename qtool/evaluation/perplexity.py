"""Perplexity of a checkpoint of any format, dequantized, with its input rounding simulated."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qtool import formats
from qtool.checkpoint import Checkpoint
from qtool.errors import CheckpointRefused, DataRefused
from qtool.formats import Layout
from qtool.formats.packing import read_tensor
from qtool.weight import Activation, QuantizedWeight, dequantize, fake_quantize_input

MISFITS = ("missing_keys", "unexpected_keys", "mismatched_keys")  # in transformers' loading report


def load_dequantized(checkpoint: Checkpoint, *, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
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
            f"{checkpoint.path} rotates inputs at run time (QuIP, SpinQuant R3/R4), which qtool "
            "does not simulate",
        )
    state = _unquantized_state(checkpoint, layout)
    inputs: dict[str, QuantizedWeight] = {}
    if layout:
        for name in layout.modules:
            weight = formats.read(checkpoint, layout, name)
            state[f"{name}.weight"] = dequantize(weight, dtype)
            if weight.activation or weight.pre_scale is not None:
                inputs[name] = weight
    model = _build_model(checkpoint, state, dtype)
    _round_inputs(model, inputs, checkpoint)
    return model.eval()


def _unquantized_state(checkpoint: Checkpoint, layout: Layout | None) -> dict[str, Tensor]:
    """Return the tensors that are not quantized, biases included."""
    modules = layout.modules.values() if layout else ()
    biases = [module.tensors["bias"].name for module in modules if "bias" in module.tensors]
    names = [*formats.unquantized_tensors(checkpoint, layout), *biases]
    return {name: read_tensor(checkpoint, name) for name in names}


def _build_model(
    checkpoint: Checkpoint, state: Mapping[str, Tensor], dtype: torch.dtype
) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # it is shown even where there is no terminal
    config = AutoConfig.from_pretrained(checkpoint.path, trust_remote_code=False)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        model_class = type(AutoModelForCausalLM.from_config(config))
    model, report = model_class.from_pretrained(
        None, config=config, state_dict=state, dtype=dtype, output_loading_info=True
    )
    misfits = {kind: sorted(map(str, report[kind])) for kind in MISFITS if report.get(kind)}
    if misfits:
        raise CheckpointRefused(
            "E_TENSORS", f"{checkpoint.path} does not fit its own config: {misfits}"
        )
    assert isinstance(model, nn.Module)
    return model


def _round_inputs(
    model: nn.Module, weights: Mapping[str, QuantizedWeight], checkpoint: Checkpoint
) -> None:
    """Let the linear layers of ``model`` round their inputs as ``weights`` say."""
    modules = dict(model.named_modules())
    for name, weight in weights.items():
        module = modules.get(name)
        if not isinstance(module, nn.Linear):
            raise CheckpointRefused(
                "E_FUSED",
                f"{checkpoint.path}: `{name}` is not a linear layer of the transformers model, so "
                "its input cannot be rounded",
            )
        module.register_forward_pre_hook(_InputRounding.of(weight))


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
