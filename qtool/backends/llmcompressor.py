"""LLM Compressor: writes compressed-tensors checkpoints.

Source: llmcompressor 0.14 and compressed-tensors 0.19.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, cast

from qtool.backends import (
    MAX_SHARD_SIZE,
    Group,
    Reporter,
    Work,
    calibration_refusals,
    groups_of,
    has_own_linears,
    step_refusals,
)
from qtool.backends.expert_tokens import counting_expert_tokens
from qtool.backends.models import batch_tensors, load_model, loaded_linears
from qtool.checkpoint.strict_json import JsonDict
from qtool.formats.compressed_tensors_config import only_targets, tensor_format
from qtool.plan import Plan
from qtool.recipe import AutoRound, Awq, Gptq, Mse, Recipe, SmoothQuant, SpinQuant, Step
from qtool.scheme import Activations, Scheme, Weights

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor.modifiers import Modifier
    from torch.utils.data import Dataset
    from transformers import PreTrainedModel

ROUNDERS = ("rtn", "mse", "gptq", "autoround")
# containers whose loss ends the tracing that it calibrates with; seen with transformers 5.17
UNTRACEABLE = {"qwen2_audio"}
DATA_DEPENDENT = {"dbrx"}  # its experts look at their data
TRANSFORMS = ("awq", "smoothquant", "spinquant")
CHAINS = {
    *((rounder,) for rounder in ROUNDERS),
    *((transform,) for transform in TRANSFORMS),
    *((transform, rounder) for transform in TRANSFORMS for rounder in ("rtn", "mse", "gptq")),
}


class LLMCompressorBackend:
    """Drives ``llmcompressor.oneshot``: one decoder layer at a time on the GPU, the model on the
    CPU.
    """

    distribution = "llmcompressor"
    modules = ("llmcompressor",)
    base_memory_bytes = 650_000_000

    def refusals(self, plan: Plan) -> list[str]:
        """Why this plan cannot run here; empty when it can."""
        recipe = plan.recipe
        reasons = step_refusals(plan, CHAINS) + calibration_refusals(plan)
        kind = plan.checkpoint.config.get("model_type")
        if recipe.needs_data and kind in UNTRACEABLE:
            reasons.append("it cannot cut the container of this model into layers to calibrate")
        scales_norms = any(isinstance(step, Awq | SmoothQuant) for step in recipe.algorithm)
        if scales_norms and kind in DATA_DEPENDENT:
            reasons.append("which layers read a norm of this model shows in a pass with data alone")
        if recipe.kv_cache not in (None, "fp8"):
            reasons.append(f"its KV cache format is fp8, not {recipe.kv_cache}")
        if recipe.checkpoint_format:
            reasons.append(f"it writes compressed-tensors, not {recipe.checkpoint_format}")
        if any(step.act_order for step in recipe.steps(Gptq)):
            reasons.append(
                "compressed-tensors 0.19 no longer stores an activation order (`act_order`)"
            )
        if any(step.search != "lite" for step in recipe.steps(Awq)):
            reasons.append("its AWQ has one search, `lite`")
        scales = {scheme.weights.scale for scheme in recipe.schemes}
        if recipe.steps(AutoRound) and scales != {"float"}:
            reasons.append("its AutoRound takes integer and FP8 weights, and fails on FP4")
        are_integers = all(
            scheme.activations is None and scheme.weights.format.startswith("int")
            for scheme in recipe.schemes
        )
        if has_own_linears(plan) and not are_integers:
            reasons.append("of a model with linear layers of its own it quantizes integers alone")
        return reasons + _scheme_refusals(recipe.schemes)

    def environment(self, plan: Plan, device: str) -> dict[str, str]:
        """Variables for the worker; ``LLM_COMPRESSOR_LOG_DISABLED`` would break GPTQ, so it is
        cleared.
        """
        return {
            "LLM_COMPRESSOR_LOG_DISABLED": "false",
            "LLM_COMPRESSOR_CLEAR_LOGGERS": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }

    def quantize(self, work: Work) -> None:
        """Quantize as planned and write a complete checkpoint folder to ``work.output``."""
        from llmcompressor import oneshot
        from llmcompressor.pipelines.cache import IntermediatesCache
        from torch.utils.data import DataLoader
        from transformers import AutoTokenizer

        _report_bars(work.report)
        _take_flat_activations()
        if work.device == "cpu":
            # it pins without asking whether there is a GPU
            IntermediatesCache.pin_memory = lambda self, *args, **options: None
        model = load_model(work)
        linears = loaded_linears(work, model)
        batches = [{"input_ids": batch} for batch in batch_tensors(work)]
        loader = DataLoader(cast("Dataset[object]", batches), batch_size=None)
        modifiers = _modifiers(work, model, linears)
        with counting_expert_tokens(work, model):
            oneshot(
                model=model,
                recipe=modifiers,
                # it asks for one where there are towers, though samples are tokens already
                processor=AutoTokenizer.from_pretrained(work.job.model) if batches else None,
                dataset=loader if batches else None,
                num_calibration_samples=len(batches),
                shuffle_calibration_samples=False,
            )
        work.report.stage("saving")
        model.save_pretrained(work.output, max_shard_size=MAX_SHARD_SIZE)
        _clear_actorder(work.output / "config.json")


def _take_flat_activations() -> None:
    """Let its observers see all inputs as [1, T, K]: those of experts have two or four dimensions,
    and its groups would lie across tokens.
    """
    from llmcompressor.observers import helpers

    flatten = helpers._flatten_activation
    helpers._flatten_activation = lambda value, args: flatten(
        value if value.dim() == 3 else value.reshape(1, -1, value.shape[-1]), args
    )


def _scheme_refusals(schemes: Iterable[Scheme]) -> list[str]:
    reasons = []
    for scheme in schemes:
        format = scheme.activations.format if scheme.activations else None
        if format not in (None, "int4", "int8", "fp4", "fp8"):
            reasons.append(f"it has no activations in {format}")
        is_nvfp4 = scheme.weights.group_size == 16 and format in (None, "fp4")
        if scheme.weights.scale == "e4m3" and not is_nvfp4:
            reasons.append(f"it has no scheme `{scheme.name}`")
    return reasons


def _clear_actorder(config_file: Path) -> None:
    """Drop the order GPTQ solved columns in where there are no groups: it means nothing there, and
    older engines refuse such a file.
    """
    config = json.loads(config_file.read_text())
    for group in config["quantization_config"]["config_groups"].values():
        weights = group.get("weights")
        if weights and weights.get("strategy") not in ("group", "tensor_group"):
            weights["actorder"] = None
    config_file.write_text(json.dumps(config, indent=2))


def _modifiers(work: Work, model: PreTrainedModel, linears: list[str]) -> list[Modifier]:
    """Return the steps of the recipe as the library's modifiers, the one that rounds last."""
    recipe = work.plan.recipe
    transforms = [_transform(step, work.plan, model) for step in recipe.algorithm]
    rounder = _rounder(work, _quantization_options(work, linears))
    return [*(transform for transform in transforms if transform is not None), rounder]


def _quantization_options(work: Work, linears: list[str]) -> JsonDict:
    """Return the options of the modifier that rounds: groups of layers, and those to ignore."""
    recipe = work.plan.recipe
    groups = groups_of(work.plan, linears)
    ignore = [name for group in groups if group.scheme is None for name in group.names]
    quantized = {group.scheme: group for group in groups if group.scheme is not None}
    config_groups = {
        f"group_{index}": _config_group(
            scheme, _targets(group, is_only=len(quantized) == 1), recipe
        )
        for index, (scheme, group) in enumerate(quantized.items())
    }
    options: JsonDict = {"config_groups": config_groups or None, "ignore": ignore}
    if not config_groups:
        options["targets"] = []
    if recipe.kv_cache:
        options["kv_cache_scheme"] = _kv_cache_args()
    return options


def _targets(group: Group, *, is_only: bool) -> list[str]:
    return only_targets(group.names) if is_only else [f"re:{each}" for each in group.patterns]


def _transform(step: Step, plan: Plan, model: PreTrainedModel) -> Modifier | None:
    """Return the modifier that changes weights before they are rounded; None for other steps."""
    from llmcompressor.modifiers.transform import (
        AWQModifier,
        SmoothQuantModifier,
        SpinQuantModifier,
    )
    from llmcompressor.modifiers.transform.awq.mappings import AWQMapping

    from qtool.backends.smoothing import awq_pairs, norm_pairs

    # the library's lists leave out routers and shared experts, and do not fit models with towers
    if isinstance(step, SmoothQuant):
        pairs = [([*each.balance], each.smooth) for each in norm_pairs(plan, model)]
        return SmoothQuantModifier(smoothing_strength=step.strength, mappings=pairs)
    if isinstance(step, SpinQuant):
        return SpinQuantModifier(rotations=["R1", "R2"], transform_type="hadamard")
    if isinstance(step, Awq):
        # duo scaling is not defined for FP8 weights
        fp8 = any(scheme.weights.format == "fp8" for scheme in plan.recipe.schemes)
        mappings = [AWQMapping(each.smooth, [*each.balance]) for each in awq_pairs(plan, model)]
        return AWQModifier(duo_scaling=not fp8, mappings=mappings)
    return None


def _rounder(work: Work, options: JsonDict) -> Modifier:
    """Return the modifier of the last step of the algorithm."""
    step = work.plan.recipe.algorithm[-1]
    if isinstance(step, Gptq):
        from llmcompressor.modifiers.gptq import GPTQModifier

        dampening = {"dampening_frac": step.dampening} if step.dampening else {}
        return GPTQModifier(**dampening, **options)
    if isinstance(step, AutoRound):
        # a library of its own, slow to import
        from llmcompressor.modifiers.autoround import AutoRoundModifier

        compiles = work.device != "cpu"
        return AutoRoundModifier(iters=step.iterations, enable_torch_compile=compiles, **options)
    from llmcompressor.modifiers.quantization import QuantizationModifier

    return QuantizationModifier(**options)


def _config_group(scheme: Scheme, targets: list[str], recipe: Recipe) -> QuantizationScheme:
    from compressed_tensors.quantization import QuantizationScheme

    weights = _weight_arguments(scheme.weights)
    if recipe.steps(Mse):
        weights.observer = "memoryless_mse"
    activations = _activation_arguments(scheme.activations) if scheme.activations else None
    # else it is what the library makes of weights and inputs
    format = "pack-quantized" if tensor_format(scheme) == "pack-quantized" else None
    return QuantizationScheme(
        targets=targets, weights=weights, input_activations=activations, format=format
    )


def _weight_arguments(weights: Weights) -> QuantizationArgs:
    from compressed_tensors.quantization import QuantizationArgs

    strategy = "tensor_group" if weights.scale == "e4m3" else weights.granularity
    options = {"block_structure": list(weights.block)} if weights.block else {}
    return QuantizationArgs(
        num_bits=weights.bits,
        type=_type(weights.format),
        strategy=strategy,
        group_size=weights.group_size,
        symmetric=weights.symmetric,
        dynamic=False,
        **options,
        **_scale_dtypes(weights.scale, symmetric=weights.symmetric),
    )


def _activation_arguments(activations: Activations) -> QuantizationArgs:
    from compressed_tensors.quantization import QuantizationArgs

    two_levels = activations.scale == "e4m3"
    return QuantizationArgs(
        num_bits=4 if activations.format in ("fp4", "int4") else 8,
        type=_type(activations.format),
        strategy="tensor_group" if two_levels else activations.granularity,
        group_size=activations.group_size,
        symmetric=activations.symmetric,
        dynamic="local" if two_levels else activations.dynamic,
        observer="static_minmax" if activations.needs_data else None,
        **_scale_dtypes(activations.scale, symmetric=True),
    )


def _scale_dtypes(scale: str, *, symmetric: bool) -> JsonDict:
    import torch

    if scale == "float":
        return {} if symmetric else {"zp_dtype": torch.int8}
    dtype = {"e4m3": torch.float8_e4m3fn, "e8m0": torch.uint8}[scale]
    return {"scale_dtype": dtype, "zp_dtype": dtype}


def _type(format: str) -> str:
    return "float" if format.startswith("fp") else "int"


def _kv_cache_args() -> QuantizationArgs:
    from compressed_tensors.quantization import QuantizationArgs

    return QuantizationArgs(
        num_bits=8, type="float", strategy="tensor", symmetric=True, dynamic=False
    )


class _Bar:
    """Takes tqdm's place in the library: turns ``(3/7): Calibrating`` and its like into progress
    events.
    """

    report: Reporter

    def __init__(
        self,
        iterable: Iterable[object] | None = None,
        *,
        desc: str = "",
        total: int | None = None,
        **_: object,
    ) -> None:
        self._iterable = iterable
        self._layer = re.match(r"\((\d+)/(\d+)\): (\w+)", desc)
        self._total = total
        if not self._layer and desc and iterable is not None:
            self.report.stage(desc[0].lower() + desc[1:])

    def __iter__(self) -> Iterator[object]:
        assert self._iterable is not None
        if not self._layer:
            yield from self._iterable
            return
        layer, layers, phase = int(self._layer[1]), int(self._layer[2]), self._layer[3]
        half = 0.0 if phase == "Calibrating" else 0.5
        for batch, item in enumerate(self._iterable):
            done = layer - 1 + half + 0.5 * batch / (self._total or 1)
            self.report.progress("layers", int(done), layers)
            yield item
        if phase == "Propagating":
            self.report.progress("layers", layer, layers)

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **options: None  # update, close, set_postfix ...


def _report_bars(report: Reporter) -> None:
    import llmcompressor.modifiers.transform.awq.base as awq
    import llmcompressor.pipelines.basic.pipeline as basic
    import llmcompressor.pipelines.cache as cache
    import llmcompressor.pipelines.sequential.pipeline as sequential

    bar = type("Bar", (_Bar,), {"report": report})
    for module in (sequential, cache, awq):
        module.tqdm = bar
    basic.tqdm = type("tqdm", (), {"tqdm": bar})
