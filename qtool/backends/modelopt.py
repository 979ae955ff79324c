"""NVIDIA ModelOpt: writes its unified Hugging Face checkpoints, and keeps or restores calibrated
states.

Source: nvidia-modelopt 0.47.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING

from qtool.backends import (
    MAX_SHARD_SIZE,
    Work,
    calibration_refusals,
    groups_of,
    has_own_linears,
    step_refusals,
)
from qtool.backends.expert_tokens import counting_expert_tokens
from qtool.backends.modelopt_stacks import split_stacks
from qtool.backends.modelopt_state import restore_state, save_state
from qtool.backends.models import (
    batch_tensors,
    fused_experts,
    load_model,
    loaded_linears,
)
from qtool.checkpoint.strict_json import JsonDict
from qtool.errors import RecipeRefused, ResourceError, one_line
from qtool.modules import is_expert
from qtool.plan import Plan
from qtool.recipe import Auto, Awq, Gptq, Recipe, Rtn, SmoothQuant
from qtool.scheme import SCHEMES, Scheme
from qtool.sizes import format_size

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

PRESETS = {  # scheme -> the library's configuration with these numbers
    SCHEMES["FP8"]: "FP8_DEFAULT_CFG",
    SCHEMES["FP8_DYNAMIC"]: "FP8_PER_CHANNEL_PER_TOKEN_CFG",
    SCHEMES["FP8_BLOCK_W8A16"]: "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG",
    SCHEMES["W8A8_STATIC"]: "INT8_DEFAULT_CFG",
    SCHEMES["W8A16_CHANNEL"]: "INT8_WEIGHT_ONLY_CFG",
    SCHEMES["W4A16"]: "INT4_BLOCKWISE_WEIGHT_ONLY_CFG",
    SCHEMES["W4AFP8_STATIC"]: "W4A8_AWQ_BETA_CFG",
    SCHEMES["NVFP4"]: "NVFP4_DEFAULT_CFG",
    SCHEMES["NVFP4A16"]: "W4A16_NVFP4_CFG",
    SCHEMES["NVFP4AFP8"]: "W4A8_NVFP4_FP8_CFG",
    SCHEMES["MXFP8"]: "MXFP8_DEFAULT_CFG",
    SCHEMES["MXFP4"]: "MXFP4_DEFAULT_CFG",
}
AWQ_PRESETS = {SCHEMES["W4A16"]: "INT4_AWQ_CFG"}  # what changes when AWQ searches the scales
# how often an algorithm runs the calibration loop; others once
FORWARD_PASSES = {
    "awq": 2,
    "gptq": 2,
}
# models whose experts it writes as [E, inputs, outputs], in FP8 with one scale
STACKED_EXPORTS = frozenset({"gpt_oss", "llama4_text"})
# models in which its exporter gives the experts of a layer one AWQ scale
SMOOTHED_EXPERTS = frozenset({"mixtral", "qwen2_moe", "qwen3_moe", "qwen3_next"})
# of the free memory of the GPU that may be weights; more is left to accelerate's offloading
GPU_FRACTION = 0.8
# models that it does not export -> why
NOT_EXPORTED = {
    "dbrx": "its exporter fails on the experts of this model",
    "kimi_linear": "it exports tensors of this model joined, as transformers has them",
}


class ModelOptBackend:
    """Drives ``mtq.quantize`` and ``export_hf_checkpoint``."""

    distribution = "nvidia-modelopt"
    modules = ("modelopt.torch.quantization", "modelopt.torch.export")
    base_memory_bytes = 720_000_000

    def refusals(self, plan: Plan) -> list[str]:
        """Why this plan cannot run here; empty when it can."""
        recipe = plan.recipe
        reasons = step_refusals(
            plan, {(name,) for name in ("rtn", "mse", "gptq", "awq", "smoothquant", "auto")}
        ) + calibration_refusals(plan)
        if recipe.checkpoint_format:
            reasons.append(f"it writes its own format, not {recipe.checkpoint_format}")
        if any(step.act_order for step in recipe.steps(Gptq)):
            reasons.append("its GPTQ has no `act_order`")
        has_rules = any(rule.scheme for rule in recipe.rules)
        if recipe.steps(Auto) and (recipe.kv_cache or has_rules):
            reasons.append(
                "`auto` chooses every scheme itself, without rules and without a KV cache"
            )
        if recipe.scheme is None:
            reasons.append("it needs a scheme for the weights")
        takes_apart = not _expert_schemes(plan) - {SCHEMES["FP8"], None} and not recipe.steps(Auto)
        if _exports_stacks(plan) and not takes_apart:
            reasons.append("it exports the experts of this model in stacks, readable in FP8 alone")
        if _cannot_smooth_experts(plan):
            reasons.append("its exporter of INT4 does not find the stacked experts of this model")
        if has_own_linears(plan):
            reasons.append("it passes over the linear layers of this model, which are its own")
        if reason := NOT_EXPORTED.get(str(plan.checkpoint.config.get("model_type"))):
            reasons.append(reason)
        if len(_expert_schemes(plan)) > 1:
            reasons.append("it gives all experts one scheme, and the recipe gives them several")
        unknown = [scheme for scheme in recipe.schemes if _fixed_groups(scheme) not in PRESETS]
        return reasons + [f"it exports no scheme `{scheme.name}`" for scheme in unknown]

    def environment(self, plan: Plan, device: str) -> dict[str, str]:
        """Variables for the worker; the one that would let a state file run code is cleared."""
        return {"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "0"}

    def quantize(self, work: Work) -> None:
        """Quantize as planned, or restore a state, and write a complete checkpoint folder to
        ``work.output``.
        """
        import modelopt.torch.quantization as mtq
        from modelopt.torch.export import export_hf_checkpoint

        model = _load(work)
        linears = loaded_linears(work, model)
        if work.job.state_restore:
            work.report.stage("restoring the state")
            restore_state(model, work.job.state_restore, work.plan)
        elif work.plan.recipe.steps(Auto):
            _auto_quantize(model, work, linears)
        else:
            recipe = work.plan.recipe
            config = {
                "quant_cfg": _quantizers(work, mtq, linears, fused_experts(model)),
                "algorithm": _algorithm(recipe, mtq),
            }
            work.report.stage("quantizing")
            with counting_expert_tokens(work, model):
                mtq.quantize(model, config, _forward_loop(work) if work.samples else None)
        if work.job.state_save:
            work.report.stage("saving the state")
            save_state(model, work.job.state_save, work.plan)
            work.report.state_saved()
        work.report.stage("exporting")
        model.config.dtype = model.dtype  # the exporter takes a string for a device
        export_hf_checkpoint(model, export_dir=work.output, max_shard_size=MAX_SHARD_SIZE)
        if _exports_stacks(work.plan):
            split_stacks(work.output, work.plan.names)


def _exports_stacks(plan: Plan) -> bool:
    return str(plan.checkpoint.text_config.get("model_type")) in STACKED_EXPORTS


def _cannot_smooth_experts(plan: Plan) -> bool:
    """Whether its exporter would look for single experts, to give them one AWQ scale, in a block
    that has them in stacks.
    """
    has_stacks = any(plan.names.linears[each.name].parameter for each in plan.quantized)
    is_int4 = any(scheme.weights.format == "int4" for scheme in plan.recipe.schemes)
    model_type = str(plan.checkpoint.text_config.get("model_type"))
    return has_stacks and is_int4 and model_type in SMOOTHED_EXPERTS


def _load(work: Work) -> PreTrainedModel:
    import torch

    if work.device == "cpu":
        return load_model(work)
    free, _ = torch.cuda.mem_get_info(work.device)
    fits = work.plan.bytes_before < free * GPU_FRACTION
    if not fits and work.job.state_save:
        message = (
            "a state is kept only of a model that fits the GPU: "
            f"{format_size(work.plan.bytes_before)}, {format_size(free)} are free"
        )
        raise ResourceError(
            "E_GPU_MEMORY", message, hint="leave --checkpoint-save-path out, or use --device cpu"
        )
    return load_model(
        work,
        device_map=work.device if fits else "auto",
        offload_folder=str(work.scratch / "offload"),
    )


def _forward_loop(work: Work) -> Callable[[PreTrainedModel], None]:
    import torch

    batches = batch_tensors(work)
    total = len(batches) * FORWARD_PASSES.get(work.plan.recipe.algorithm[-1].name, 1)
    done = 0

    def run(model: PreTrainedModel) -> None:
        nonlocal done
        with torch.no_grad():
            for batch in batches:
                # with a cache, layerwise calibration is silently wrong
                model(input_ids=batch.to(model.device), use_cache=False)
                done += 1
                work.report.progress("calibration batches", min(done, total), total)

    return run


def _fixed_groups(scheme: Scheme) -> Scheme:
    """Return the scheme with the group size of its preset, where the library lets the group size be
    chosen.
    """
    weights = scheme.weights
    return (
        scheme.with_group_size(128)
        if weights.format == "int4" and weights.granularity == "group"
        else scheme
    )


def _preset(scheme: Scheme, recipe: Recipe, mtq: ModuleType) -> JsonDict:
    names = PRESETS | AWQ_PRESETS if recipe.steps(Awq) else PRESETS
    preset: JsonDict = copy.deepcopy(getattr(mtq, names[_fixed_groups(scheme)]))
    return preset


def _quantizers(
    work: Work, mtq: ModuleType, linears: Iterable[str], fused: Sequence[str]
) -> list[JsonDict]:
    """Return the ordered list that switches everything off and then on what the plan names.

    Modules of ``fused``, which hold all experts of a layer, have a quantizer for each tensor and
    expert and get one scheme.
    """
    recipe = work.plan.recipe
    entries: list[JsonDict] = [{"quantizer_name": "*", "enable": False}]
    experts_scheme = next(iter(_expert_schemes(work.plan)), None) if fused else None
    for group in groups_of(work.plan, linears):
        if group.scheme is None:
            continue
        names = [name for name in group.names if not (fused and is_expert(name))]
        prefixes = [f"{name}." for name in names]
        if group.scheme == experts_scheme:
            prefixes += [f"{name}.*" for name in fused]
        preset = _preset(group.scheme, recipe, mtq)["quant_cfg"]
        entries += _entries(prefixes, group.scheme, preset)
    if recipe.kv_cache:
        entries += copy.deepcopy(getattr(mtq, f"{recipe.kv_cache.upper()}_KV_CFG")["quant_cfg"])
    return entries


def _expert_schemes(plan: Plan) -> set[Scheme | None]:
    """Return the schemes of the experts that the model loads."""
    unused = plan.names.unused
    return {
        module.scheme
        for module in plan.modules
        if is_expert(module.layer) and f"{module.name}.weight" not in unused
    }


def _entries(prefixes: Iterable[str], scheme: Scheme, preset: Iterable[JsonDict]) -> list[JsonDict]:
    """Return the entries of ``preset`` for linear layers, for each of the modules that ``prefixes``
    name.
    """
    entries = [entry for entry in preset if _is_linear_entry(entry)]
    return [_for_module(entry, name, scheme) for name in prefixes for entry in entries]


def _is_linear_entry(entry: JsonDict) -> bool:
    is_linear = entry["quantizer_name"] in ("*weight_quantizer", "*input_quantizer")
    return is_linear and bool(entry.get("enable", True))


def _for_module(entry: JsonDict, prefix: str, scheme: Scheme) -> JsonDict:
    """Return the preset's ``entry`` for the module that ``prefix`` names, with the scheme's own
    group size.
    """
    entry = copy.deepcopy(entry)
    is_weight = entry["quantizer_name"] == "*weight_quantizer"
    entry["quantizer_name"] = (
        prefix + entry["quantizer_name"].removeprefix("*") + ("*" if is_weight else "")
    )
    if scheme.weights.format == "int4" and is_weight:
        for part in entry["cfg"] if isinstance(entry["cfg"], list) else [entry["cfg"]]:
            if "block_sizes" in part:
                part["block_sizes"][-1] = scheme.weights.group_size
    return entry


def _algorithm(recipe: Recipe, mtq: ModuleType) -> str | JsonDict | None:
    assert recipe.scheme is not None
    step = recipe.algorithm[-1]
    if isinstance(step, Rtn):
        return None if _preset(recipe.scheme, recipe, mtq)["algorithm"] is None else "max"
    if isinstance(step, Awq):
        return {"method": f"awq_{step.search}"}
    if isinstance(step, SmoothQuant):
        return {"method": "smoothquant", "alpha": step.strength}
    if isinstance(step, Gptq):
        return {"method": "gptq"} | ({"perc_damp": step.dampening} if step.dampening else {})
    return {"method": step.name}


def _auto_quantize(model: PreTrainedModel, work: Work, linears: Iterable[str]) -> None:
    """Search a scheme for each layer within the recipe's budget of bits."""
    import modelopt.torch.quantization as mtq

    recipe = work.plan.recipe
    step = recipe.steps(Auto)[0]
    by_gradient = step.score == "gradient"
    batches = [
        {"input_ids": batch.to(model.device), "labels": batch.to(model.device)}
        for batch in batch_tensors(work)
    ]

    def forward(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> object:
        output = model(**batch, use_cache=False)
        return output if by_gradient else output.logits

    work.report.stage("searching a scheme for each layer")
    try:
        mtq.auto_quantize(
            model,
            constraints={"effective_bits": step.effective_bits},
            quantization_formats=[_preset(scheme, recipe, mtq) for scheme in step.candidates],
            data_loader=batches,
            forward_step=forward,
            loss_func=(lambda output, batch: output.loss) if by_gradient else None,
            num_calib_steps=len(batches),
            num_score_steps=len(batches),
            disabled_layers=_disabled(work.plan, linears) or None,
            method=step.score,
            verbose=True,
        )
    except ValueError as error:
        if "effective_bits" not in str(error):
            raise
        raise RecipeRefused(
            "E_EFFECTIVE_BITS",
            one_line(error),
            hint="raise `effective_bits`, or add a smaller candidate",
        ) from error


def _disabled(plan: Plan, linears: Iterable[str]) -> list[str]:
    """Return patterns of the layers that stay as they are, and of what is in them."""
    planned = {module.layer for module in plan.quantized}
    unplanned = [name for name in linears if name not in planned]
    return [pattern for name in unplanned for pattern in (name, f"{name}.*")]
