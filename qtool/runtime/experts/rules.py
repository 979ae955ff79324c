"""How a router chooses the experts of a token from its logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class RoutingRule:
    """The choice of ``top_k`` experts, and their weights."""

    top_k: int
    scores: Literal["softmax", "sigmoid"] = "softmax"
    """What makes scores of logits."""
    of_chosen: bool = False
    """Whether the softmax is over the logits of the chosen experts only."""
    normalizes: bool = False
    """Whether weights are divided by their sum."""
    scaling: float = 1.0
    """What they are multiplied by last."""
    groups: int = 1
    """Neighbouring experts in as many groups: only those of the best groups are chosen from."""
    top_groups: int = 1
    """How many groups that are; a group counts as much as its two best experts."""


def route(logits: Tensor, rule: RoutingRule, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the weights of the experts of each token, f32 [T, top_k], and the experts, int64.

    Args:
        logits: [T, experts], of any float type.
        rule: how to choose.
        bias: added to scores where experts are chosen, not to weights: f32 [experts].
    """
    wide = logits.float()
    if rule.of_chosen:
        values, experts = wide.topk(rule.top_k, dim=-1)
        return values.softmax(-1) * rule.scaling, experts
    scores = wide.softmax(-1) if rule.scores == "softmax" else wide.sigmoid()
    choice = scores if bias is None else scores + bias
    if rule.groups > 1:
        choice = _in_best_groups(choice, rule)
    experts = choice.topk(rule.top_k, dim=-1).indices
    weights = scores.gather(-1, experts)
    if rule.normalizes:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return weights * rule.scaling, experts


def _in_best_groups(choice: Tensor, rule: RoutingRule) -> Tensor:
    groups = choice.unflatten(-1, (rule.groups, -1))  # type: ignore[no-untyped-call]
    best = groups.topk(2, dim=-1).values.sum(-1).topk(rule.top_groups, dim=-1).indices
    mask = torch.zeros_like(groups[..., 0], dtype=torch.bool).scatter(-1, best, value=True)
    inside: Tensor = mask[..., None].expand_as(groups).reshape(choice.shape)
    return choice.masked_fill(~inside, float("-inf"))
