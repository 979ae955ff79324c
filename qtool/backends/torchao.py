"""torchao through transformers: weights rounded to nearest while the model loads.

Source: torchao 0.18, transformers 5.17.
"""

from __future__ import annotations

from qtool.backends import MAX_SHARD_SIZE, Work, step_refusals
from qtool.backends.models import linear_names, load_model
from qtool.checkpoint.strict_json import JsonDict
from qtool.plan import Plan
from qtool.scheme import SCHEMES

CONFIGS = {  # scheme -> class in torchao.quantization
    SCHEMES["W8A16_CHANNEL"]: "Int8WeightOnlyConfig",
    SCHEMES["W8A8"]: "Int8DynamicActivationInt8WeightConfig",
    SCHEMES["FP8_W8A16"]: "Float8WeightOnlyConfig",
    SCHEMES["W4A16_ASYM"]: "Int4WeightOnlyConfig",
}


class TorchAOBackend:
    """Drives transformers' ``TorchAoConfig``; the result is read by transformers and vLLM."""

    distribution = "torchao"
    modules = ("torchao.quantization", "transformers")
    base_memory_bytes = 605_000_000

    def refusals(self, plan: Plan) -> list[str]:
        """Why this plan cannot run here; empty when it can."""
        reasons = step_refusals(plan, {("rtn",)})
        if len(plan.recipe.schemes) != 1 or plan.recipe.scheme not in CONFIGS:
            names = ", ".join(scheme.name for scheme in CONFIGS)
            reasons.append(f"it has one scheme for all layers, one of {names}")
        if plan.recipe.kv_cache or plan.recipe.checkpoint_format or plan.recipe.lm_head:
            reasons.append("it changes neither KV cache, nor output head, nor the file format")
        if any(plan.names.linears[each.name].parameter for each in plan.quantized):
            reasons.append("it leaves experts that the model stacks in 16 bits")
        return reasons

    def environment(self, plan: Plan, device: str) -> dict[str, str]:
        """Variables for the worker: none."""
        return {}

    def quantize(self, work: Work) -> None:
        """Quantize as planned and write a complete checkpoint folder to ``work.output``."""
        import torch
        import torchao.quantization
        from transformers import AutoConfig, AutoModelForCausalLM, TorchAoConfig

        scheme = work.plan.recipe.scheme
        assert scheme is not None
        options: JsonDict = {}
        # tinygemm's tiles; the plain layout needs a library that is not on the package index
        if scheme.weights.group_size:
            options = {
                "group_size": scheme.weights.group_size,
                "int4_packing_format": "tile_packed_to_4d",
            }
        config = getattr(torchao.quantization, CONFIGS[scheme])(**options)
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(
                AutoConfig.from_pretrained(
                    work.job.model, trust_remote_code=work.job.trust_remote_code
                ),
                trust_remote_code=work.job.trust_remote_code,
            )
        planned = {module.layer for module in work.plan.quantized}
        skipped = [name for name in linear_names(skeleton) if name not in planned]
        model = load_model(
            work,
            quantization_config=TorchAoConfig(config, modules_to_not_convert=skipped),
            device_map=work.device,
        )
        work.report.stage("saving")
        model.save_pretrained(work.output, max_shard_size=MAX_SHARD_SIZE)
