"""`FusedRouter`: a router whose choice is one launch; it replaces those that do the same."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from qtool.engine.norms import distance, random_input
from qtool.runtime.causal_lm import CausalLM
from qtool.runtime.experts.gates import float_attribute
from qtool.runtime.experts.grouped import GroupedExperts
from qtool.runtime.experts.rules import RoutingRule, route
from qtool.runtime.kernels import current

TOKENS = 64  # of the input that routers are compared with
TOLERANCE = 1e-2  # of the weights, relative; models round them to 16 bits


class FusedRouter(nn.Module):
    """Logits, then the experts of each token and their weights by a `RoutingRule`."""

    def __init__(
        self, router: nn.Module, rule: RoutingRule, outputs: tuple[Tensor, Tensor]
    ) -> None:
        super().__init__()
        self.rule = rule
        self.dtype = outputs[1].dtype
        self.logits_dtype = outputs[0].dtype
        weight = router.get_parameter("weight")
        self.weight = nn.Parameter(weight.to(self.logits_dtype), requires_grad=False)
        bias = _tensor(router, "bias")
        self.bias = None if bias is None else bias.to(self.logits_dtype)
        correction = _tensor(router, "e_score_correction_bias")
        self.register_buffer(
            "correction", None if correction is None else correction.float(), persistent=False
        )

    @classmethod
    def of(cls, router: nn.Module) -> FusedRouter | None:
        """Return ``router`` as one, None when it is seen to choose by another rule."""
        weight = getattr(router, "weight", None)
        if not isinstance(weight, nn.Parameter) or weight.dim() != 2:
            return None
        x = random_input((TOKENS, weight.shape[1]), weight)
        try:
            logits, weights, experts = router(x)
            expected = _by_expert(weights, experts, weight.shape[0])
        except Exception:  # the code of an architecture may return, and raise, anything
            return None
        for rule in _candidates(router, experts.shape[-1]):
            fused = cls(router, rule, (logits, weights))
            _, found, chosen = fused(x)
            if distance(_by_expert(found, chosen, len(weight)), expected, expected) <= TOLERANCE:
                return fused
        return None

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the logits [T, experts] of hidden states [..., H], and the weights and the
        numbers of the experts of each token, [T, top_k].
        """
        x = hidden_states.reshape(-1, self.weight.shape[1]).to(self.logits_dtype)
        logits = functional.linear(x, self.weight, self.bias)
        correction = self._buffers["correction"]
        if logits.is_cuda:
            from qtool.runtime.triton.routing import top_experts

            with current(x.device):
                weights, experts = top_experts(logits, self.rule, correction, self.dtype)
        else:
            weights, experts = route(logits, self.rule, correction)
        return logits, weights.to(self.dtype), experts


def fuse_routers(model: CausalLM) -> None:
    """Replace the routers beside packed experts by `FusedRouter`, where it is seen to choose the
    same.
    """
    holders = [
        module
        for module in model.modules()
        if any(isinstance(child, GroupedExperts) for child in module.children())
    ]
    for module in holders:
        for name, child in list(module.named_children()):
            if not isinstance(child, GroupedExperts) and (fused := FusedRouter.of(child)):
                setattr(module, name, fused)


def _candidates(router: nn.Module, top_k: int) -> Iterator[RoutingRule]:
    """Yield the rules that a router may follow, by the numbers that it has."""
    scaling = float_attribute(router, "routed_scaling_factor") or 1.0
    groups = int(float_attribute(router, "n_group") or float_attribute(router, "num_group") or 1)
    top_groups = int(float_attribute(router, "topk_group") or 1)
    plain = RoutingRule(top_k)
    grouped = RoutingRule(top_k, groups=groups, top_groups=top_groups)
    size = router.get_parameter("weight").shape[0] // groups
    # as the kernel needs them
    powers_of_two = groups & (groups - 1) == 0 and size & (size - 1) == 0 and size > 1
    yield replace(plain, of_chosen=True)
    for base in (grouped, plain) if groups > 1 and powers_of_two else (plain,):
        for scores in ("softmax", "sigmoid"):
            for normalizes in (True, False):
                for factor in {1.0, scaling}:
                    yield replace(base, scores=scores, normalizes=normalizes, scaling=factor)


def _tensor(router: nn.Module, name: str) -> Tensor | None:
    found = getattr(router, name, None)
    return found if isinstance(found, Tensor) else None


def _by_expert(weights: Tensor, experts: Tensor, count: int) -> Tensor:
    """Return the weight of each expert, f32 [T, count]: zeros where it is not chosen."""
    zeros = torch.zeros(len(weights), count, device=weights.device)
    return zeros.scatter(1, experts.long(), weights.float())
