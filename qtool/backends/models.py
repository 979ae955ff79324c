"""What the backends that take a loaded model share: loading it, batches as tensors, and the names of its linear modules."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qtool.backends import Work
from qtool.errors import BackendFailed

if TYPE_CHECKING:
    from torch import Tensor


def load_model(work: Work, **options: Any) -> Any:
    """Return the job's model in its own dtype, on the CPU unless ``options`` say otherwise."""
    from transformers import AutoModelForCausalLM

    work.report.stage("loading the model")
    return AutoModelForCausalLM.from_pretrained(work.job.model, dtype="auto", trust_remote_code=work.job.trust_remote_code, **options)


def linear_names(model: Any) -> list[str]:
    """Return the dotted names of the model's ``nn.Linear`` modules, after checking nothing."""
    import torch

    return [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]


def check_planned(work: Work, linears: list[str]) -> None:
    """Raise BackendFailed when the loaded model lacks a module that the plan, made from the files, wants to change."""
    found = set(linears)
    missing = [module.name for module in work.plan.quantized if module.name not in found]
    if missing:
        message = f"{len(missing)} planned modules are not linear modules of the loaded model, the first is `{missing[0]}`"
        raise BackendFailed("E_PLAN_MISMATCH", message, hint="leave them out with --ignore, or try another --backend")


def batch_tensors(work: Work) -> list[Tensor]:
    """Return the calibration batches as int64 tensors [B, T] on the CPU."""
    import torch

    return [torch.tensor(batch) for batch in work.batches()]
