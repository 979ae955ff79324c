"""Options of ``qtool serve`` as they are given, and the settings of qtool's own server."""

from __future__ import annotations

import errno
import math
import re
import shlex
import socket
from dataclasses import dataclass, field, fields
from functools import lru_cache
from ipaddress import ip_address
from pathlib import Path

from qtool.engine.config import EngineConfig
from qtool.errors import ResourceError, UsageError
from qtool.options import bounded, check_bounds, flag_of, make_options

KEEP_ALIVE_S = 30
RETRY_AFTER_S = 1
CLIENT_SHARE = 0.75  # of the queue, connections and body memory, for one client at most
BACKLOG = 2048
LOG_LEVELS = ("debug", "info", "warning", "error")
SAMPLING_DEFAULTS = ("model", "openai")
# share of a GPU's memory for KV cache, activations and graphs, when the number of GPUs is guessed
KEPT_FOR_CACHE = 0.3
MAX_PORT = 65535
URL = re.compile(r"https?://[^\s/@]+(/[^\s?#]*)?")
KEY = re.compile(r"[^\s\x00-\x1f\x7f]+")
ORIGIN = re.compile(r"\*|null|[a-z][a-z0-9+.-]*://[^\s/,\"]+")


@dataclass(frozen=True, kw_only=True)
class HandoverOptions:
    """Options that only other engines use: for several GPUs, and where the engine is."""

    tp: int | None = bounded(None, 1)
    """GPUs that share each layer.*"""

    pp: int | None = bounded(None, 1)
    """GPUs that each hold some of the layers.*"""

    dp: int | None = bounded(None, 1)
    """Copies of the model.*"""

    nnodes: int | None = bounded(None, 1)
    """Number of machines.*"""

    node_rank: int | None = bounded(None, 0)
    """Rank of this machine, from 0.*"""

    dist_init_addr: str | None = None
    """HOST:PORT of the first machine.*"""

    engine_python: str | None = None
    """Python interpreter whose environment has the engine. [this one, else that of the engine's
    command in PATH]*"""


@dataclass(frozen=True, kw_only=True)
class ServeOptions(EngineConfig, HandoverOptions):
    """Options of a server, for any engine; None and False stand for what was not given."""

    model_path: str
    """Checkpoint folder or Hub name."""

    torchao_config: str | None = None
    """--quantization by torchao's names, e.g. int4wo-128."""

    enable_torch_compile: bool = False
    """Compile decoder layers that qtool has no kernels for; starts take longer."""

    served_model_name: str | None = None
    """The model's name for clients. [name of the folder, or on the Hub]"""

    host: str | None = None
    """Address to listen on; 0.0.0.0 is all of this machine's."""

    port: int | None = bounded(None, 1, MAX_PORT)
    """Port to listen on."""

    api_key: str | None = field(default=None, repr=False)
    """Bearer token that clients must send."""

    allowed_origins: str | None = None
    """Origins of web pages that may call, with commas; * is all. [* with an API key, else none]"""

    chat_template: str | None = None
    """Jinja file that replaces the model's chat template."""

    tool_call_parser: str | None = None
    """How the model writes tool calls, by vLLM's or SGLang's name, or none. [auto: as the template
    shows]"""

    reasoning_parser: str | None = None
    """How the model marks its thoughts, by vLLM's or SGLang's name, or none to leave them in the
    content. [auto: as the template shows]"""

    reference: str | None = None
    """URL of a second server, whose answers the page shows beside those of this one."""

    sampling_defaults: str | None = None
    """Default sampling fields: model for those of generation_config.json, or openai."""

    max_queued_requests: int | None = bounded(None, 0)
    """Requests that may wait for the engine; more get 429."""

    strict_fields: bool = False
    """Refuse fields of requests that would be ignored."""

    log_requests: bool = False
    """Write prompts to the log."""

    log_level: str | None = None
    """debug, info, warning or error."""

    drain_timeout_s: float | None = bounded(None, 0, whole=False)
    """Seconds that running requests have to end after SIGTERM."""

    watchdog_timeout_s: float | None = bounded(None, 1, whole=False)
    """Seconds without a step after which an engine that has work is ended."""

    trust_remote_code: bool = False
    """Run model code of the checkpoint; the builtin engine never does.*"""

    def __post_init__(self) -> None:
        if self.quantization is not None or self.torchao_config is not None:
            # reads formats and recipes: help does without
            from qtool.runtime.online import flag_named

            name = flag_named(self.quantization, self.torchao_config)
            object.__setattr__(self, "quantization", name)
            object.__setattr__(self, "torchao_config", None)
        self.check()

    def check(self) -> None:
        """Check what holds for every engine; each has further limits of its own."""
        check_bounds(self, HandoverOptions)
        check_bounds(self, ServeOptions)
        if self.api_key is not None and not KEY.fullmatch(self.api_key):
            raise UsageError(
                "E_API_KEY",
                "the API key is empty, or has spaces or control characters",
                hint="give --api-key or QTOOL_API_KEY a text without them, or leave it out",
            )

    def given(self) -> dict[str, object]:
        """Return the options that were given, by name: those that differ from their default."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return {
            each.name: values[each.name]
            for each in fields(self)
            if values[each.name] != each.default
        }


@dataclass(frozen=True, kw_only=True)
class ServeSettings(ServeOptions):
    """What qtool's own server serves, where, and to whom: options with their defaults filled in."""

    host: str = "127.0.0.1"
    port: int = 30000
    tool_call_parser: str = "auto"
    reasoning_parser: str = "auto"
    sampling_defaults: str = "model"
    max_queued_requests: int = 512
    log_level: str = "info"
    drain_timeout_s: float = 20.0
    # with the shutdown after it, less than the 30 s that Kubernetes gives
    watchdog_timeout_s: float = 300.0

    def check(self) -> None:
        """Check every option by itself.

        Raises: UsageError.
        """
        ServeOptions.check(self)
        EngineConfig.check(self)
        _check_text(self)
        if self.sampling_defaults not in SAMPLING_DEFAULTS:
            raise UsageError(
                "E_SAMPLING_DEFAULTS",
                f"--sampling-defaults is `{self.sampling_defaults}`",
                hint="`model` or `openai`",
            )
        if self.tool_call_parser != "auto":
            from qtool.serve.api.tools import styles as tool_styles  # slow: reads all styles

            tool_styles.style_named(self.tool_call_parser)
        if self.reasoning_parser != "auto":
            from qtool.serve.api.reasoning import styles as reasoning_styles

            reasoning_styles.style_named(self.reasoning_parser)
        for origin in self.origins:
            if not ORIGIN.fullmatch(origin):
                raise UsageError(
                    "E_ORIGIN",
                    f"--allowed-origins has `{origin}`",
                    hint="an origin is *, or scheme://host:port without a path",
                )
        if self.reference is not None and not URL.fullmatch(self.reference):
            raise UsageError(
                "E_REFERENCE",
                f"--reference is not the URL of a server: {self.reference}",
                hint="it looks like http://127.0.0.1:30001",
            )
        if self.log_level.lower() not in LOG_LEVELS:
            raise UsageError(
                "E_LOG_LEVEL",
                f"--log-level is `{self.log_level}`",
                hint=f"one of {', '.join(LOG_LEVELS)}",
            )

    @property
    def engine_config(self) -> EngineConfig:
        """The options of the engine alone."""
        names = [each.name for each in fields(EngineConfig)]
        return EngineConfig(**{name: getattr(self, name) for name in names})

    @property
    def origins(self) -> tuple[str, ...]:
        """The origins of web pages that may call the server; vLLM writes them as JSON."""
        if self.allowed_origins is None:
            return ("*",) if self.api_key else ()
        given = self.allowed_origins.strip("[] ").split(",")
        # browsers send names of hosts in lower case
        return tuple(origin.lower() for one in given if (origin := one.strip(" \"'").rstrip("/")))

    @property
    def name(self) -> str:
        """The model's name for clients."""
        return self.served_model_name or shown_name(self.model_path)

    @property
    def url(self) -> str:
        """Where a client on this machine finds the server."""
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]", "": "127.0.0.1"}.get(
            self.host, f"[{self.host}]" if ":" in self.host else self.host
        )
        return f"http://{host}:{self.port}"

    @property
    def is_local(self) -> bool:
        """Whether only users of this machine can reach it."""
        try:
            return ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    def to_dict(self) -> dict[str, object]:
        """Return the settings that clients may see, by name."""
        config = vars(self.engine_config)
        hidden = {each.name for each in fields(HandoverOptions)}
        hidden |= {*config, "api_key", "torchao_config", "enable_torch_compile"}
        hidden |= {"trust_remote_code", "reference"}
        shown = {name: value for name, value in config.items() if value is not None}
        own = {name: value for name, value in vars(self).items() if name not in hidden}
        found = {**shown, **own, "model_path": self.name, "revision": self.revision}
        for name in ("tokenizer_path", "chat_template"):
            if isinstance(path := found.get(name), str):
                found[name] = shown_name(path)
        return found


@lru_cache
def shown_name(path: str) -> str:
    """Return the name that clients see for ``path``: that of the folder or file without its
    parents, and a name on the Hub as it is.
    """
    if not Path(path).exists():
        return path
    return Path(path).resolve().name or "model"


def _check_text(settings: ServeSettings) -> None:
    """Raise UsageError for text that is not UTF-8, as it is sent to clients and to the engine."""
    for each in fields(settings):
        value = getattr(settings, each.name)
        if isinstance(value, str) and re.search("[\ud800-\udfff]", value):
            raise UsageError(
                "E_NOT_UTF8",
                f"{flag_of(each.name)} is not UTF-8: {value}",
                hint="of a folder: rename it, or give a link to it that has another name",
            )


def make_settings(options: ServeOptions) -> ServeSettings:
    """Return the settings of qtool's own server for ``options``.

    Raises: UsageError, for what this server cannot do.
    """
    counts = (options.tp, options.pp, options.dp, options.nnodes)
    if any(count not in (None, 1) for count in counts) or options.dist_init_addr:
        raise UsageError(
            "E_ONE_GPU", "the builtin engine runs on one GPU", hint=suggestion(options)
        )
    if options.engine_python is not None:
        raise UsageError(
            "E_USAGE",
            "--engine-python is given, and the builtin engine runs in this environment",
            hint="add --engine vllm or sglang",
        )
    given = options.given()
    if options.enable_torch_compile:
        given["compile"] = "decode"
    return make_options(ServeSettings, given)


def suggestion(
    options: ServeOptions, *, size_bytes: int | None = None, gpu_bytes: int | None = None
) -> str:
    """Return the hint for who needs more than one GPU: the command line to type instead.

    Args:
        options: what was given. ``tp`` is kept when it is there.
        size_bytes: the size of the weights.
        gpu_bytes: the memory of one GPU; with ``size_bytes`` it gives ``tp`` when there is none.
    """
    given = options.given()
    if not options.tp and size_bytes is not None and gpu_bytes:
        given["tp"] = least_tensor_parallel(size_bytes, gpu_bytes)
    del given["model_path"]
    key = " --api-key ..." if given.pop("api_key", None) else ""
    words = ["qtool", "serve", "--model-path", options.model_path, "--engine", "vllm"]
    for name, value in given.items():
        words += [flag_of(name)] if value is True else [flag_of(name), str(value)]
    return (
        f"hand it to an engine that runs on several GPUs: `{shlex.join(words)}{key}`, or --engine "
        "sglang"
    )


def least_tensor_parallel(size_bytes: int, gpu_bytes: int) -> int:
    """Return the smallest power of two of GPUs that hold ``size_bytes`` of weights and leave room
    for the KV cache.
    """
    return 1 << max(0, math.ceil(math.log2(size_bytes / (gpu_bytes * (1 - KEPT_FOR_CACHE)))))


def bind(settings: ServeSettings) -> socket.socket:
    """Return a socket on the server's address.

    Raises: ResourceError, when it is taken or is not this machine's.
    """
    try:
        addresses = socket.getaddrinfo(
            settings.host or None, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        family, kind, protocol, _, address = addresses[0]
        taken = socket.socket(family, kind, protocol)
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(address)
        taken.listen(BACKLOG)  # from now on the port is taken
    except (OSError, OverflowError, UnicodeError) as error:
        hint = (
            "choose another --port, or end what listens there"
            if getattr(error, "errno", None) == errno.EADDRINUSE
            else "--host is an address of this machine"
        )
        reason = getattr(error, "strerror", None) or error
        raise ResourceError(
            "E_PORT", f"cannot listen on {settings.host}:{settings.port}: {reason}", hint=hint
        ) from error
    return taken
