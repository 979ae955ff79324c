"""GPTQModel: writes GPTQ (v1, v2) and AWQ checkpoints.

Source: gptqmodel 7.6. It marks the process it runs in (environment, root logger, patched classes);
    the worker takes that with it.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING

from qtool.backends import MAX_SHARD_SIZE, Work, groups_of, step_refusals
from qtool.backends.expert_tokens import counting_expert_tokens
from qtool.checkpoint.strict_json import JsonDict
from qtool.modules import is_expert, is_head, last_part
from qtool.plan import Plan
from qtool.recipe import Awq, Gptq, Recipe
from qtool.scheme import Scheme

if TYPE_CHECKING:
    from gptqmodel.quantization.config import BaseQuantizeConfig

BITS = (2, 3, 4, 8)  # 5, 6 and 7 bits exist in a layout that only GPTQModel reads
_ROPE = "changes `rope_parameters`, which transformers then refuses"
_MISSING = "is not there, and it does not find the layers by itself"
_ROUTER = "does not fit the router of transformers 5"  # defuser 0.0.28 rewrites their experts
BROKEN: Mapping[str, str] = {  # model type -> what GPTQModel 7.6's definition of it does
    **dict.fromkeys(("bert", "falcon_mamba", "idefics3", "llava", "mamba", "mamba2"), _MISSING),
    **dict.fromkeys(("qwen2_audio", "t5", "whisper"), _MISSING),
    "dbrx": "looks for attention where transformers 5 no longer has it",
    "glm4_moe": _ROUTER,
    "glm4_moe_lite": _ROUTER,
    "gemma3_text": "cannot build its rotary embeddings",
    "ernie4_5_moe": "calls what transformers 5 no longer has",
    "llama4": "does not see that the stacks of experts are transposed",
    "modernbert": _ROPE,
    "olmo3": _ROPE,
    "nemotron_h": "looks for the layers below `backbone`, where transformers 5 has none",
    "mistral3": "reads data of the towers, which it does not load",
}
UNREACHED: Mapping[str, str] = {  # model type -> part of the names that its definition lacks
    "gemma4": "experts",
    "gemma4_text": "experts",
    "glm4": "gate_up_proj",
    "glm4v": "gate_up_proj",
    "granitemoe": "experts",
    "granitemoehybrid": "experts",
    "lfm2_moe": "experts",
    "minimax": "experts",
    "minimax_m2": "experts",
    "phi3": "gate_up_proj",
    "qwen3_next": "in_proj_ba",
}
NEEDS: Mapping[str, str] = {  # model type -> package without which it is not loaded
    "jamba": "mamba_ssm",
    "internvl": "torchvision",
    "qwen2_5_vl": "torchvision",
    "qwen2_vl": "torchvision",
    "qwen3_vl": "torchvision",
    "qwen3_vl_moe": "torchvision",
    "smolvlm": "num2words",
}
INTEGERS = frozenset(f"int{bits}" for bits in BITS)


class GPTQModelBackend:
    """Drives ``GPTQModel.quantize``: weights are read layer by layer, so memory holds a layer or
    two.
    """

    distribution = "gptqmodel"
    modules = ("gptqmodel",)
    base_memory_bytes = 740_000_000

    def refusals(self, plan: Plan) -> list[str]:
        """Why this plan cannot run here; empty when it can."""
        recipe = plan.recipe
        reasons = step_refusals(plan, {("rtn",), ("gptq",), ("awq",)})
        if recipe.kv_cache:
            reasons.append("it has no KV cache scales")
        if any(step.search != "lite" for step in recipe.steps(Awq)):
            reasons.append("its AWQ has one search, `lite`")
        if recipe.checkpoint_format and not recipe.steps(Gptq):
            reasons.append("`checkpoint_format` is for its GPTQ")
        kind = str(plan.checkpoint.config.get("model_type"))
        if kind in BROKEN:
            reasons.append(f"its definition of `{kind}` {BROKEN[kind]}")
        part = UNREACHED.get(kind)
        if any(part in module.layer.split(".") for module in plan.quantized):
            reasons.append(f"its definition of `{kind}` leaves `{part}` in 16 bits")
        package = NEEDS.get(kind)
        if package and find_spec(package) is None:
            name = package.replace("_", "-")
            reasons.append(f"it needs the package {name} for `{kind}`: pip install {name}")
        if any(
            is_head(module.name) and last_part(module.name) != "lm_head" for module in plan.modules
        ):
            reasons.append("it saves no output head but `lm_head`")
        if any(module.layer.startswith("layers.") for module in plan.quantized):
            reasons.append("it finds no layers in a model without an output head")
        if any(plan.names.linears[each.name].is_interleaved for each in plan.quantized):
            reasons.append(
                "it mixes gate and up, which alternate in one tensor of this model, up: it takes "
                "them for halves"
            )
        if recipe.scheme is None:
            return [*reasons, "it needs a scheme of its own, not rules alone"]
        return reasons + _scheme_refusals(recipe) + _shape_refusals(plan)

    def environment(self, plan: Plan, device: str) -> dict[str, str]:
        """Variables for the worker.

        Its CPU pool has (cores + 1) // 2 workers and asks for 2 of them, so a machine of two cores
        fails without the first one. Packing in Python is quicker than compiling the C++ packer for
        anything but large models.
        """
        cache = (
            Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
            / "qtool"
            / "torch_extensions"
        )
        variables = {
            "GPTQMODEL_CPU_WORKERS": str(max(2, min(12, (os.cpu_count() or 1) // 2))),
            "GPTQMODEL_TORCH_EXTENSIONS_DIR": str(cache),
            "HF_HOME": os.environ.get("HF_HOME", str(Path.home() / ".cache" / "huggingface")),
        }
        if shutil.which("g++") is None or plan.bytes_before < 4e9:
            variables["GPTQMODEL_DISABLE_PACK_EXT"] = "1"
        return variables

    def quantize(self, work: Work) -> None:
        """Quantize as planned and write a complete checkpoint folder to ``work.output``."""
        from gptqmodel import BACKEND, GPTQModel
        from gptqmodel.models.base import BaseQModel
        from gptqmodel.utils import logger
        from logbar import LogBar

        LogBar.shared().setLevel("ERROR")
        logger._suppress_live_renderables = lambda: True
        recipe = work.plan.recipe
        config = _config(work)
        work.report.stage("loading the model")
        model = GPTQModel.load(work.job.model, config, trust_remote_code=work.job.trust_remote_code)
        # classes of models with towers expect images in conversations; the base class takes tokens
        model.prepare_dataset = MethodType(BaseQModel.prepare_dataset, model)
        layers = work.plan.layer_count

        def on_layer(layer_idx: int, submodule_finalized: bool) -> None:
            if submodule_finalized:
                work.report.progress("layers", min(layer_idx + 1, layers), layers)

        model.layer_callback = on_layer
        options: JsonDict = {}
        if work.device == "cpu" and recipe.algorithm[-1].name == "awq":
            options["backend"] = BACKEND.AWQ_TORCH  # the only AWQ kernel without CUDA
        work.report.stage("quantizing")
        samples = [
            {"input_ids": list(sample), "attention_mask": [1] * len(sample)}
            for sample in work.samples
        ]
        with counting_expert_tokens(work, model.model, bypasses_routers=True):
            model.quantize(
                samples or None, batch_size=work.batch_size, calibration_sort=None, **options
            )
        work.report.stage("saving")
        model.save(str(work.output), max_shard_size=MAX_SHARD_SIZE)


def _scheme_refusals(recipe: Recipe) -> list[str]:
    awq = [step.name for step in recipe.algorithm] == ["awq"]
    reasons = []
    for scheme in recipe.schemes:
        if not _is_written(scheme):
            reasons.append(
                f"it writes integer weights of {', '.join(map(str, BITS))} bits with 16-bit "
                f"activations, not `{scheme.name}`"
            )
        elif awq and scheme.weights.bits != 4:
            reasons.append("its AWQ has 4 bits")
    return reasons


def _is_written(scheme: Scheme) -> bool:
    """Whether GPTQModel's formats hold ``scheme``."""
    weights = scheme.weights
    return (
        scheme.activations is None
        and weights.format in INTEGERS
        and weights.granularity in ("group", "channel")
    )


def _shape_refusals(plan: Plan) -> list[str]:
    """Return a reason for the first layer whose codes do not fill whole words."""
    for module in plan.quantized:
        bits = module.scheme.weights.bits if module.scheme else 32
        if any(size * bits % 32 for size in module.shape):
            return [f"{module.shape} of `{module.name}` does not pack into 32-bit words"]
    return []


def _config(work: Work) -> BaseQuantizeConfig:
    """Return GPTQModel's configuration for the recipe."""
    from gptqmodel.quantization.config import (
        AWQConfig,
        ExpertsRoutingBypass,
        GPTQConfig,
        MoEConfig,
        RTNConfig,
    )

    recipe = work.plan.recipe
    base = recipe.scheme
    assert base is not None
    dynamic = _dynamic(work.plan, base)
    options: JsonDict = {
        **_numbers(base),
        "offload_to_disk_path": str(work.scratch / "offload"),
        "device": work.device,
        "dynamic": dynamic or None,
    }
    if any(is_head(module.name) for module in work.plan.quantized):
        options["lm_head"] = True
    if recipe.needs_data and any(is_expert(module.layer) for module in work.plan.quantized):
        options["moe"] = MoEConfig(ExpertsRoutingBypass())  # every expert sees all data
    step = recipe.algorithm[-1]
    if not isinstance(step, Gptq):
        return AWQConfig(**options) if step.name == "awq" else RTNConfig(**options)
    options |= {
        "desc_act": step.act_order,
        # it reorders whole groups, so every scheme needs groups
        "act_group_aware": not step.act_order and _have_groups(recipe),
        "format": recipe.checkpoint_format or "gptq",
    }
    if step.dampening:
        options["damp_percent"] = step.dampening
    return GPTQConfig(**options)


def _have_groups(recipe: Recipe) -> bool:
    return all(scheme.weights.group_size for scheme in recipe.schemes)


def _dynamic(plan: Plan, base: Scheme) -> dict[str, JsonDict]:
    """Return the patterns of layers to skip, and of those with other numbers than ``base``."""
    dynamic: dict[str, JsonDict] = {}
    for group in groups_of(plan, [module.layer for module in plan.modules]):
        if group.scheme is not None and group.scheme != base:
            dynamic |= {f"+:{pattern}": _numbers(group.scheme) for pattern in group.patterns}
        # it leaves heads alone unasked
        if group.scheme is None and not all(map(is_head, group.names)):
            dynamic |= {f"-:{pattern}": {} for pattern in group.patterns}
    return dynamic | _heads(plan)


def _heads(plan: Plan) -> dict[str, JsonDict]:
    """Return a pattern for each output head: without one it gets 8 bits in groups of 32."""
    return {
        f"+:{re.escape(module.layer)}$": _numbers(module.scheme)
        for module in plan.quantized
        if module.scheme and is_head(module.name)
    }


def _numbers(scheme: Scheme) -> JsonDict:
    weights = scheme.weights
    return {"bits": weights.bits, "group_size": weights.group_size or -1, "sym": weights.symmetric}
