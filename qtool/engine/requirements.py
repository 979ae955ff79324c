"""What the engine requires of a model: by name before anything is loaded, by numbers once it is."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from qtool.engine.attention.interface import NAME, Recording, recording
from qtool.engine.attention.pages import LayerCache
from qtool.engine.config import Speculation
from qtool.engine.delta_net import has_delta_nets
from qtool.engine.fusion import stand_ins
from qtool.engine.kv_cache import allocate_pages, allocate_states
from qtool.engine.prompt_logits import prompt_logits
from qtool.errors import CheckpointRefused
from qtool.runtime.causal_lm import CausalLM
from qtool.runtime.experts.grouped import GroupedExperts
from qtool.runtime.load_plan import LoadPlan
from qtool.runtime.mtp import MtpLayer

HAND_OVER = "`--engine vllm` hands the checkpoint to vLLM"
ATTENTION = frozenset({"full_attention", "sliding_attention", "attention", "mlp", "moe"})
TOKENS = 8
# Of the deviation of a token's logits. Most models are at zero; experts that are not packed may
# round differently when other tokens come along.
TOLERANCE = 0.02


def check_by_name(plan: LoadPlan) -> None:
    """Raise CheckpointRefused for a model that is known not to run in the engine: it generates no
    text, or has layers that keep a state beside the KV cache.
    """
    model = plan.skeleton.model
    path = plan.checkpoint.source
    name = type(model).__name__
    generates = plan.encoding is not None or model.can_generate()
    if plan.skeleton.config.is_encoder_decoder or not generates:
        message = f"{path}: {name} does not continue a text, which is all that the engine does"
        raise CheckpointRefused("E_ARCHITECTURE", message, hint="`qtool.load` loads it")
    text = plan.skeleton.config.get_text_config()
    kinds = getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None) or ()
    known = ATTENTION
    if has_delta_nets(model):
        known |= {"linear_attention"}
    if others := sorted({*kinds} - known):
        raise _refused(f"{name} has layers of `{'`, `'.join(others)}`, which the engine lacks")


def check_speculation(plan: LoadPlan, speculation: Speculation | None) -> None:
    """Raise CheckpointRefused for an MTP layer that was not planned to be loaded."""
    if speculation and speculation.mtp and plan.mtp is None:
        message = f"{plan.checkpoint.source} was loaded without its MTP layer"
        raise CheckpointRefused("E_SPECULATION", message, hint="plan_load takes mtp=True")


def record_layers(model: CausalLM, mtp: MtpLayer | None) -> Recording:
    """Make ``model`` use the engine's attention, and return what each layer keeps, as a dry pass
    shows it.

    Args:
        model: on its device, with its weights.
        mtp: the layer that drafts tokens for it, if any.
    Raises: CheckpointRefused, unless each layer attends or keeps a state that the engine manages.
    """
    model.set_attn_implementation(NAME)
    zero = torch.zeros(1, 1, dtype=torch.long, device=next(iter(model.parameters())).device)
    with recording() as found:
        model(input_ids=zero, position_ids=zero, use_cache=False)
        if mtp is not None:
            mtp(zero[0], mtp.embeddings(zero[0]), zero[0])
    layers = model.config.get_text_config().num_hidden_layers + (mtp is not None)
    if len(found.layers) + len(found.states) != layers or not found.layers:
        message = (
            f"{len(found.layers)} of the model's {layers} layers attend to a cache of keys "
            f"and values, and {len(found.states)} keep a state that the engine manages"
        )
        if not found.layers:
            message = "no layer of the model attends, and the engine needs one that does"
        raise CheckpointRefused("E_ATTENTION", message, hint=HAND_OVER)
    return found


def check_by_numbers(model: CausalLM, geometry: Recording) -> None:
    """Raise CheckpointRefused when a prompt gets other logits beside another neighbour: then some
    layer keeps a state beside the KV cache. The same for a model that computes logits unasked.

    Args:
        model: with the engine's attention.
        geometry: what each layer keeps.
    """
    size = model.get_output_embeddings().out_features
    device = next(iter(model.parameters())).device
    numbers = torch.arange(2 * TOKENS, device=device)
    first, second = ((numbers * factor + 11) % size for factor in (7, 13))
    second[TOKENS:] = first[TOKENS:]
    # a GEMM that rounds differently each time would send tokens to other experts
    with stand_ins(cast(nn.Module, model), GroupedExperts):
        one, other = (_second_prompt(model, geometry, ids) for ids in (first, second))
    off = float(((one - other).square().mean(-1).sqrt() / one.std(-1)).max())
    if off > TOLERANCE:  # not a number: that is for others to say
        raise _refused(
            f"{type(model).__name__} keeps a state beside the KV cache: a prompt's logits depend "
            f"on the prompt before it (by {off:.0%} of their deviation)"
        )


def _second_prompt(model: CausalLM, geometry: Recording, ids: Tensor) -> Tensor:
    """Return the logits [T, V] of the second of two prompts ``ids`` [2 T], packed in one step."""
    first, second = ids.view(2, TOKENS).tolist()
    layers: dict[int, LayerCache] = {
        **allocate_pages(2, geometry.layers, model.dtype, ids.device, {}),
        **allocate_states(2, geometry.states, model.dtype, ids.device),
    }
    logits = prompt_logits(model, layers, [first, second], range(TOKENS, 2 * TOKENS))
    if len(logits) != TOKENS:
        name = type(model).__name__
        raise _refused(f"{name} computes the logits of all tokens, not of those it is asked for")
    return logits.float()


def _refused(message: str) -> CheckpointRefused:
    return CheckpointRefused("E_ATTENTION", message, hint=HAND_OVER)
