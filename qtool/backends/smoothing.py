"""Which layers AWQ and SmoothQuant may scale against each other in a model, as LLM Compressor takes
them.

What a norm gives is divided by a factor for each channel, and the columns of every layer that reads
it are multiplied: no reader may be left out, routers and shared experts included. Likewise the rows
of `v_proj` and the columns of `o_proj`, and those of `up_proj` and `down_proj`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qtool.architecture.trace import trace_norms
from qtool.modules import expert_stack, is_head, is_router, layer_number
from qtool.plan import Plan

if TYPE_CHECKING:
    from torch.nn import Module
    from transformers import PreTrainedModel

CLAMP = "swiglu_limit"  # in configs: `up_proj` is clamped before it is multiplied


@dataclass(frozen=True)
class ScaledLayers:
    """Layers that are scaled against each other; names, or patterns behind ``re:``."""

    smooth: str
    """The layer whose outputs are divided."""
    balance: tuple[str, ...]
    """The layers that read them, whose inputs are multiplied; routers first."""


def awq_pairs(plan: Plan, model: PreTrainedModel) -> list[ScaledLayers]:
    """Return what AWQ may scale in ``model`` before the layers of ``plan`` are rounded."""
    planned = {module.layer for module in plan.quantized}
    return [
        *norm_pairs(plan, model),
        *_values(dict(model.named_modules()), planned),
        *_gated(plan, planned),
    ]


def norm_pairs(plan: Plan, model: PreTrainedModel) -> Iterator[ScaledLayers]:
    """Yield each norm of ``model`` whose readers can all be scaled, if ``plan`` rounds some."""
    modules = dict(model.named_modules())
    planned = {module.layer for module in plan.quantized}
    stacks = _stacks(planned)
    for norm, names in trace_norms(model).items():
        experts = [name for name in names if name in stacks]
        routers = [name for name in names if is_router(name)]
        others = [name for name in names if name not in (*experts, *routers)]
        if not (experts or planned.intersection(names)) or any(map(is_head, names)):
            continue
        if layer_number(f"{norm}.") is None:
            continue  # calibration, layer by layer, does not reach it
        if bool(experts) != bool(routers):
            continue  # the others of the two may read it in a way that no module shows
        channels = modules[norm].get_parameter("weight").shape[0]
        if all(_inputs(modules[name]) == channels for name in (*routers, *others)):
            patterns = [rf"re:{re.escape(stack)}\.\d+\.(gate|up)_proj$" for stack in experts]
            yield ScaledLayers(norm, (*routers, *others, *patterns))


def _inputs(module: Module) -> int | None:
    """Return the inputs of a layer with one matrix; None for others. A norm of each head has
    fewer channels than what reads all heads.
    """
    weight = dict(module.named_parameters(recurse=False)).get("weight")
    return weight.shape[1] if weight is not None and weight.dim() == 2 else None


def _values(modules: Mapping[str, Module], planned: set[str]) -> Iterator[ScaledLayers]:
    """Yield `v_proj` and `o_proj` of each attention that has nothing but sums between them."""
    for name in modules:
        parent, _, kind = name.rpartition(".")
        if kind != "v_proj" or f"{parent}.o_proj" not in planned:
            continue
        inside = [child for child, _ in modules[parent].named_children()]
        if not any("conv" in child or _is_output_norm(child) for child in inside):
            yield ScaledLayers(name, (f"{parent}.o_proj",))


def _is_output_norm(child: str) -> bool:
    return "norm" in child and not child.startswith(("q_", "k_"))


def _gated(plan: Plan, planned: set[str]) -> Iterator[ScaledLayers]:
    """Yield `up_proj` and `down_proj` of each MLP and of all experts of a layer."""
    interleaved = {
        expert_stack(module.layer)
        for module in plan.quantized
        if plan.names.linears[module.name].is_interleaved
    }
    if plan.checkpoint.text_config.get(CLAMP):
        return
    for name in sorted(planned):
        parent, _, kind = name.rpartition(".")
        if kind == "down_proj" and f"{parent}.up_proj" in planned and not expert_stack(name):
            yield ScaledLayers(f"{parent}.up_proj", (name,))
    for stack in sorted(_stacks(planned) - interleaved):
        prefix = rf"re:{re.escape(stack)}\.\d+"
        yield ScaledLayers(rf"{prefix}\.up_proj$", (rf"{prefix}\.down_proj$",))


def _stacks(planned: Iterable[str]) -> set[str]:
    """Return the modules that hold the experts among the ``planned`` layers."""
    return {stack for name in planned if (stack := expert_stack(name))}
