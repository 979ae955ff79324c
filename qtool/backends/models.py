"""What the backends that take a loaded model share: loading it, batches as tensors, and the names
of its linear modules.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qtool.backends import Work
from qtool.errors import BackendFailed
from qtool.modules import expert_stack

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module
    from transformers import PreTrainedModel


def load_model(work: Work, **options: object) -> PreTrainedModel:
    """Return the job's model, of the class that its config names and in its own dtype.

    It is on the CPU unless ``options`` say otherwise.
    """
    from transformers import AutoModelForCausalLM, GenerationConfig

    from qtool.architecture.meta import class_of

    model_class = class_of(work.plan.checkpoint) or AutoModelForCausalLM
    work.report.stage("loading the model")
    options |= {
        "dtype": "auto",
        "use_safetensors": True,
        "trust_remote_code": work.job.trust_remote_code,
    }
    model: PreTrainedModel = model_class.from_pretrained(work.job.model, **options)
    if model.can_generate():  # the file of the source is carried over; transformers may refuse it
        model.generation_config = GenerationConfig()
    return model


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
    """Return the linear modules of the loaded model. Experts in a stack are among them, under the
    names that they get when the library splits the stack.

    Raises: BackendFailed, when the model lacks a module that the plan, made from the files, wants
        to change.
    """
    linears = linear_names(model)
    found, stacks = set(linears), fused_experts(model)
    stacked = [each.layer for each in work.plan.modules if expert_stack(each.layer) in stacks]
    found.update(stacked)
    unknown = [each.name for each in work.plan.quantized if each.layer not in found]
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
    return [*linears, *stacked]


def batch_tensors(work: Work) -> list[Tensor]:
    """Return the calibration batches as int64 tensors [B, T] on the CPU."""
    import torch

    return [torch.tensor(batch) for batch in work.batches()]
