"""`Request`: one run, decided from headers and configs alone."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from qtool.architecture import check_model_and_mtp, map_names
from qtool.backends import (
    check_backend,
    check_device,
    check_model_code,
    check_python,
    host_memory_bytes,
)
from qtool.backends.modelopt_state import check_state, state_recipe
from qtool.calibration import CalibrationSpec, check_source
from qtool.checkpoint import (
    Checkpoint,
    SourceFiles,
    check_output,
    open_checkpoint,
    resolve_model,
    source_files,
)
from qtool.checkpoint.strict_json import JsonDict
from qtool.devices import check_device_name, gpu_count
from qtool.errors import ANY_FILE, CheckpointRefused, UsageError, file_errors
from qtool.formats import detect
from qtool.options import QuantizeOptions, no_gate
from qtool.plan import Plan, make_plan
from qtool.recipe import Recipe, load_recipe


@dataclass(frozen=True)
class Request:
    """One run that has been checked and not begun; nothing has been written."""

    plan: Plan
    """What each module becomes; the backend accepts it."""

    source: SourceFiles
    """The files of the model, as they were when the plan was made."""

    output: Path
    """The folder to write."""

    device: str
    """auto, cpu, cuda or cuda:<n>."""

    calibration: CalibrationSpec | None
    """The calibration data, which can be read; None when there is none."""

    overwrite: bool
    """Whether an existing output is replaced."""

    trust_remote_code: bool
    """Whether code that comes with the checkpoint may run."""

    state_save: Path | None
    """Where ModelOpt's calibrated state is saved."""

    state_restore: Path | None
    """Where ModelOpt's calibrated state is loaded from."""

    backend_python: str
    """The interpreter of the worker."""

    gate: tuple[str, ...] = ()
    """Limits on the quality of the result; empty: it is not measured."""

    gate_data: str = ""
    """The texts that the gate measures on."""

    keep_failed: bool = False
    """Whether an output that fails the gate is kept."""

    notes: tuple[str, ...] = ()
    """What the user should know of the run."""

    @property
    def log(self) -> Path:
        """The log file next to the output, with all that the library prints."""
        return self.output.with_name(f"{self.output.name}.qtool.log")

    @property
    def inputs(self) -> list[Path]:
        """The files and folders that the run reads."""
        data = Path(self.calibration.source) if self.calibration else None
        return [path for path in (self.plan.checkpoint.path, self.state_restore, data) if path]

    @property
    def checkpoint_inputs(self) -> list[Path]:
        """The inputs, and the folder of the saved state, which the output must not overlap."""
        return [*self.inputs, *([self.state_save] if self.state_save else [])]

    def check_outputs(self) -> None:
        """Check that the output, the log and the saved state can be written, by `check_output`."""
        check_output(
            self.output,
            inputs=self.checkpoint_inputs,
            overwrite=self.overwrite,
            names=self.source.aux_names,
            log=self.log,
        )
        if self.state_save:
            check_output(self.state_save, inputs=self.inputs, overwrite=self.overwrite)

    def to_dict(self) -> JsonDict:
        """Return the plan and where it would go, for ``--json``."""
        return {
            **self.plan.to_dict(),
            "output": str(self.output),
            "device": self.device,
            "host_memory_bytes": host_memory_bytes(self.plan),
        }


@file_errors(reading=[ANY_FILE])
def prepare(
    model_path: str | os.PathLike[str], options: QuantizeOptions, *, need_data: bool = True
) -> Request:
    """Decide a run from headers and configs alone. Writes nothing, and imports torch only for
    architectures about which transformers must be asked.

    Args:
        model_path: a checkpoint folder or a Hub name.
        options: what was asked for.
        need_data: whether calibration data must be given; a dry run does without.
    Raises: QtoolError, for what cannot work.
    """
    recipe = _recipe(options)
    gate = _gate(options, recipe)
    restore = options.checkpoint_restore_path
    _check_state_backend(options, recipe)
    device = check_device_name(options.device)
    calibration = None
    if recipe.needs_data and not restore and (need_data or recipe.calibration.source):
        calibration = _calibration(recipe)
    source = resolve_model(
        os.fspath(model_path), revision=options.revision, with_code=options.trust_remote_code
    )
    checkpoint = open_checkpoint(source)
    _check_not_gguf(checkpoint)
    plan = make_plan(checkpoint, recipe, map_names(checkpoint))
    check_backend(plan)
    files = source_files(plan.checkpoint)
    python = _python(options.backend_python or sys.executable)
    check_python(python, recipe.backend)
    check_model_code(plan.checkpoint, trusted=options.trust_remote_code)
    if device.startswith("cuda") or "cpu" not in recipe.runs_on:
        check_device(device, recipe, gpus=gpu_count())
    mtp_problem = check_model_and_mtp(plan.checkpoint, detect(plan.checkpoint), deep=True)
    notes = [*files.notes, *filter(None, [plan.mostly_unquantized, mtp_problem])]
    context = _context_length(plan.checkpoint)
    if calibration and 0 < context < calibration.seq_len:
        notes.append(
            f"samples are cut at {context} tokens, the model's context, not at "
            f"{calibration.seq_len}"
        )
        calibration = replace(calibration, seq_len=context)
    if restore:
        check_state(os.fspath(restore), plan, trust_pickle=options.trust_pickle)
    request = Request(
        plan=plan,
        source=files,
        output=_output(options, plan),
        device=device,
        calibration=calibration,
        overwrite=options.overwrite,
        trust_remote_code=options.trust_remote_code,
        state_save=_absolute(options.checkpoint_save_path),
        state_restore=_absolute(restore),
        notes=tuple(notes),
        backend_python=python,
        gate=gate,
        gate_data=options.gate_data or "",
        keep_failed=options.keep_failed,
    )
    request.check_outputs()
    return request


def _check_not_gguf(checkpoint: Checkpoint) -> None:
    if checkpoint.gguf_file:
        raise CheckpointRefused(
            "E_GGUF",
            f"{checkpoint.name} is a GGUF file, and quantization libraries read safetensors",
            hint="`qtool export --to bf16` writes it as safetensors; better is the model that it "
            "was made of",
        )


def _check_state_backend(options: QuantizeOptions, recipe: Recipe) -> None:
    states = (options.checkpoint_save_path, options.checkpoint_restore_path)
    if any(states) and recipe.backend != "modelopt":
        message = f"only ModelOpt keeps calibrated states, and this run is by {recipe.backend}"
        raise UsageError("E_STATE_BACKEND", message, hint="add --backend modelopt")


def _recipe(options: QuantizeOptions) -> Recipe:
    """Return the recipe that the options name, with the changes that they ask for."""
    recipe = _named_recipe(options)
    group_size = options.group_size
    scheme = None
    if group_size is not None:
        if recipe.scheme is None:
            raise UsageError(
                "E_GROUP_SIZE",
                f"`{recipe.name}` quantizes no weights",
                hint="leave --group-size out",
            )
        scheme = recipe.scheme.with_group_size(group_size).to_dict()
    ignore = [options.ignore] if isinstance(options.ignore, str) else options.ignore
    data = {
        "source": options.calibration,
        "text_column": options.text_column,
        "num_samples": options.num_samples,
        "seq_len": options.seq_len,
        "batch_size": options.batch_size,
        "pack": options.pack,
    }
    given = {name: value for name, value in data.items() if value is not None}
    return recipe.changed(
        backend=options.backend,
        kv_cache=options.kv_cache,
        lm_head=options.lm_head,
        seed=options.seed,
        ignore=[*recipe.ignore, *ignore] if ignore else None,
        scheme=scheme,
        algorithm=["rtn"] if options.fast else None,
        calibration={**recipe.calibration.model_dump(), **given},
    )


def _gate(options: QuantizeOptions, recipe: Recipe) -> tuple[str, ...]:
    """Return the limits on the result: the recipe's, then those of the options.

    Raises: UsageError, when there are some and no texts to measure on.
    """
    given = (options.gate,) if isinstance(options.gate, str) else tuple(options.gate)
    limits = (*recipe.gate, *given)
    if options.keep_failed and not limits and not options.gate_data:
        raise no_gate("keep_failed")
    if options.gate_data and not limits:
        return ("default",)
    if limits and not options.gate_data:
        raise UsageError(
            "E_GATE_DATA",
            "a gate needs texts to measure on, and none were given",
            hint="--gate-data FILE.jsonl with texts that are not those of the calibration",
        )
    return limits


def _named_recipe(options: QuantizeOptions) -> Recipe:
    """Return the recipe that the options name, as it stands.

    Raises: UsageError, when they name none or two.
    """
    if options.method and options.recipe:
        raise UsageError(
            "E_METHOD_TWICE",
            "a method and a recipe were given",
            hint="give one; a recipe's file is named by --recipe",
        )
    if isinstance(options.recipe, Recipe):
        return options.recipe
    name = options.recipe or options.method
    if name:
        return load_recipe(name)
    if options.checkpoint_restore_path:
        state = os.fspath(options.checkpoint_restore_path)
        recipe = state_recipe(state, trust_pickle=options.trust_pickle)
        if recipe is not None:
            return recipe
    raise UsageError(
        "E_NO_METHOD",
        "no method was given",
        hint="`qtool quantize --list` shows them; a usual start is modelopt_fp8",
    )


def _calibration(recipe: Recipe) -> CalibrationSpec:
    values = recipe.calibration
    if values.source is None:
        hint = (
            "--calibration FILE.jsonl with your own texts, or a Hub data set such as "
            "HuggingFaceH4/ultrachat_200k::train_sft"
        )
        raise UsageError(
            "E_NEEDS_DATA", f"`{recipe.name}` needs calibration data and none was given", hint=hint
        )
    local = Path(values.source)
    spec = CalibrationSpec(
        source=str(local.absolute()) if local.exists() else values.source,
        text_column=values.text_column,
        num_samples=values.num_samples,
        seq_len=values.seq_len,
        seed=recipe.seed,
        pack=values.pack,
        batch_size=values.batch_size,
    )
    check_source(spec)
    return spec


def _context_length(checkpoint: Checkpoint) -> int:
    """Return the length of the model's context; 0 when its config has none."""
    length = checkpoint.text_config.get("max_position_embeddings")
    return length if isinstance(length, int) and length > 0 else 0


def _output(options: QuantizeOptions, plan: Plan) -> Path:
    if options.output is None:
        return Path(f"{plan.checkpoint.name}-{plan.recipe.name}").absolute()
    return Path(options.output).absolute()


def _absolute(path: str | os.PathLike[str] | None) -> Path | None:
    return Path(path).absolute() if path else None


def _python(name: str) -> str:
    # a link in an environment must stay a link
    return os.path.abspath(name) if os.sep in name else name  # noqa: PTH100
