"""How good a checkpoint of any format is: load it dequantized, with its input rounding simulated,
and measure perplexity on held-out text.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qtool import formats
from qtool.checkpoint import Checkpoint
from qtool.errors import CheckpointRefused, DataRefused
from qtool.formats.packing import read_tensor
from qtool.weight import QuantizedWeight, dequantize, fake_quantize_input


def load_dequantized(checkpoint: Checkpoint, *, dtype: torch.dtype = torch.bfloat16) -> Any:
    """Return the transformers model of ``checkpoint`` with plain weights of ``dtype``, in
    evaluation mode, on the CPU.

    Each quantized linear layer first multiplies its input by ``pre_scale`` and rounds it as its
    activation format says, so the logits are those of an engine that computes in the quantized
    formats. The KV cache is not rounded.

    Raises: CheckpointRefused, when the tensors do not fit the model, or its rotations are applied
        at run time.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # its bar ignores whether there is a terminal
    layout = formats.detect(checkpoint)
    quantized = layout.modules if layout else {}
    if layout and layout.rotates_inputs:
        raise CheckpointRefused(
            "E_TRANSFORM",
            f"{checkpoint.path} rotates inputs at run time (QuIP, SpinQuant R3/R4), which qtool "
            "does not simulate",
        )
    config = AutoConfig.from_pretrained(checkpoint.path, trust_remote_code=False)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    biases = [bias.name for module in quantized.values() if (bias := module.tensors.get("bias"))]
    state = {
        name: read_tensor(checkpoint, name)
        for name in [*formats.unquantized_tensors(checkpoint, layout), *biases]
    }
    inputs: dict[str, QuantizedWeight] = {}
    for name in quantized:
        weight = formats.read(checkpoint, layout, name)  # type: ignore[arg-type]
        state[f"{name}.weight"] = dequantize(weight, dtype)
        if weight.activation or weight.pre_scale is not None:
            inputs[name] = weight
    with torch.device("meta"):
        model_class = type(AutoModelForCausalLM.from_config(config))
    model, report = model_class.from_pretrained(
        None, config=config, state_dict=state, dtype=dtype, output_loading_info=True
    )
    wrong = {
        kind: sorted(map(str, report[kind]))
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
        if report.get(kind)
    }
    if wrong:
        raise CheckpointRefused(
            "E_TENSORS", f"{checkpoint.path} does not fit its own config: {wrong}"
        )
    modules = dict(model.named_modules())
    for name, weight in inputs.items():
        if not isinstance(modules.get(name), nn.Linear):
            raise CheckpointRefused(
                "E_FUSED",
                f"{checkpoint.path}: `{name}` is no linear layer of the transformers model, so "
                "its input is out of reach",
            )
        modules[name].register_forward_pre_hook(_InputRounding(weight))
    return model.eval()


@torch.inference_mode()
def perplexity(
    model: Any, token_sequences: Iterable[Sequence[int]], max_tokens: int = 512
) -> float:
    """Return exp of the mean negative log-likelihood of every predicted token in the first
    ``max_tokens`` of each sequence.

    Raises: DataRefused, when no sequence has two tokens.
    """
    total, count = 0.0, 0
    for sequence in token_sequences:
        ids = torch.tensor([list(sequence[:max_tokens])], device=model.device)
        if ids.shape[1] < 2:
            continue
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        total += float(nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
        count += ids.shape[1] - 1
    if not count:
        raise DataRefused("E_NO_TOKENS", "no text of two tokens or more to measure perplexity on")
    return math.exp(total / count) if math.isfinite(total) and total / count < 700 else math.inf


class _InputRounding:
    """A forward pre-hook that does to a linear layer's input what the checkpoint's engine would."""

    def __init__(self, weight: QuantizedWeight) -> None:
        self.pre_scale, self.activation = weight.pre_scale, weight.activation

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x, *rest = args
        if self.pre_scale is not None:
            x = x * self.pre_scale.to(x)
        if self.activation:
            static = (
                None if part is None else part.to(x.device)
                for part in (self.activation.scale, self.activation.zero)
            )
            x = fake_quantize_input(x, self.activation.format, *static)
        return (x, *rest)
