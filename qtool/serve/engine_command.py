"""The command lines of other engines: `make_command` writes our options as vLLM or SGLang has them.

`flags.yaml` maps each option to the flag of each engine.
"""

from __future__ import annotations

import math
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict, field_validator, model_validator

from qtool.errors import UsageError, nearest
from qtool.inspection.engines.rules import numbers
from qtool.options import flag_of
from qtool.serve.engine_install import find_installation
from qtool.serve.settings import ServeOptions

FLAGS = Path(__file__).with_name("flags.yaml")
SECRETS = ("--api-key", "--admin-api-key", "--hf-token", "VLLM_API_KEY")
HIDDEN = "***"


class Counterpart(BaseModel):
    """What stands for one of our options on an engine's command line: a flag, an environment
    variable, or nothing.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    flag: str = ""
    """The engine's flag; a switch is the flag alone, any other option the flag and its value."""

    positional: bool = False
    """The value stands alone, before all flags."""

    environment: str = ""
    """The variable that carries the value, with the flag or instead of one."""

    values: Mapping[str, str | None] | None = None
    """Our value to the engine's; None needs no flag, and a value that is missing is refused."""

    extra: tuple[str, ...] = ()
    """Further arguments that the flag needs."""

    default: str = ""
    """What is passed when the option was not given."""

    whole: bool = False
    """The engine takes a whole number: ours is rounded up."""

    since: str = ""
    """The first version that has the flag; older ones do not get it."""

    note: str = ""
    """What the user should know of the difference."""

    dropped: str = ""
    """Why nothing stands for it; the engine runs without, and the user is warned."""

    refused: str = ""
    """Why nothing stands for it, where the engine would compute something else without."""

    @field_validator("values", mode="before")
    @classmethod
    def _same_names(cls, values: object) -> object:
        return {value: value for value in values} if isinstance(values, list) else values

    @model_validator(mode="after")
    def _says_something(self) -> Counterpart:
        passed = self.flag or self.positional or self.environment or self.values
        if sum(map(bool, (passed, self.dropped, self.refused))) != 1:
            raise ValueError("an option is passed on, dropped or refused")
        return self


class Target(BaseModel):
    """The command line of one engine."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: str
    """The version whose flags were read."""

    launch: tuple[str, ...]
    """The arguments of Python that start the engine."""

    options: Mapping[str, Counterpart]
    """What stands for our options, in the order in which the engine gets them."""


@dataclass(frozen=True)
class Command:
    """A process that serves."""

    engine: str
    """The name of the engine."""

    arguments: tuple[str, ...] = field(repr=False)
    """What to run, the interpreter first."""

    environment: Mapping[str, str] = field(default_factory=dict, repr=False)
    """What to add to the environment."""

    warnings: tuple[str, ...] = ()
    """What the user should know first."""

    def __str__(self) -> str:
        """Return the command as a shell takes it, without its secrets."""
        variables = [
            f"{name}={HIDDEN if name in SECRETS else shlex.quote(value)}"
            for name, value in self.environment.items()
        ]
        words = _without_secrets(self.arguments)
        quoted = [HIDDEN if word == HIDDEN else shlex.quote(word) for word in words]
        return " ".join([*variables, *quoted])

    def to_dict(self) -> dict[str, object]:
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


def make_command(
    engine: str,
    options: ServeOptions,
    extra: Sequence[str] = (),
    *,
    override: str | None = None,
) -> Command:
    """Return the command that passes ``options`` to ``engine``; reads no checkpoint. See `prepare`.

    Args:
        engine: its name.
        options: what was given; ``quantization`` means an unquantized model here.
        extra: the engine's own arguments.
        override: the quantization of a quantized model whose inputs are rounded otherwise.
    Raises: UsageError, for an option that the engine has no counterpart of, where running without
        would change the result.
    """
    target = _target(engine)
    _check_nodes(options)
    given = options.given()
    installed = find_installation(engine, options.engine_python)
    given.pop("engine_python", None)
    if override is not None:
        given["override"] = override
    environment = _visible_gpu(options)
    if environment:
        given["device"] = "cuda"
    warnings = _convert_to_vllm(options, given) if engine == "vllm" else []
    arguments = [installed.python, *target.launch]
    for name, counterpart in target.options.items():
        if name not in given and not counterpart.default:
            continue
        value = given.pop(name, counterpart.default)
        passed = _pass_on(engine, name, value, counterpart, installed.version)
        arguments += passed.arguments
        environment |= passed.environment
        warnings += passed.warnings
    warnings += [f"{flag_of(name)} is left out: {engine} has nothing like it" for name in given]
    return Command(engine, (*arguments, *extra), environment, tuple(warnings))


def _target(engine: str) -> Target:
    if engine not in targets():
        known = ("builtin", *targets())
        raise UsageError(
            "E_ENGINE",
            f"unknown engine `{engine}`",
            hint=nearest(engine, known) or f"one of {', '.join(known)}",
        )
    return targets()[engine]


def _check_nodes(options: ServeOptions) -> None:
    nodes = options.nnodes or 1
    rank = options.node_rank or 0
    if not 0 <= rank < nodes:
        raise UsageError(
            "E_NODES",
            f"--node-rank is {rank}, and there are {nodes} nodes",
            hint="ranks count from 0; --nnodes is the same on all of them",
        )
    if nodes > 1 and options.dist_init_addr is None:
        raise UsageError(
            "E_NODES",
            f"--nnodes {nodes} needs an address to meet at",
            hint="--dist-init-addr HOST:PORT, of the node with rank 0",
        )


def _visible_gpu(options: ServeOptions) -> dict[str, str]:
    """Return the environment that shows the engine the one GPU of ``--device cuda:<n>``; empty
    without that option.
    """
    device = options.device or "auto"
    if not device.startswith("cuda:"):
        return {}
    if any((count or 1) > 1 for count in (options.tp, options.pp, options.dp)):
        hint = "leave --device out; CUDA_VISIBLE_DEVICES says which GPUs there are"
        raise UsageError(
            "E_DEVICE", f"--device {device} is one GPU, and more are asked for", hint=hint
        )
    return {"CUDA_VISIBLE_DEVICES": visible_device(device)}


def visible_device(device: str) -> str:
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


def _convert_to_vllm(options: ServeOptions, given: dict[str, object]) -> list[str]:
    """Change ``given`` where vLLM splits an option or counts otherwise; return warnings."""
    address = options.dist_init_addr
    if address is not None:
        del given["dist_init_addr"]
        has_port = not address.endswith("]")
        host, _, port = address.rpartition(":") if has_port else (address, "", "")
        given["master_addr"] = (host or port).strip("[]")
        if host and port:
            given["master_port"] = port
    if options.node_rank:
        given["headless"] = True
    return [*_convert_queue(options, given), *_convert_chunks(options, given)]


def _convert_queue(options: ServeOptions, given: dict[str, object]) -> list[str]:
    """Count the running requests among the queued ones, as --max-num-queued-reqs does."""
    if options.max_queued_requests is None:
        return []
    if options.max_running_requests is not None:
        given["max_queued_requests"] = options.max_queued_requests + options.max_running_requests
        return []
    del given["max_queued_requests"]
    return [
        "--max-queued-requests is left out: vLLM counts the running ones too; give "
        "--max-running-requests with it"
    ]


def _convert_chunks(options: ServeOptions, given: dict[str, object]) -> list[str]:
    chunk = options.chunked_prefill_size
    running = options.max_running_requests
    if chunk == -1:
        given["no_chunked_prefill"] = True
        del given["chunked_prefill_size"]
    # vLLM refuses to start otherwise
    elif chunk is not None and running is not None and chunk < running:
        given["chunked_prefill_size"] = running
        return [
            f"--chunked-prefill-size {chunk} becomes {running}: vLLM takes no less than "
            "--max-running-requests"
        ]
    return []


def _pass_on(
    engine: str, name: str, value: object, counterpart: Counterpart, version: str | None
) -> Command:
    """Return the part of a command that passes one option on to an engine of ``version``."""
    flag = flag_of(name)
    if counterpart.refused:
        raise _refused(engine, name, value, counterpart.refused)
    if counterpart.dropped:
        warning = f"{flag} is left out: {counterpart.dropped}"
        return Command(engine, (), warnings=(warning,))
    if version and counterpart.since and numbers(version) < numbers(counterpart.since):
        warning = f"{flag} is left out: {engine} {version} has no {counterpart.flag}"
        return Command(engine, (), warnings=(warning,))
    passed = _value_of(engine, name, value, counterpart)
    if passed is None:
        return Command(engine, ())
    return Command(
        engine,
        arguments=tuple(_words(counterpart, passed, is_switch=value is True)),
        environment={counterpart.environment: passed} if counterpart.environment else {},
        warnings=(f"{flag}: {counterpart.note}",) if counterpart.note else (),
    )


def _value_of(engine: str, name: str, value: object, counterpart: Counterpart) -> str | None:
    """Return the value of an option as the engine takes it; None where it needs no flag."""
    if counterpart.whole and isinstance(value, (int, float)):
        return str(math.ceil(value))
    text = str(value)
    if counterpart.values is None:
        return text
    if text.lower() not in counterpart.values:
        raise _refused(engine, name, value, f"{engine} takes {', '.join(counterpart.values)} there")
    return counterpart.values[text.lower()]


def _refused(engine: str, name: str, value: object, reason: str) -> UsageError:
    shown = "--quantization" if name == "override" else flag_of(name)
    hint = f"{reason}; leave it out, or serve without --engine {engine}"
    if name == "quantization":
        hint = f"{reason}; or quantize once with `qtool quantize` and serve what it writes"
    return UsageError("E_ENGINE_OPTION", f"{shown} {value} cannot be passed to {engine}", hint=hint)


def _words(counterpart: Counterpart, value: str, *, is_switch: bool) -> list[str]:
    if counterpart.positional:
        return [value]
    if not counterpart.flag:
        return []
    if is_switch:
        return [counterpart.flag, *counterpart.extra]
    joined = value.startswith("-")  # argparse would take it for a flag
    return (
        [f"{counterpart.flag}={value}", *counterpart.extra]
        if joined
        else [counterpart.flag, value, *counterpart.extra]
    )


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
