"""Serving by another engine: is the checkpoint one it loads, what are our options there, and this
process becomes its server.

`flags.yaml` beside this file says what stands for each option. qtool has no code for several GPUs
or machines: those who need them come here.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

import yaml
from pydantic import BaseModel, ConfigDict, field_validator, model_validator

from qtool import formats
from qtool.checkpoint import Checkpoint, open_checkpoint, resolve_model
from qtool.errors import CheckpointRefused, ResourceError, UsageError, nearest
from qtool.inspection import inspect
from qtool.inspection.engines import EngineReport
from qtool.inspection.engines.rules import numbers
from qtool.runtime.online import flag_named, schemes_to_run

FLAGS = Path(__file__).with_name("flags.yaml")
SECRETS = ("--api-key", "--admin-api-key", "--hf-token", "VLLM_API_KEY")
HIDDEN = "***"
REASONS = 3
KEPT_FOR_CACHE = (
    0.3  # of a GPU's memory, when the number of GPUs is guessed: KV cache, activations, graphs
)


class Counterpart(BaseModel):
    """What stands for one of our options in an engine; `flags.yaml` says what each field means."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    flag: str = ""
    positional: bool = False
    environment: str = ""
    values: Mapping[str, str | None] | None = None
    beside: tuple[str, ...] = ()
    default: str = ""
    whole: bool = False
    since: str = ""
    note: str = ""
    dropped: str = ""
    refused: str = ""

    @field_validator("values", mode="before")
    @classmethod
    def _same_names(cls, values: Any) -> Any:
        return {value: value for value in values} if isinstance(values, list) else values

    @model_validator(mode="after")
    def _says_something(self) -> Counterpart:
        passed = self.flag or self.positional or self.environment or self.values
        if sum(map(bool, (passed, self.dropped, self.refused))) != 1:
            raise ValueError("an option is passed on, dropped or refused")
        return self


class Target(BaseModel):
    """One engine's command line, read from its ``version``: what starts it, and what stands for our
    options, in the order it gets them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: str
    launch: tuple[str, ...]
    options: Mapping[str, Counterpart]


@dataclass(frozen=True)
class Command:
    """A process that serves: what to run, what to add to the environment, and what its user should
    know first.
    """

    engine: str
    arguments: tuple[str, ...] = field(repr=False)
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)
    warnings: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Return the command as a shell takes it, without its secrets."""
        variables = [
            f"{name}={HIDDEN if name in SECRETS else shlex.quote(value)}"
            for name, value in self.environment.items()
        ]
        return " ".join(
            [
                *variables,
                *(
                    HIDDEN if word == HIDDEN else shlex.quote(word)
                    for word in _without_secrets(self.arguments)
                ),
            ]
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the command for ``--json``, without its secrets."""
        variables = {
            name: HIDDEN if name in SECRETS else value for name, value in self.environment.items()
        }
        words = list(_without_secrets(self.arguments))
        return {
            "engine": self.engine,
            "arguments": words,
            "environment": variables,
            "command": str(self),
            "warnings": list(self.warnings),
        }


@cache
def targets() -> Mapping[str, Target]:
    """Return the engines that a process can be handed to, by name, which is also that of the
    package.
    """
    return {
        name: Target.model_validate(data)
        for name, data in yaml.safe_load(FLAGS.read_bytes()).items()
    }


def prepare(
    engine: str, options: Mapping[str, object], extra: Sequence[str] = (), *, dry_run: bool = False
) -> Command:
    """Return the command by which ``engine`` serves the checkpoint as ``options`` ask, having
    checked that it will load it.

    Args:
        options: ours by name, e.g. ``mem_fraction_static``; None and False are options that were
            not given. ``model_path`` must be there.
        extra: the engine's own arguments. They stand last, so that they win.
        dry_run: the engine need not be installed.
    Raises: UsageError, for what cannot be said to the engine; CheckpointRefused, with the reasons,
        for a checkpoint it does not load;
        ResourceError, when it is not installed.
    """
    settings = _one_quantization(options)
    # what is wrong with the options themselves is said before a download
    make_command(engine, {**settings, "quantization": None}, extra)
    model_path, revision = str(settings["model_path"]), _text(settings.pop("revision", None))
    folder = resolve_model(
        model_path, revision=revision, with_code=bool(settings.get("trust_remote_code"))
    )
    checkpoint = open_checkpoint(folder)
    # of the Hub: what was checked is what is served, under the name that was asked for
    if folder != Path(model_path):
        settings |= {
            "model_path": str(folder),
            "served_model_name": settings.get("served_model_name") or model_path,
        }
    report = _check(checkpoint, model_path, engine, settings)
    if settings.get("quantization"):
        settings |= _quantization(checkpoint, str(settings["quantization"]))
    command = make_command(engine, settings, extra)
    warnings = [
        finding.message + (f"; {finding.hint}" if finding.hint else "")
        for finding in report.findings
        if finding.severity == "warning" or finding.code == "N_ENGINE_VERSION"
    ]
    if not _is_installed(engine):
        message, hint = (
            f"{engine} is not installed in the environment of {sys.executable}",
            f"pip install {engine}",
        )
        if not dry_run:
            raise ResourceError("E_NO_ENGINE_PACKAGE", message, hint=hint)
        warnings.append(f"{message}: {hint}")
    return Command(engine, command.arguments, command.environment, (*warnings, *command.warnings))


def make_command(engine: str, options: Mapping[str, object], extra: Sequence[str] = ()) -> Command:
    """Return the command that says ``options`` to ``engine``; looks at no checkpoint. See
    `prepare`.

    ``quantization`` and ``torchao_config`` mean a plain model here, ``override`` a quantized one
    whose inputs are rounded otherwise.

    Raises: UsageError, for an option that the engine has nothing for and that is no mere comfort.
    """
    target = _target(engine)
    settings = {
        name: value
        for name, value in _one_quantization(options).items()
        if value is not None and value is not False
    }
    _check_nodes(settings)
    environment, warnings = _pick_gpu(settings), []
    if engine == "vllm":
        warnings += _as_vllm_counts(settings)
    arguments = [sys.executable, *target.launch]
    for name, counterpart in target.options.items():
        if name not in settings and not counterpart.default:
            continue
        value = settings.pop(name, counterpart.default)
        if counterpart.refused:
            raise _refused(engine, name, value, counterpart.refused)
        if counterpart.dropped:
            warnings.append(f"{_ours(name)} is left out: {counterpart.dropped}")
        elif (
            counterpart.since
            and (version := _installed_version(engine))
            and numbers(version) < numbers(counterpart.since)
        ):
            warnings.append(
                f"{_ours(name)} is left out: {engine} {version} has no {counterpart.flag}"
            )
        elif (theirs := _theirs(engine, name, value, counterpart)) is not None:
            if counterpart.environment:
                environment[counterpart.environment] = theirs
            arguments += _words(counterpart, theirs, is_switch=value is True)
            warnings += [f"{_ours(name)}: {counterpart.note}"] if counterpart.note else []
    warnings += [f"{_ours(name)} is left out: {engine} has nothing like it" for name in settings]
    return Command(engine, (*arguments, *extra), environment, tuple(warnings))


def hand_over(command: Command) -> NoReturn:
    """Become the process that ``command`` describes: same process id, nothing of this one left."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(command.arguments[0], command.arguments, {**os.environ, **command.environment})


def suggestion(
    options: Mapping[str, object], *, size_bytes: int | None = None, gpu_bytes: int | None = None
) -> str:
    """Return the hint for who needs more than one GPU: the command line to type instead.

    Args:
        options: ours by name, as for `prepare`. ``tp`` is kept when it is there.
        size_bytes: of the weights, and gpu_bytes of one GPU's memory; where both are known and
            ``tp`` is not, they give the number of GPUs.
    """
    given = {
        name: value
        for name, value in options.items()
        if value is not None and value is not False and name not in ("model_path", "api_key")
    }
    if not given.get("tp") and size_bytes is not None and gpu_bytes:
        given["tp"] = least_tensor_parallel(size_bytes, gpu_bytes)
    words = ["qtool", "serve", "--model-path", str(options["model_path"]), "--engine", "vllm"]
    for name, value in given.items():
        words += [_ours(name)] if value is True else [_ours(name), str(value)]
    key = " --api-key ..." if options.get("api_key") else ""
    return (
        f"hand it to an engine that runs on several GPUs: `{shlex.join(words)}{key}`, or --engine "
        "sglang"
    )


def least_tensor_parallel(size_bytes: int, gpu_bytes: int) -> int:
    """Return the smallest power of two of GPUs that hold ``size_bytes`` of weights and leave room
    for the KV cache.
    """
    return 1 << max(0, math.ceil(math.log2(size_bytes / (gpu_bytes * (1 - KEPT_FOR_CACHE)))))


def _target(engine: str) -> Target:
    if engine not in targets():
        known = ("builtin", *targets())
        raise UsageError(
            "E_ENGINE",
            f"`{engine}` is no engine to serve with",
            hint=nearest(engine, known) or f"one of {', '.join(known)}",
        )
    return targets()[engine]


def _one_quantization(options: Mapping[str, object]) -> dict[str, object]:
    named = flag_named(_text(options.get("quantization")), _text(options.get("torchao_config")))
    return {
        **{name: value for name, value in options.items() if name != "torchao_config"},
        "quantization": named and named.lower(),
    }


def _check(
    checkpoint: Checkpoint, model_path: str, engine: str, settings: Mapping[str, object]
) -> EngineReport:
    """Return what ``engine``, in the version that is installed, does with the checkpoint on this
    machine's GPU. Raises: CheckpointRefused.
    """
    ranks = int(str(settings.get("tp") or 1))
    gpu = None if settings.get("device") == "cpu" else _gpu(str(settings.get("device") or "auto"))
    version = _installed_version(engine)

    def ask(name: str, version: str | None = None) -> EngineReport:
        report = inspect(
            checkpoint, engine=name, engine_version=version, gpu=gpu, tensor_parallel=ranks
        ).engine
        assert report is not None  # it is there when an engine is asked for
        return report

    report = ask(engine, version)
    if report.loads:
        return report
    reasons = [finding for finding in report.findings if finding.severity == "refused"]
    hints = [hint for hint in dict.fromkeys(finding.hint for finding in reasons[:REASONS]) if hint]
    hints += [
        f"{other} loads it: --engine {other}"
        for other in targets()
        if other != engine and ask(other).loads
    ]
    hints.append(
        f"`qtool inspect --model-path {shlex.quote(model_path)} --engine {engine} --tp {ranks}` "
        "says more"
    )
    where = f"{engine} {report.version}" + (f" on {gpu}" if gpu else "")
    told = [finding.message for finding in reasons[:REASONS]]
    told += [f"and {len(reasons) - REASONS} more"] if len(reasons) > REASONS else []
    message = f"{where} does not load {model_path}: {'; '.join(told)}"
    raise CheckpointRefused("E_ENGINE_REFUSES", message, hint="; ".join(hints))


def _quantization(checkpoint: Checkpoint, name: str) -> dict[str, object]:
    """Return what is left to say of ``--quantization``: all for a plain model, nothing where it is
    what an engine reads from the checkpoint.
    """
    layout = formats.detect(checkpoint)
    schemes = schemes_to_run(checkpoint, layout, name)
    if layout is None or not layout.modules:
        return {}
    same = schemes == {layer: module.scheme for layer, module in layout.modules.items()}
    return {"quantization": None, "override": None if same else name}


def _check_nodes(settings: Mapping[str, object]) -> None:
    nodes, rank = (
        int(str(settings.get(name, default))) for name, default in (("nnodes", 1), ("node_rank", 0))
    )
    if not 0 <= rank < nodes:
        raise UsageError(
            "E_NODES",
            f"--node-rank {rank} is none of {nodes} nodes",
            hint="ranks count from 0; --nnodes is the same on all of them",
        )
    if nodes > 1 and "dist_init_addr" not in settings:
        raise UsageError(
            "E_NODES",
            f"--nnodes {nodes} needs an address to meet at",
            hint="--dist-init-addr HOST:PORT, of the node with rank 0",
        )


def _pick_gpu(settings: dict[str, object]) -> dict[str, str]:
    """Return what shows the engine the one GPU that ``--device cuda:<n>`` names."""
    device = str(settings.get("device", "auto"))
    if not device.startswith("cuda:"):
        return {}
    if any(int(str(settings.get(name, 1))) > 1 for name in ("tp", "pp", "dp")):
        hint = "leave --device out; CUDA_VISIBLE_DEVICES says which GPUs there are"
        raise UsageError(
            "E_DEVICE", f"--device {device} is one GPU, and more are asked for", hint=hint
        )
    settings["device"] = "cuda"
    return {"CUDA_VISIBLE_DEVICES": _visible(device)}


def _visible(device: str) -> str:
    """Return the CUDA_VISIBLE_DEVICES of ``device``, ``cuda:<n>``: n counts those that are visible
    now.
    """
    number = device.removeprefix("cuda:")
    shown = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    if not number.isdecimal() or (shown and int(number) >= len(shown)):
        raise UsageError(
            "E_DEVICE",
            f"there is no device `{device}`",
            hint="auto, cpu, cuda or cuda:<n>, counted among CUDA_VISIBLE_DEVICES",
        )
    return shown[int(number)] if shown else number


def _as_vllm_counts(settings: dict[str, object]) -> list[str]:
    """Write the options that vLLM has in other parts or counts otherwise as it has them; return
    what gets lost.
    """
    warnings = []
    if isinstance(address := settings.pop("dist_init_addr", None), str):
        host, _, port = address.rpartition(":") if not address.endswith("]") else (address, "", "")
        settings["master_addr"] = (host or port).strip("[]")
        if host and port:
            settings["master_port"] = port
    if int(str(settings.get("node_rank", 0))) > 0:
        settings["headless"] = True
    running, queued, chunk = (
        settings.get(name)
        for name in ("max_running_requests", "max_queued_requests", "chunked_prefill_size")
    )
    if isinstance(queued, int):  # --max-num-queued-reqs counts those that run too
        if isinstance(running, int):
            settings["max_queued_requests"] = queued + running
        else:
            del settings["max_queued_requests"]
            warnings.append(
                "--max-queued-requests is left out: vLLM counts the running ones too; give "
                "--max-running-requests with it"
            )
    if chunk == -1:
        settings["no_chunked_prefill"] = True
        del settings["chunked_prefill_size"]
    # it refuses to start otherwise
    elif isinstance(chunk, int) and isinstance(running, int) and chunk < running:
        settings["chunked_prefill_size"] = running
        warnings.append(
            f"--chunked-prefill-size {chunk} becomes {running}: vLLM takes no less than "
            "--max-running-requests"
        )
    return warnings


def _theirs(engine: str, name: str, value: object, counterpart: Counterpart) -> str | None:
    if counterpart.whole and isinstance(value, (int, float)):
        return str(math.ceil(value))
    text = str(value)
    if counterpart.values is None:
        return text
    if text.lower() not in counterpart.values:
        raise _refused(engine, name, value, f"{engine} takes {', '.join(counterpart.values)} there")
    return counterpart.values[text.lower()]


def _refused(engine: str, name: str, value: object, reason: str) -> UsageError:
    shown = "--quantization" if name == "override" else _ours(name)
    hint = f"{reason}; leave it out, or serve without --engine {engine}"
    if name == "quantization":
        hint = f"{reason}; or quantize once with `qtool quantize` and serve what it writes"
    return UsageError("E_ENGINE_OPTION", f"{shown} {value} cannot be said to {engine}", hint=hint)


def _words(counterpart: Counterpart, value: str, *, is_switch: bool) -> list[str]:
    if counterpart.positional:
        return [value]
    if not counterpart.flag:
        return []
    if is_switch:
        return [counterpart.flag, *counterpart.beside]
    joined = value.startswith("-")  # argparse would take it for a flag
    return (
        [f"{counterpart.flag}={value}", *counterpart.beside]
        if joined
        else [counterpart.flag, value, *counterpart.beside]
    )


def _ours(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _text(value: object) -> str | None:
    return None if value is None else str(value)


def _without_secrets(arguments: Sequence[str]) -> Iterator[str]:
    """Yield ``arguments`` with what follows a flag of `SECRETS` hidden; there may be several, and
    the flag may be written ``--flag=value``.
    """
    secret, first = False, False
    for word in arguments:
        if word.startswith("-") and not first:
            flag, equals, _ = word.partition("=")
            secret = flag.replace("_", "-") in SECRETS
            first = secret and not equals
            yield f"{flag}={HIDDEN}" if secret and equals else word
        else:
            first = False
            yield HIDDEN if secret else word


def _is_installed(engine: str) -> bool:
    found = importlib.util.find_spec(engine)
    # a folder of that name in the working directory has none
    return found is not None and found.origin is not None


def _installed_version(engine: str) -> str | None:
    """Return the version of the engine that would run; None when it is not installed or does not
    say.
    """
    try:
        version = importlib.metadata.version(engine)
    except importlib.metadata.PackageNotFoundError:
        return None
    return version if numbers(version) else None


def _gpu(device: str) -> str | None:
    """Return the architecture of the GPU that would run it, e.g. ``9.0``; None where the driver
    does not say.
    """
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    shown = (
        _visible(device)
        if device.startswith("cuda:")
        else os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0]
    )
    ask = [
        tool,
        "--query-gpu=compute_cap",
        "--format=csv,noheader",
        *(["-i", shown] if shown else []),
    ]
    try:
        said = subprocess.run(
            ask, capture_output=True, text=True, timeout=10, check=True
        ).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return None
    return said[0] if said and numbers(said[0]) else None
