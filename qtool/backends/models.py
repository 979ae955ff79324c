"""What the backends that take a loaded model share: loading it, batches as tensors, and the names
of its linear modules.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qtool.backends import Work
from qtool.errors import BackendFailed
from qtool.modules import is_expert

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module
    from transformers import PreTrainedModel


def load_model(work: Work, **options: object) -> PreTrainedModel:
    """Return the job's model in its own dtype, on the CPU unless ``options`` say otherwise."""
    from transformers import AutoModelForCausalLM

    work.report.stage("loading the model")
    options |= {
        "dtype": "auto",
        "use_safetensors": True,
        "trust_remote_code": work.job.trust_remote_code,
    }
    return AutoModelForCausalLM.from_pretrained(work.job.model, **options)


def linear_names(model: Module) -> list[str]:
    """Return the dotted names of the model's ``nn.Linear`` modules."""
    import torch

    return [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]


def fused_experts(model: Module) -> list[str]:
    """Return the names of modules that hold all experts of a layer in tensors [E, ...]; on disk the
    experts are linear modules of their own.
    """
    return [
        name
        for name, module in model.named_modules()
        if name.endswith("experts")
        and any(parameter.dim() == 3 for parameter in module.parameters(recurse=False))
    ]


def loaded_linears(work: Work, model: Module) -> list[str]:
    """Return the linear modules of the loaded model, those inside fused experts under their names
    on disk.

    Raises: BackendFailed, when the model lacks a module that the plan, made from the files, wants
        to change.
    """
    linears = linear_names(model)
    found, fused = set(linears), fused_experts(model)
    missing = [module.name for module in work.plan.quantized if module.name not in found]
    experts = [
        module.name
        for module in work.plan.modules
        if fused and is_expert(module.name) and module.name not in found
    ]
    unknown = [name for name in missing if name not in set(experts)]
    if unknown:
        message = (
            f"{len(unknown)} planned modules are not linear modules of the loaded model, the "
            f"first is `{unknown[0]}`"
        )
        raise BackendFailed(
            "E_PLAN_MISMATCH",
            message,
            hint="leave them out with --ignore, or try another --backend",
        )
    return linears + experts


def batch_tensors(work: Work) -> list[Tensor]:
    """Return the calibration batches as int64 tensors [B, T] on the CPU."""
    import torch

    return [torch.tensor(batch) for batch in work.batches()]
