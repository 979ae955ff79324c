"""Serving by another engine: check that it loads the checkpoint, then become its server process.

qtool has no code for several GPUs or machines; vLLM and SGLang have.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import NoReturn

from qtool import formats
from qtool.checkpoint import Checkpoint, open_checkpoint, resolve_model
from qtool.checkpoint.temporary import remove_temporary_folders
from qtool.errors import CheckpointRefused, ResourceError
from qtool.inspection import inspect
from qtool.inspection.engines import EngineReport
from qtool.inspection.engines.rules import numbers
from qtool.runtime.online import schemes_to_run
from qtool.serve.engine_command import (
    Command,
    make_command,
    targets,
    visible_device,
)
from qtool.serve.engine_install import Installation, find_installation
from qtool.serve.settings import ServeOptions, shown_name

REASONS = 3


def prepare(
    engine: str, options: ServeOptions, extra: Sequence[str] = (), *, dry_run: bool = False
) -> Command:
    """Return the command by which ``engine`` serves the checkpoint, having checked that it loads.

    Args:
        engine: its name.
        options: what was given to ``qtool serve``.
        extra: the engine's own arguments. They stand last, so that they win.
        dry_run: the engine need not be installed.
    Raises: UsageError, for an option that the engine has no counterpart of; CheckpointRefused, with
        the reasons, for a checkpoint that it does not load; ResourceError, when it is not
        installed.
    """
    # wrong options are reported before a download
    make_command(engine, replace(options, quantization=None), extra)
    folder = resolve_model(
        options.model_path, revision=options.revision, with_code=options.trust_remote_code
    )
    checkpoint = open_checkpoint(folder)
    installed = find_installation(engine, options.engine_python)
    report = _check(checkpoint, engine, installed.version, options)
    override = None
    if options.quantization:
        override = _override(checkpoint, options.quantization)
        if _is_quantized(checkpoint):
            options = replace(options, quantization=None)
    # of the Hub: the folder that was checked is served; clients see no paths
    name = options.served_model_name or shown_name(options.model_path)
    options = replace(options, model_path=str(checkpoint.source), served_model_name=name)
    command = make_command(engine, replace(options, revision=None), extra, override=override)
    warnings = _warnings(report)
    warnings += _check_installed(engine, installed, dry_run=dry_run)
    return replace(command, warnings=(*warnings, *command.warnings))


def hand_over(command: Command) -> NoReturn:
    """Become the process that ``command`` describes: same process id, nothing of this one left."""
    remove_temporary_folders()
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(command.arguments[0], command.arguments, {**os.environ, **command.environment})


def _check(
    checkpoint: Checkpoint, engine: str, version: str | None, options: ServeOptions
) -> EngineReport:
    """Return what ``engine``, in the ``version`` that is installed, does with the checkpoint on
    this machine's GPU.

    Raises: CheckpointRefused, when it does not load it.
    """
    gpu = None if options.device == "cpu" else _gpu(options.device or "auto")
    ask = partial(_ask, checkpoint, gpu=gpu, ranks=options.tp or 1)
    report = ask(engine, version=version)
    if report.loads:
        return report
    others = [other for other in targets() if other != engine and ask(other).loads]
    hints = [f"{other} loads it: --engine {other}" for other in others]
    hints.append(
        f"`qtool inspect --model-path {shlex.quote(options.model_path)} --engine {engine} --tp "
        f"{options.tp or 1}` says more"
    )
    where = f" on {gpu}" if gpu else ""
    raise _refusal(report, f"{engine} {report.version}{where}", options.model_path, hints)


def _refusal(
    report: EngineReport, where: str, model_path: str, hints: Sequence[str]
) -> CheckpointRefused:
    """Return the error that gives the first reasons of ``report``, and hints after theirs."""
    reasons = [finding for finding in report.findings if finding.severity == "refused"]
    shown = reasons[:REASONS]
    messages = [finding.message for finding in shown]
    if len(reasons) > REASONS:
        messages.append(f"and {len(reasons) - REASONS} more")
    theirs = dict.fromkeys(finding.hint for finding in shown if finding.hint)
    return CheckpointRefused(
        "E_ENGINE_REFUSES",
        f"{where} does not load {model_path}: {'; '.join(messages)}",
        hint="; ".join([*theirs, *hints]),
    )


def _ask(
    checkpoint: Checkpoint, engine: str, *, gpu: str | None, ranks: int, version: str | None = None
) -> EngineReport:
    """Return what ``engine`` does with the checkpoint."""
    report = inspect(
        checkpoint, engine=engine, engine_version=version, gpu=gpu, tensor_parallel=ranks
    ).engine
    assert report is not None  # it is there when an engine is asked for
    return report


def _warnings(report: EngineReport) -> list[str]:
    return [
        finding.message + (f"; {finding.hint}" if finding.hint else "")
        for finding in report.findings
        if finding.severity == "warning" or finding.code == "N_ENGINE_VERSION"
    ]


def _is_quantized(checkpoint: Checkpoint) -> bool:
    layout = formats.detect(checkpoint)
    return layout is not None and bool(layout.modules)


def _override(checkpoint: Checkpoint, name: str) -> str | None:
    """Return ``name`` where it rounds the inputs of a quantized checkpoint otherwise; None where it
    is what an engine reads from the checkpoint, or the checkpoint is not quantized.

    Raises: UsageError, for a name that does not fit the checkpoint.
    """
    layout = formats.detect(checkpoint)
    schemes = schemes_to_run(checkpoint, layout, name)
    if layout is None or not layout.modules:
        return None
    same = schemes == {layer: module.scheme for layer, module in layout.modules.items()}
    return None if same else name


def _check_installed(engine: str, installed: Installation, *, dry_run: bool) -> list[str]:
    """Return a warning when ``engine`` is not installed, and it need not be.

    Raises: ResourceError, when it must be.
    """
    if installed.is_there:
        return []
    message = f"{engine} is not installed in the environment of {installed.python}"
    folder = f"{engine}-env"
    hint = (
        f"make an environment for it: `python3 -m venv {folder} && {folder}/bin/pip install "
        f"{engine}=={targets()[engine].version}`, and add --engine-python {folder}/bin/python"
    )
    if not dry_run:
        raise ResourceError("E_NO_ENGINE_PACKAGE", message, hint=hint)
    return [f"{message}: {hint}"]


def _gpu(device: str) -> str | None:
    """Return the architecture of the GPU that would run it, e.g. ``9.0``; None where the driver
    does not say.
    """
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    shown = (
        visible_device(device)
        if device.startswith("cuda:")
        else os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0]
    )
    query = [
        tool,
        "--query-gpu=compute_cap",
        "--format=csv,noheader",
        *(["-i", shown] if shown else []),
    ]
    try:
        answer = subprocess.run(
            query, capture_output=True, text=True, timeout=10, check=True
        ).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return None
    return answer[0] if answer and numbers(answer[0]) else None
