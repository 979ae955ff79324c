"""Counts the calibration tokens that the routers of a model send to each expert."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from qtool.backends import Work
from qtool.modules import expert_stack
from qtool.plan import Plan

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

ROUTERS = ("gate", "router", "router.classifier")  # beside the experts, or above them
TOP_K_KEYS = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k")


@contextmanager
def counting_expert_tokens(
    work: Work, model: Module, *, bypasses_routers: bool = False
) -> Iterator[None]:
    """Count while calibration data runs through ``model``, and report the counts at the end.

    Libraries may run a layer more than once with the same data: a router is watched until it has
    seen all tokens once.

    Args:
        work: the job that the model is calibrated for.
        model: the model.
        bypasses_routers: whether the library runs experts without their router; the router is then
            asked whenever its block runs.
    """
    experts = _experts(work.plan)
    modules = dict(model.named_modules())
    routers = {
        stack: modules[name]
        for stack in experts
        for name in _router_names(stack)
        if name in modules
    }
    tokens = sum(map(len, work.samples))
    if not routers or not tokens:
        yield
        return
    top_k = _top_k(work.plan)
    watchers = {
        stack: _Watcher(router, len(experts[stack]), top_k, tokens)
        for stack, router in routers.items()
    }
    hooks = [
        watcher.router.register_forward_hook(watcher.after_router) for watcher in watchers.values()
    ]
    if bypasses_routers:
        blocks = {stack: modules[stack.rpartition(".")[0]] for stack in watchers}
        hooks += [
            block.register_forward_pre_hook(watchers[stack].before_block)
            for stack, block in blocks.items()
            if routers[stack] in block.children()
        ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    counts = {_stack_name(work.plan, stack): each.result() for stack, each in watchers.items()}
    seen = {name: each for name, each in counts.items() if any(each)}
    if seen:
        work.report.expert_tokens(seen)


def _experts(plan: Plan) -> dict[str, set[str]]:
    """Return the experts that are quantized, by the module that holds those of a layer."""
    found: dict[str, set[str]] = defaultdict(set)
    for module in plan.modules:
        if stack := expert_stack(module.layer):
            found[stack].add(module.layer.removeprefix(f"{stack}.").partition(".")[0])
    return found


def _router_names(stack: str) -> list[str]:
    """Return the names that the router of ``stack`` may have."""
    block = stack.rpartition(".")[0]
    return [f"{block}.{name}" for name in ROUTERS]


def _stack_name(plan: Plan, stack: str) -> str:
    """Return the name that the checkpoint has for ``stack``."""
    return next(
        expert_stack(module.name) or stack
        for module in plan.modules
        if expert_stack(module.layer) == stack
    )


def _top_k(plan: Plan) -> int:
    """Return how many experts a token goes to, where the config says it."""
    config = plan.checkpoint.text_config
    found = [config[key] for key in TOP_K_KEYS if isinstance(config.get(key), int)]
    return int(found[0]) if found else 1


class _Watcher:
    """Counts what one router chooses."""

    def __init__(self, router: Module, experts: int, top_k: int, tokens: int) -> None:
        self.router = router
        self._counts = [0] * experts
        self._top_k = top_k
        self._left = tokens
        self._asked: Tensor | None = None
        """What the router answered before its block ran; counts if the block does not run it."""
        self._is_asking = False

    def after_router(self, router: Module, args: object, output: object) -> None:
        """Count the choice of ``router``, a forward hook."""
        if not self._is_asking:
            self._asked = None
            self._count(self._choice(output))

    def before_block(self, block: Module, args: Sequence[Tensor]) -> None:
        """Ask the router what it chooses for the inputs [..., H], a forward pre-hook."""
        import torch

        self._count(self._asked)
        self._is_asking = True
        with torch.no_grad():
            self._asked = self._choice(self.router(args[0].reshape(-1, args[0].shape[-1])))
        self._is_asking = False

    def result(self) -> list[int]:
        """Return the number of tokens of each expert."""
        self._count(self._asked)
        return self._counts

    def _choice(self, output: object) -> Tensor | None:
        return chosen_experts(output, len(self._counts), self._top_k)

    def _count(self, chosen: Tensor | None) -> None:
        """Count ``chosen``, unless all tokens were counted already."""
        if chosen is None or self._left <= 0:
            return
        for expert, count in enumerate(chosen.flatten().bincount(minlength=len(self._counts))):
            self._counts[expert] += int(count)
        self._left -= len(chosen)


def chosen_experts(output: object, experts: int, top_k: int) -> Tensor | None:
    """Return the numbers of the experts [T, k] that each token goes to.

    Args:
        output: what a router returned: indices among other tensors, or scores of all experts.
        experts: how many there are.
        top_k: how many a token goes to, where the router does not choose them itself.
    Returns: None when there is neither.
    """
    import torch

    parts = output if isinstance(output, tuple) else (output,)
    tensors = [part for part in parts if isinstance(part, torch.Tensor)]
    for tensor in tensors:
        if not tensor.is_floating_point():
            return tensor.reshape(-1, tensor.shape[-1])
    scores = [tensor for tensor in tensors if tensor.shape[-1] == experts]
    if not scores:
        return None
    return scores[-1].reshape(-1, experts).topk(min(top_k, experts)).indices
