"""The quantization libraries, each behind the same small protocol and each run in a worker process
of its own.

Nothing here imports a library: a backend's module answers `refusals` from static tables, and
imports its library when its work starts.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import shutil
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

from qtool.calibration import CalibrationSpec
from qtool.checkpoint import Checkpoint
from qtool.checkpoint.strict_json import Json
from qtool.devices import gpu_number
from qtool.errors import CheckpointRefused, RecipeRefused, ResourceError
from qtool.modules import FUSED, last_part
from qtool.plan import Plan
from qtool.recipe import Recipe
from qtool.scheme import Scheme

BACKENDS: Mapping[str, str] = {  # one of `BACKEND_NAMES` -> its class, imported when first used
    "gptqmodel": "qtool.backends.gptqmodel:GPTQModelBackend",
    "llmcompressor": "qtool.backends.llmcompressor:LLMCompressorBackend",
    "modelopt": "qtool.backends.modelopt:ModelOptBackend",
    "torchao": "qtool.backends.torchao:TorchAOBackend",
}
MAX_SHARD_SIZE = "1GB"  # several files are hashed, checked and loaded at once


@dataclass(frozen=True)
class Job:
    """One run as it travels to a worker, as JSON; every path is absolute."""

    model: str
    """The folder of the checkpoint."""
    recipe: Json
    output: str
    """An empty folder for the result."""
    scratch: str
    """An empty folder that is thrown away afterwards."""
    device: str
    calibration: CalibrationSpec | None
    """None when the recipe needs no data."""
    trust_remote_code: bool = False
    state_save: str | None = None
    """The folder to write a calibrated state to."""
    state_restore: str | None = None
    """The state to quantize from."""


class Reporter(Protocol):
    """Where a backend says what it is doing."""

    def stage(self, what: str) -> None:
        """A new part of the work begins, e.g. ``loading the model``."""

    def progress(self, what: str, done: int, total: int) -> None:
        """``done`` of ``total`` units of ``what`` are finished, e.g. layers."""

    def expert_tokens(self, counts: Mapping[str, Sequence[int]]) -> None:
        """The calibration data has run through all layers; ``counts`` are those of an
        `ExpertTokensEvent`.
        """

    def state_saved(self) -> None:
        """The state folder is complete and may be published."""


@dataclass(frozen=True)
class Work:
    """A job inside its worker."""

    job: Job
    plan: Plan
    samples: Sequence[Sequence[int]]
    """Token ids of each sample of the calibration data."""
    device: str
    """The device that was found: ``cpu`` or ``cuda:0``."""
    report: Reporter

    @property
    def output(self) -> Path:
        """The folder to write a complete checkpoint to."""
        return Path(self.job.output)

    @property
    def scratch(self) -> Path:
        """A folder for what the library wants to keep meanwhile."""
        return Path(self.job.scratch)

    @property
    def batch_size(self) -> int:
        """Samples in one forward pass, at most."""
        return self.job.calibration.batch_size if self.job.calibration else 1

    def batches(self) -> list[list[Sequence[int]]]:
        """Return the samples in batches of equal length, so that no padding enters the
        statistics.
        """
        by_length: dict[int, list[Sequence[int]]] = {}
        for sample in self.samples:
            by_length.setdefault(len(sample), []).append(sample)
        size = self.batch_size
        return [
            group[start : start + size]
            for group in by_length.values()
            for start in range(0, len(group), size)
        ]


class Backend(Protocol):
    """One quantization library. How it loads, calibrates and saves is its own affair."""

    distribution: str
    modules: Sequence[str]
    """What `quantize` imports of the library."""
    base_memory_bytes: int
    """What the process needs besides the model: Python, torch, the library. Measured on a CPU."""

    def refusals(self, plan: Plan) -> list[str]:
        """Why this plan cannot run here, one reason each; empty when it can. Imports no library."""

    def environment(self, plan: Plan, device: str) -> dict[str, str]:
        """The variables the worker's interpreter starts with."""

    def quantize(self, work: Work) -> None:
        """Quantize as planned and write a complete checkpoint folder to ``work.output``."""


def load_backend(name: str) -> Backend:
    """Import and return the backend that recipes call ``name``."""
    module_name, class_name = BACKENDS[name].split(":")
    return cast(Backend, getattr(importlib.import_module(module_name), class_name)())


def version_of(backend: Backend) -> str:
    """Return the library's name and installed version, without importing it; the name alone when it
    is not installed here.
    """
    try:
        return f"{backend.distribution} {importlib.metadata.version(backend.distribution)}"
    except importlib.metadata.PackageNotFoundError:
        return backend.distribution


def host_memory_bytes(plan: Plan) -> int:
    """Return an estimate of the worker's peak memory on the host."""
    data = plan.recipe.calibration
    whole, by_layer = plan.peak_memory(data.num_samples, data.seq_len)
    model = by_layer if plan.recipe.backend == "gptqmodel" else whole
    return load_backend(plan.recipe.backend).base_memory_bytes + model


def check_backend(plan: Plan) -> None:
    """Raise RecipeRefused when the plan's backend cannot run it, with its reasons and a backend
    that can.
    """
    name = plan.recipe.backend
    reasons = load_backend(name).refusals(plan)
    if not reasons:
        return
    able = [other for other in BACKENDS if other != name and not load_backend(other).refusals(plan)]
    hint = (
        f"--backend {able[0]} can run it"
        if able
        else "no backend can run this combination; `qtool quantize --list` shows what they run"
    )
    raise RecipeRefused(
        "E_BACKEND_REFUSES", f"{name} cannot run this recipe: {'; '.join(reasons)}", hint=hint
    )


def check_device(device: str, recipe: Recipe, *, gpus: int) -> None:
    """Raise ResourceError when ``recipe`` cannot run on ``device`` of a machine with so many
    ``gpus``.
    """
    if device.startswith("cuda") and gpus <= (gpu_number(device) or 0):
        raise ResourceError(
            "E_NO_DEVICE",
            f"device `{device}` was asked for and there is no such GPU",
            hint="check the driver, or use --device cpu",
        )
    if "cpu" not in recipe.runs_on and (device == "cpu" or not gpus):
        raise ResourceError(
            "E_NEEDS_GPU",
            f"`{recipe.name}` needs an NVIDIA GPU",
            hint="run it on a machine with one, and without --device cpu",
        )


def check_model_code(checkpoint: Checkpoint, *, trusted: bool) -> None:
    """Raise CheckpointRefused when only code in the model folder, which is not ``trusted``, defines
    the model.
    """
    if trusted or "auto_map" not in checkpoint.config:
        return
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    model_type = checkpoint.config.get("model_type")
    if model_type not in CONFIG_MAPPING_NAMES:
        message = (
            f"{checkpoint.source}: model type `{model_type}` is defined by code in the model "
            "folder, which qtool does not run unasked"
        )
        raise CheckpointRefused(
            "E_REMOTE_CODE", message, hint="read that code, then add --trust-remote-code"
        )


def check_python(python: str, backend: str) -> None:
    """Raise ResourceError when ``python`` cannot be started, or is this interpreter and lacks the
    library of ``backend``. Another interpreter says so itself, in the worker.
    """
    if shutil.which(python) is None:
        raise ResourceError(
            "E_BACKEND_PYTHON", f"{python} cannot be started", hint="check --backend-python"
        )
    found = load_backend(backend)
    library = found.distribution
    if python == sys.executable and version_of(found) == library:
        raise ResourceError(
            "E_NOT_INSTALLED",
            f"backend `{backend}` needs the package `{library}`",
            hint=f"pip install {library}",
        )


def step_refusals(plan: Plan, chains: Iterable[tuple[str, ...]]) -> list[str]:
    """Return a reason when the recipe's algorithm is none of ``chains`` (tuples of step names)."""
    names = tuple(step.name for step in plan.recipe.algorithm)
    return [] if names in set(chains) else [f"it has no algorithm `{' + '.join(names) or 'none'}`"]


def calibration_refusals(plan: Plan) -> list[str]:
    """Return a reason when tokens alone do not run the model, as calibration needs it."""
    if plan.recipe.needs_data and plan.checkpoint.config.get("is_encoder_decoder"):
        return ["it calibrates decoders with tokens, and this model's decoder follows an encoder"]
    return []


def has_own_linears(plan: Plan) -> bool:
    """Return whether the layers are of a subclass of ``nn.Linear`` that multiplies by itself, which
    libraries pass over.
    """
    return plan.checkpoint.config.get("model_type") == "falcon"


@dataclass(frozen=True)
class Group:
    """Modules that share a scheme."""

    scheme: Scheme | None
    """None when they stay in 16 bits."""
    names: tuple[str, ...]
    patterns: tuple[str, ...]
    """Short regular expressions for exactly them, among the names they were chosen from."""


def groups_of(plan: Plan, linears: Iterable[str]) -> list[Group]:
    """Sort ``linears``, the linear modules of the loaded model, into groups of one scheme; what is
    left alone has scheme None.

    A pattern names whole kinds (``.*\\.(q_proj|k_proj|v_proj|qkv_proj)$``) where a kind
    lies in one group, else single modules. The fused names are there because vLLM and SGLang
    match such patterns against their fused layers.
    """
    planned = {module.layer: module.scheme for module in plan.quantized}
    by_scheme: dict[Scheme | None, list[str]] = {}
    kinds: dict[str, set[Scheme | None]] = {}
    for name in linears:
        scheme = planned.get(name)
        by_scheme.setdefault(scheme, []).append(name)
        kinds.setdefault(last_part(name), set()).add(scheme)
    whole = {kind for kind, schemes in kinds.items() if len(schemes) == 1}
    return [
        Group(scheme, tuple(names), tuple(_patterns_of(names, whole)))
        for scheme, names in by_scheme.items()
    ]


def _patterns_of(names: Sequence[str], whole: Collection[str]) -> Iterator[str]:
    """Yield regular expressions for ``names``; of the kinds in ``whole`` they hold every layer."""
    kinds = [kind for kind in dict.fromkeys(map(last_part, names)) if kind in whole]
    fused = [kind for kind, parts in FUSED.items() if set(kinds).issuperset(parts)]
    if kinds:
        yield rf"(?:.*\.)?({'|'.join([*kinds, *fused])})$"
    for name in names:
        if last_part(name) not in whole:
            yield name.replace(".", r"\.") + "$"
