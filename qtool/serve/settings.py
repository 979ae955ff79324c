"""How a server is to run: what the command line says, and the bounds that keep it running."""

from __future__ import annotations

import errno
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from ipaddress import ip_address
from typing import Any

from qtool.errors import ResourceError, UsageError
from qtool.runtime.online import flag_named
from qtool.serve.api.tools.styles import style_named

KEEP_ALIVE_S = 30
RETRY_AFTER_S = 1
BACKLOG = 2048
LOG_LEVELS = ("debug", "info", "warning", "error")
FOR_SEVERAL = ("tp", "pp", "dp", "nnodes")
ENGINE = (  # options that are arguments of `qtool.Engine`
    "tokenizer_path",
    "skip_tokenizer_init",
    "device",
    "dtype",
    "kv_cache_dtype",
    "mem_fraction_static",
    "context_length",
    "max_running_requests",
    "max_total_tokens",
    "chunked_prefill_size",
    "disable_cuda_graph",
    "disable_radix_cache",
    "disable_overlap_schedule",
    "random_seed",
)


@dataclass(frozen=True)
class Settings:
    """What one server serves, where, and to whom.

    Args:
        engine: arguments of `qtool.Engine`, without the model's path.
        chat_template: a file in place of the checkpoint's template. tool_call_parser: how the model
            writes calls, if its template does not show it.
        sampling_defaults: ``model``, those of generation_config.json, or ``openai``.
        max_queued_requests: completions that may wait for the engine; what comes beyond is told to
            come back.
        drain_timeout_s: seconds that requests have to end by themselves once the server is asked to
            stop.
    """

    model_path: str
    revision: str | None = None
    engine: Mapping[str, Any] = field(default_factory=dict)
    served_model_name: str | None = None
    host: str = "127.0.0.1"
    port: int = 30000
    api_key: str | None = field(default=None, repr=False)
    chat_template: str | None = None
    tool_call_parser: str | None = None
    sampling_defaults: str = "model"
    max_queued_requests: int = 512
    log_requests: bool = False
    log_level: str = "info"
    drain_timeout_s: float = 20.0
    """With what comes after it less than the 30 that Kubernetes gives."""

    def __post_init__(self) -> None:
        if self.sampling_defaults not in ("model", "openai"):
            raise UsageError(
                "E_SAMPLING_DEFAULTS",
                f"--sampling-defaults is `{self.sampling_defaults}`",
                hint="`model` or `openai`",
            )
        if self.tool_call_parser is not None:
            style_named(self.tool_call_parser)
        if self.log_level.lower() not in LOG_LEVELS:
            raise UsageError(
                "E_LOG_LEVEL",
                f"--log-level is `{self.log_level}`",
                hint=f"one of {', '.join(LOG_LEVELS)}",
            )

    @property
    def name(self) -> str:
        """The model's name for clients."""
        return self.served_model_name or self.model_path

    @property
    def url(self) -> str:
        """Where a client on this machine finds the server."""
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]", "": "127.0.0.1"}.get(
            self.host, f"[{self.host}]" if ":" in self.host else self.host
        )
        return f"http://{host}:{self.port}"

    @property
    def is_local(self) -> bool:
        """Whether nobody but this machine's users can reach it."""
        try:
            return ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


def make_settings(options: Mapping[str, Any]) -> Settings:
    """Return the settings that the options of ``qtool serve`` name; those that are None have their
    defaults.

    Raises: UsageError, for what this server cannot do.
    """
    several = [name for name in FOR_SEVERAL if (options.get(name) or 1) != 1]
    if several or options.get("dist_init_addr"):
        from qtool.serve.handover import suggestion

        raise UsageError(
            "E_ONE_GPU", "the builtin engine runs on one GPU", hint=suggestion(options)
        )
    given = {name: value for name, value in options.items() if value is not None}
    engine = {name: given[name] for name in ENGINE if name in given}
    engine["quantization"] = flag_named(given.get("quantization"), given.get("torchao_config"))
    engine["compile"] = "decode" if given.get("enable_torch_compile") else "off"
    own = {field.name: given[field.name] for field in fields(Settings) if field.name in given}
    if "drain_timeout" in given:
        own["drain_timeout_s"] = given["drain_timeout"]
    return Settings(**own, engine=engine)


def bind(settings: Settings) -> socket.socket:
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
        taken.listen(BACKLOG)  # from now on nobody else can
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
