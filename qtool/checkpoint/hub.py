"""From what a user names, a local folder or a Hub id, to a folder on disk."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import subprocess
import sys
from pathlib import Path
from typing import IO, TYPE_CHECKING
from urllib.parse import urlsplit

from qtool.errors import (
    CheckpointRefused,
    ResourceError,
    UsageError,
    file_errors,
    from_wire,
    is_there,
)

if TYPE_CHECKING:
    from qtool.checkpoint.hub_download import DownloadRequest

WANTED = (
    "*.safetensors",
    "*.json",
    "*.jinja",
    "tokenizer*",
    "*.model",
    "*.tiktoken",
    "vocab*",
    "merges.txt",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
    "README.md",
)
UNWANTED = (
    "*.bin",
    "*.pt",
    "*.pth",
    "*.pkl",
    "*.py",
    "*.gguf",
    "*.onnx",
    "*.msgpack",
    "*.h5",
    "*/*.safetensors",
    "original/*",
    "consolidated*",
)
CODE = ("*.py",)
OFFLINE_VARIABLES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
METADATA_S = 30.0  # until the endpoint has told what there is to download
STALL_S = 60.0  # without progress


def resolve_model(model_path: str, *, revision: str | None = None, with_code: bool = False) -> Path:
    """Return where ``model_path`` lies: itself when it exists; else the folder of the Hub model of
    that name, downloaded; with a tag, ``org/model:Q4_K_M``, its GGUF file.

    Only safetensors, JSON, tokenizer and licence files are fetched, and code only ``with_code``;
    ``HF_HUB_OFFLINE`` is honoured.

    Raises: CheckpointRefused, when there is no such folder and no such model; ResourceError, when
        the Hub cannot be reached; UsageError, when HF_ENDPOINT is not a URL.
    """
    _check_endpoint()
    path = Path(model_path)
    with file_errors(reading=[path]):
        # Linux says ENAMETOOLONG of others, and the Hub knows none of them either
        is_file_name = all(len(os.fsencode(part)) <= 255 for part in path.parts)
        if not _may_be_hub_name(model_path) or (is_file_name and is_there(path)):
            return path
    name, _, tag = model_path.partition(":")
    if tag:
        return _resolve_gguf(name, tag, revision)
    request: DownloadRequest = {
        "name": model_path,
        "revision": revision,
        "wanted": [*WANTED, *(CODE if with_code else ())],
        "unwanted": [pattern for pattern in UNWANTED if not (with_code and pattern in CODE)],
    }
    return _fetched(request)


def _fetched(request: DownloadRequest) -> Path:
    return Path(_find_cached(request) if is_offline() else _download(request))


def _resolve_gguf(name: str, tag: str, revision: str | None) -> Path:
    """Return the GGUF file of the Hub model ``name`` whose name ends in ``tag``, e.g. ``Q4_K_M``,
    downloaded alone.
    """
    ends = [f"{tag}.gguf", f"{tag}-?????-of-?????.gguf"]
    wanted = [f"*[-._]{end}" for end in ends]
    request: DownloadRequest = {
        "name": name,
        "revision": revision,
        "wanted": wanted,
        "unwanted": ["*mmproj*"],
    }
    folder = _fetched(request)
    found = sorted(path for pattern in wanted for path in folder.rglob(pattern))
    found = [path for path in found if "mmproj" not in path.name]
    if not found:
        raise CheckpointRefused(
            "E_NO_MODEL",
            f"Hub model `{name}` has no GGUF file whose name ends in `{tag}`",
            hint="its page lists the files; for model-Q4_K_M.gguf it is Q4_K_M",
        )
    return found[0]


def _check_endpoint() -> None:
    """Refuse an HF_ENDPOINT that libraries cannot even be imported with."""
    endpoint = os.environ.get("HF_ENDPOINT", "")
    try:
        urlsplit(endpoint)
    except ValueError:
        raise UsageError(
            "E_HF_ENDPOINT",
            f"HF_ENDPOINT is not a URL: {endpoint!r}",
            hint="it looks like https://huggingface.co; leave it unset for the Hub itself",
        ) from None


def is_offline() -> bool:
    """Whether an environment variable allows the cache alone."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _find_cached(request: DownloadRequest) -> str:
    from qtool.checkpoint.hub_download import Unreachable, download

    try:
        return download(request, local_only=True)
    except Unreachable as error:
        raise unreachable(request["name"]) from error


def _download(request: DownloadRequest) -> str:
    """Run `hub_download.main` in a child process, and kill it when nothing arrives."""
    from qtool.sandbox import code_of_main

    code = code_of_main("qtool.checkpoint.hub_download")
    with subprocess.Popen(
        [sys.executable, "-P", "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdin is not None and child.stdout is not None
        try:
            with contextlib.suppress(BrokenPipeError), child.stdin as stdin:
                stdin.write(json.dumps(request).encode() + b"\n")
            return _folder_from(request, child.stdout)
        finally:
            child.kill()


def _folder_from(request: DownloadRequest, pipe: IO[bytes]) -> str:
    """Return the folder that the download process sends at the end.

    Raises: what `hub_download.download` raises there; ResourceError, when nothing arrives in time.
    """
    from qtool.checkpoint.hub_download import failed

    deadline_s, buffer = METADATA_S, b""
    while True:
        if not select.select([pipe], [], [], deadline_s)[0]:
            if deadline_s == METADATA_S:
                return _find_cached(request)  # as if there were no network
            raise failed(f"model `{request['name']}`", f"nothing has arrived for {STALL_S:.0f} s")
        chunk = os.read(pipe.fileno(), 1 << 16)
        if not chunk:
            raise failed(f"model `{request['name']}`", "the process that downloads it ended")
        *lines, buffer = (buffer + chunk).split(b"\n")
        for line in map(json.loads, lines):
            match line:
                case {"folder": str(folder)}:
                    return folder
                case {"error": dict(error)}:
                    raise from_wire(error)
                case {"unreachable": True}:
                    raise unreachable(request["name"])
        deadline_s = STALL_S


def _may_be_hub_name(name: str) -> bool:
    return re.fullmatch(r"[\w.-]+(/[\w.-]+(:[\w.-]+)?)?", name) is not None and not name.startswith(
        "."
    )


def unreachable(name: str) -> ResourceError:
    """Return the error for a Hub name that is not in the cache while the Hub cannot be asked."""
    from huggingface_hub import constants

    offline = next(
        (each for each in OFFLINE_VARIABLES if os.environ.get(each, "0") not in ("", "0")), None
    )
    why = (
        f"{offline or 'HF_HUB_OFFLINE'} is set"
        if offline or constants.HF_HUB_OFFLINE
        else f"{constants.ENDPOINT} does not answer"
    )
    return ResourceError(
        "E_HUB_UNREACHABLE",
        f"`{name}` is not a local folder or file, is not in the Hub cache, and {why}",
        hint=(
            "give a path that exists, or download it where there is a network and set HF_HOME to "
            "that cache"
        ),
    )
