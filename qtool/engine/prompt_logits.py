"""The logits after every token of whole prompts, computed as the engine computes them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from qtool.engine.attention.interface import running
from qtool.engine.attention.pages import PAGE, LayerCache, Packed
from qtool.runtime.causal_lm import CausalLM


def page_count(prompts: Sequence[Sequence[int]]) -> int:
    """Return how many pages the keys and values of ``prompts`` need."""
    return sum(-(-len(prompt) // PAGE) for prompt in prompts)


@torch.inference_mode()
def prompt_logits(
    model: CausalLM,
    layers: Mapping[int, LayerCache],
    prompts: Sequence[Sequence[int]],
    kept: Sequence[int] | None = None,
) -> Tensor:
    """Run ``prompts`` side by side in one pass; nothing else may run on ``layers`` meanwhile.

    Args:
        model: with the engine's attention.
        layers: what each keeps; page 1 and those after it are overwritten, and the states of the
            first rows.
        prompts: token ids.
        kept: the tokens whose logits are wanted, counted over all prompts; None: all.
    Returns: logits [R, V] in the model's dtype.
    """
    device = next(iter(model.parameters())).device
    ints = partial(torch.tensor, dtype=torch.int32, device=device)
    sizes = [len(prompt) for prompt in prompts]
    columns = -(-max(sizes) // PAGE)
    table = []
    last = 0
    for size in sizes:
        used = -(-size // PAGE)
        table.append([*range(last + 1, last + used + 1), *[0] * (columns - used)])
        last += used
    positions = ints([position for size in sizes for position in range(size)])
    packed = Packed(
        ints(table),
        ints([row for row, size in enumerate(sizes) for _ in range(size)]),
        positions,
        decodes=0,
        starts=ints(list(itertools.accumulate(sizes, initial=0))),
        longest=max(sizes),
    ).expand([(0, size) for size in sizes])
    ids = torch.tensor([list(itertools.chain.from_iterable(prompts))], device=device)
    wanted = 0 if kept is None else torch.tensor(kept, device=device)
    with running(packed, layers):
        output = model(
            input_ids=ids,
            position_ids=positions[None],
            logits_to_keep=wanted,
            use_cache=False,
        )
    logits: Tensor = output.logits[0]
    return logits
