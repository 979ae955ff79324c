"""GPTQModel: writes GPTQ (v1, v2) and AWQ checkpoints.

Source: gptqmodel 7.6. It marks the process it runs in (environment, root logger, patched classes);
    the worker takes that with it.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

from qtool.backends import MAX_SHARD_SIZE, Work, groups_of, step_refusals
from qtool.checkpoint.strict_json import JsonDict
from qtool.modules import is_head
from qtool.plan import Plan
from qtool.recipe import Awq, Gptq
from qtool.scheme import Scheme

BITS = (2, 3, 4, 8)  # 5, 6 and 7 bits exist in a layout that only GPTQModel reads


class GPTQModelBackend:
    """Drives ``GPTQModel.quantize``: weights are read layer by layer, so memory holds a layer or
    two.
    """

    distribution = "gptqmodel"

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
        if recipe.scheme is None:
            return [*reasons, "it needs a scheme of its own, not rules alone"]
        awq = [step.name for step in recipe.algorithm] == ["awq"]
        for scheme in recipe.schemes:
            weights = scheme.weights
            if (
                scheme.activations
                or weights.format not in {f"int{bits}" for bits in BITS}
                or weights.granularity not in ("group", "channel")
            ):
                reasons.append(
                    f"it writes integer weights of {', '.join(map(str, BITS))} bits with 16-bit "
                    f"activations, not `{scheme.name}`"
                )
            elif awq and weights.bits != 4:
                reasons.append("its AWQ has 4 bits")
        for module in plan.quantized:
            if module.scheme and any(
                size * module.scheme.weights.bits % 32 for size in module.shape
            ):
                reasons.append(f"{module.shape} of `{module.name}` does not pack into 32-bit words")
                break
        return reasons

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
        from gptqmodel.utils import logger
        from logbar import LogBar

        LogBar.shared().setLevel("ERROR")
        logger._suppress_live_renderables = lambda: True
        recipe = work.plan.recipe
        config = _config(work)
        work.report.stage("loading the model")
        model = GPTQModel.load(work.job.model, config, trust_remote_code=work.job.trust_remote_code)
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
        model.quantize(
            samples or None, batch_size=work.batch_size, calibration_sort=None, **options
        )
        work.report.stage("saving")
        model.save(str(work.output), max_shard_size=MAX_SHARD_SIZE)


def _config(work: Work) -> Any:
    from gptqmodel.quantization.config import AWQConfig, GPTQConfig, RTNConfig

    recipe = work.plan.recipe
    base = recipe.scheme
    assert base is not None
    dynamic: dict[str, JsonDict] = {}
    for group in groups_of(work.plan, [module.name for module in work.plan.modules]):
        if group.scheme is None:
            # it leaves heads alone unasked
            left_alone = [name for name in group.names if not is_head(name)]
            dynamic |= {f"-:{pattern}": {} for pattern in group.patterns} if left_alone else {}
        elif group.scheme != base:
            dynamic |= {f"+:{pattern}": _numbers(group.scheme) for pattern in group.patterns}
    options: JsonDict = {
        **_numbers(base),
        "offload_to_disk_path": str(work.scratch / "offload"),
        "device": work.device,
    }
    for module in work.plan.quantized:
        if is_head(module.name) and module.scheme:
            options["lm_head"] = True
            # without an entry a head gets 8 bits in groups of 32
            dynamic[f"+:{re.escape(module.name)}$"] = _numbers(module.scheme)
    options["dynamic"] = dynamic or None
    step = recipe.algorithm[-1]
    if isinstance(step, Gptq):
        options |= {
            "desc_act": step.act_order,
            "act_group_aware": not step.act_order,
            "format": recipe.checkpoint_format or "gptq",
        }
        if step.dampening:
            options["damp_percent"] = step.dampening
        return GPTQConfig(**options)
    return AWQConfig(**options) if step.name == "awq" else RTNConfig(**options)


def _numbers(scheme: Scheme) -> JsonDict:
    weights = scheme.weights
    return {"bits": weights.bits, "group_size": weights.group_size or -1, "sym": weights.symmetric}
