"""From what a user names, a local folder or a Hub id, to a folder on disk."""

from __future__ import annotations

import os
import re
from pathlib import Path

from qtool.errors import CheckpointRefused, ResourceError, one_line

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
CONNECT_TIMEOUT_S = 5.0


def resolve_model(model_path: str, *, revision: str | None = None, with_code: bool = False) -> Path:
    """Return the folder of ``model_path``: itself when it exists, else the Hub model of that name,
    downloaded.

    Only safetensors, JSON, tokenizer and licence files are fetched, and code only ``with_code``;
    ``HF_HUB_OFFLINE`` is honoured.

    Raises: CheckpointRefused, when there is no such folder and no such model; ResourceError, when
        the Hub cannot be reached.
    """
    if not _may_be_hub_name(model_path) or os.path.exists(model_path):
        return Path(model_path)
    patterns = [*WANTED, *(CODE if with_code else ())]
    unwanted = [pattern for pattern in UNWANTED if not (with_code and pattern in CODE)]
    return _download(model_path, revision, patterns, unwanted)


def _download(
    model_path: str, revision: str | None, patterns: list[str], unwanted: list[str]
) -> Path:
    import httpx
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        folder = snapshot_download(
            model_path,
            revision=revision,
            allow_patterns=patterns,
            ignore_patterns=unwanted,
            etag_timeout=CONNECT_TIMEOUT_S,
            local_files_only=not _hub_is_reachable(),  # the cache may have it all
        )
    except GatedRepoError as error:
        raise CheckpointRefused(
            "E_HUB_ACCESS",
            f"Hub model `{model_path}` is gated and this account has no access",
            hint="accept its terms on its page, then log in with `hf auth login`",
        ) from error
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        at = f" at revision `{revision}`" if revision else ""
        raise CheckpointRefused(
            "E_NO_MODEL",
            f"no folder and no Hub model `{model_path}`{at}",
            hint="check the name; a private model needs `hf auth login`",
        ) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise _unreachable(model_path) from error
    except (HfHubHTTPError, httpx.HTTPError, OSError) as error:
        raise ResourceError(
            "E_DOWNLOAD",
            f"Hub model `{model_path}` cannot be downloaded: {one_line(error)}",
            hint="try again: what is complete is kept; check the disk of HF_HOME too",
        ) from error
    return Path(folder)


def check_hub_is_reachable(name: str) -> None:
    """Raise ResourceError within seconds when the Hub is needed for ``name`` and does not answer;
    do nothing when offline mode is set.
    """
    from huggingface_hub import constants

    # offline, the cache answers, or the download call refuses at once
    if not constants.HF_HUB_OFFLINE and not _hub_is_reachable():
        raise _unreachable(name)


def _hub_is_reachable() -> bool:
    import httpx
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        httpx.head(constants.ENDPOINT, timeout=CONNECT_TIMEOUT_S)
    except (httpx.HTTPError, httpx.InvalidURL):
        return False
    return True


def _may_be_hub_name(name: str) -> bool:
    return re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) is not None and not name.startswith(".")


def _unreachable(name: str) -> ResourceError:
    from huggingface_hub import constants

    why = (
        "HF_HUB_OFFLINE is set"
        if constants.HF_HUB_OFFLINE
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
