"""From a model and a method to a checked checkpoint: `prepare` decides everything, `run` has one
worker do it and publishes what was verified.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qtool import __version__
from qtool.backends import Job, check_backend, load_backend, version_of
from qtool.backends.modelopt_state import check_state, state_recipe
from qtool.backends.worker import run_job
from qtool.calibration import CalibrationSpec, check_source
from qtool.checkpoint import (
    Checkpoint,
    Staging,
    digest_files,
    open_checkpoint,
    resolve_model,
    stage_output,
)
from qtool.checkpoint.aux_files import MANIFEST, MANIFEST_VERSION, finish_files, write_json
from qtool.devices import check_device_name
from qtool.errors import (
    BackendFailed,
    InputRefused,
    OutputTaken,
    ResourceError,
    UsageError,
)
from qtool.events import (
    CalibrationEvent,
    Event,
    NoteEvent,
    OnEvent,
    StageEvent,
    StateSavedEvent,
    ignore_event,
)
from qtool.formats import check_values, detect
from qtool.options import QuantizeOptions, make_options
from qtool.plan import Plan, make_plan
from qtool.recipe import Auto, Recipe, load_recipe
from qtool.sizes import format_size


@dataclass(frozen=True)
class Request:
    """One run, decided: the plan is made, the backend accepts it, the data can be read. Nothing has
    been written.
    """

    plan: Plan
    output: Path
    device: str
    calibration: CalibrationSpec | None
    overwrite: bool
    trust_remote_code: bool
    state_save: Path | None
    state_restore: Path | None
    backend_python: str
    notes: tuple[str, ...] = ()

    @property
    def log(self) -> Path:
        """The file beside the output that takes what the library prints."""
        return self.output.with_name(f"{self.output.name}.qtool.log")

    def to_dict(self) -> dict[str, Any]:
        """Return the plan and where it would go, for ``--json``."""
        return {**self.plan.to_dict(), "output": str(self.output), "device": self.device}


@dataclass(frozen=True)
class QuantizeResult:
    """What a run wrote: ``output`` is complete, checked, and described by its manifest."""

    output: Path
    log: Path
    method: str
    backend: str
    quantized_modules: int
    bytes_before: int
    bytes_after: int
    seconds: float
    calibration: Mapping[str, Any] | None

    def summary(self) -> str:
        """Return the result in a few lines."""
        lines = [
            f"{self.output}: {self.method} by {self.backend}, {self.quantized_modules} modules "
            f"quantized in {self.seconds:.1f} s",
            f"size: {format_size(self.bytes_before)} -> {format_size(self.bytes_after)} "
            f"({self.bytes_after / self.bytes_before:.0%})",
        ]
        if self.calibration:
            data = self.calibration
            of = f" of {data['asked']} asked for" if data["asked"] != data["used"] else ""
            lines.append(
                f"calibration: {data['used']} samples{of}, {data['tokens']:,} tokens, "
                f"{data['truncated']} truncated, {data['dropped']} dropped"
            )
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Return the result for ``--json``."""
        return {
            key: str(value) if isinstance(value, Path) else value
            for key, value in vars(self).items()
        }


def quantize(
    model_path: str | os.PathLike[str], *, on_event: OnEvent = ignore_event, **options: object
) -> QuantizeResult:
    """Quantize a model and write a complete checkpoint folder.

    Args:
        model_path: a checkpoint folder or a Hub name.
        on_event: gets what the run reports: an `Event` of `qtool.events`.
        options: the fields of `qtool.options.QuantizeOptions`.
    Raises: QtoolError. Nothing is left behind then but, when a library failed, its log.
    """
    return run(prepare(model_path, make_options(QuantizeOptions, options)), on_event=on_event)


def prepare(
    model_path: str | os.PathLike[str], options: QuantizeOptions, *, need_data: bool = True
) -> Request:
    """Decide a run from headers and configs alone, refusing what cannot work. Writes nothing and
    imports no torch.

    Without ``need_data``, calibration data may be missing, as for a dry run.
    """
    recipe = _recipe(options)
    save = options.checkpoint_save_path
    restore = options.checkpoint_restore_path
    if (save or restore) and recipe.backend != "modelopt":
        message = f"only ModelOpt keeps calibrated states, and this run is by {recipe.backend}"
        raise UsageError("E_STATE_BACKEND", message, hint="add --backend modelopt")
    device = check_device_name(options.device)
    calibration = None
    if recipe.needs_data and not restore and (need_data or recipe.calibration.source):
        calibration = _calibration(recipe)
    source = resolve_model(
        os.fspath(model_path), revision=options.revision, with_code=options.trust_remote_code
    )
    plan = make_plan(open_checkpoint(source), recipe)
    check_backend(plan)
    notes = []
    context = _context_length(plan.checkpoint)
    if calibration and context and context < calibration.seq_len:
        notes.append(
            f"samples are cut at {context} tokens, the model's context, not at "
            f"{calibration.seq_len}"
        )
        calibration = replace(calibration, seq_len=context)
    if restore:
        check_state(os.fspath(restore), plan, trust_pickle=options.trust_pickle)
    output = f"{plan.checkpoint.name}-{recipe.name}" if options.output is None else options.output
    return Request(
        plan=plan,
        output=Path(output).absolute(),
        device=device,
        calibration=calibration,
        overwrite=options.overwrite,
        trust_remote_code=options.trust_remote_code,
        state_save=_absolute(save),
        state_restore=_absolute(restore),
        notes=tuple(notes),
        backend_python=_python(options.backend_python or sys.executable),
    )


def _context_length(checkpoint: Checkpoint) -> int:
    """Return the length of the model's context; 0 when its config does not say."""
    length = checkpoint.text_config.get("max_position_embeddings")
    return length if isinstance(length, int) and length > 0 else 0


def _absolute(path: str | os.PathLike[str] | None) -> Path | None:
    return Path(path).absolute() if path else None


def _python(name: str) -> str:
    # a link in an environment must stay a link
    return os.path.abspath(name) if os.sep in name else name  # noqa: PTH100


def run(request: Request, *, on_event: OnEvent = ignore_event) -> QuantizeResult:
    """Run a prepared request in a worker, verify what it wrote, and put it in its place."""
    start = time.monotonic()
    plan = request.plan
    source = plan.checkpoint.path
    need_bytes = int(plan.bytes_after * 1.05) + (
        plan.bytes_before if plan.recipe.backend == "gptqmodel" else 0
    )
    with ExitStack() as stack:
        inputs = [
            source,
            *_paths(
                request.state_restore,
                Path(request.calibration.source) if request.calibration else None,
            ),
        ]
        others = [*inputs, *_paths(request.state_save)]
        staging = stack.enter_context(
            stage_output(
                request.output, inputs=others, overwrite=request.overwrite, need_bytes=need_bytes
            )
        )
        state = None
        if request.state_save:
            state = stack.enter_context(
                stage_output(
                    request.state_save,
                    inputs=inputs,
                    overwrite=request.overwrite,
                    need_bytes=plan.bytes_before,
                )
            )
        log = stack.enter_context(_kept_log(staging, request.log))
        helpers = stack.enter_context(ThreadPoolExecutor(max_workers=2))
        stop = threading.Event()
        stack.callback(stop.set)  # a run that ends early does not wait for its digests
        # while the worker is busy
        source_digests = helpers.submit(digest_files, plan.checkpoint.weight_files, stop=stop)
        calibration: dict[str, Any] | None = None

        def handle(event: Event) -> None:
            nonlocal calibration
            if isinstance(event, CalibrationEvent):
                calibration = {
                    **event.report,
                    "asked": request.calibration.num_samples if request.calibration else 0,
                }
            if isinstance(event, StateSavedEvent) and state is not None:
                state.publish()  # at once: what follows may fail, and calibration was the long part
            on_event(event)

        for note in request.notes:
            on_event(NoteEvent(note))
        job = Job(
            model=str(source.resolve()),
            recipe=plan.recipe.to_dict(),
            output=str(staging.checkpoint),
            scratch=str(staging.scratch),
            device=request.device,
            calibration=request.calibration,
            trust_remote_code=request.trust_remote_code,
            state_save=str(state.checkpoint) if state else None,
            state_restore=str(request.state_restore) if request.state_restore else None,
        )
        versions = run_job(
            job,
            plan,
            log=log,
            on_event=handle,
            python=request.backend_python,
            keep_open=staging.lock_fd,
        )
        on_event(StageEvent("checking the result"))
        finish_files(source, staging.checkpoint)
        # hashing, writing out and checking share the time
        digests = helpers.submit(digest_files, staging.files())
        flushed = helpers.submit(staging.flush)
        written = verify(plan, staging.checkpoint)
        flushed.result()  # the system tells of a write that failed once
        manifest = _manifest(plan, calibration, versions, source_digests.result(), digests.result())
        write_json(staging.checkpoint / MANIFEST, manifest)
        staging.publish()
    library = load_backend(plan.recipe.backend).distribution
    return QuantizeResult(
        output=request.output,
        log=request.log,
        method=plan.recipe.name,
        backend=f"{library} {versions[library]}",
        quantized_modules=len(plan.quantized),
        bytes_before=plan.bytes_before,
        bytes_after=written.size_bytes,
        seconds=time.monotonic() - start,
        calibration=calibration,
    )


def _recipe(options: QuantizeOptions) -> Recipe:
    """Return the recipe that method, recipe or state name, with the changes that the options ask
    for.
    """
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


@contextmanager
def _kept_log(staging: Staging, place: Path) -> Iterator[Path]:
    """Give the run's log; it goes to ``place`` when the run ended well or a library failed, and
    away when it was refused or interrupted.
    """
    log = staging.root / "log"
    try:
        yield log
    except (InputRefused, UsageError, OutputTaken):
        raise
    except Exception as error:
        if log.exists():
            log.replace(place)
            if isinstance(error, BackendFailed | ResourceError):
                error.hint = "; ".join(
                    filter(None, (error.hint, f"what the library said is in {place}"))
                )
        raise
    log.replace(place)


def _paths(*paths: Path | None) -> list[Path]:
    return [path for path in paths if path is not None]


def verify(plan: Plan, folder: Path) -> Checkpoint:
    """Open the checkpoint in ``folder`` and hold it against the plan.

    Raises: BackendFailed, when a module has not the planned scheme, one was changed that should not
        be, or a value is NaN or an impossible scale.
    """
    try:
        written = open_checkpoint(folder)
        layout = detect(written)
        found = {name: module.scheme for name, module in layout.modules.items()} if layout else {}
        problems = [*_differences(plan, found), *check_values(written, layout)]
        if plan.recipe.kv_cache and (layout is None or layout.kv_cache != plan.recipe.kv_cache):
            problems.append(
                f"the KV cache is {layout.kv_cache if layout else None}, not {plan.recipe.kv_cache}"
            )
    except InputRefused as error:
        problems = [error.message]
    if problems:
        first = problems[0].replace(str(folder), "output")
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        message = (
            f"{version_of(load_backend(plan.recipe.backend))} wrote a checkpoint that is not what "
            f"was asked for: {first}{more}"
        )
        raise BackendFailed(
            "E_VERIFY", message, hint="nothing was published; try another --backend"
        )
    return written


def _differences(plan: Plan, found: Mapping[str, Any]) -> Iterator[str]:
    searched = plan.recipe.steps(Auto)
    for module in plan.quantized:
        scheme = found.get(module.name)
        if searched and scheme in (None, *searched[0].candidates):
            continue
        if scheme is None:
            yield (
                f"`{module.name}` was to become {module.scheme and module.scheme.name} and was "
                "left in 16 bits"
            )
        elif scheme != module.scheme:
            yield (
                f"`{module.name}` was to become {module.scheme and module.scheme.name} and is "
                f"{scheme.name}"
            )
    for module in plan.left_alone:
        if module.name in found:
            yield (
                f"`{module.name}` was to be left alone ({module.reason}) and is "
                f"{found[module.name].name}"
            )
    planned = {module.name for module in plan.modules}
    for name in found:
        if name not in planned:
            yield f"`{name}` is {found[name].name} and is no linear module of the source"


def _manifest(
    plan: Plan,
    calibration: dict[str, Any] | None,
    versions: dict[str, str],
    source: dict[str, Any],
    files: dict[str, Any],
) -> dict[str, Any]:
    """Return what a reader needs to trust the checkpoint and to make it again; no path, no user, no
    time.
    """
    return {
        "manifest_version": MANIFEST_VERSION,
        "model": plan.checkpoint.name,
        "recipe": {
            key: value for key, value in plan.recipe.to_dict().items() if key != "calibration"
        },
        "calibration": calibration
        and {**calibration, "source": Path(str(calibration["source"])).name},
        "versions": {"qtool": __version__, **versions},
        "source_files": source,
        "files": files,
    }
