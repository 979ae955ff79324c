"""Downloads one model from the Hub, in a process that can be killed: `main` runs there.

It reads a `DownloadRequest` as one JSON line from stdin and writes JSON lines to stdout: one
whenever something has arrived, and the folder or an error at the end. Progress bars go to stderr.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import TypedDict

import httpx
import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils.tqdm import tqdm

from qtool.errors import CheckpointRefused, QtoolError, ResourceError, one_line, to_wire

CONNECT_TIMEOUT_S = 5.0
PROGRESS_BYTES = 64 << 10  # fewer do not count: an endpoint may send a byte at a time
PROGRESS_INTERVAL_S = 0.5
MAX_METADATA_BYTES = 64 << 20
MAX_PACKED_METADATA_BYTES = 256 << 10  # gzip makes at most a thousand times as much of them
METADATA_HEADERS = ("ETag", "X-Linked-ETag", "X-Repo-Commit")
# what huggingface_hub raises for an answer that is not the Hub's
NOT_THE_HUB = (ValueError, LookupError, TypeError, AttributeError, AssertionError, RecursionError)
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class DownloadRequest(TypedDict):
    """What to download."""

    name: str
    revision: str | None
    wanted: list[str]
    """Patterns of file names."""
    unwanted: list[str]


class Unreachable(Exception):
    """The endpoint does not answer, and the cache does not have the model."""


def is_reachable() -> bool:
    """Whether the endpoint answers a request within seconds."""
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        httpx.head(constants.ENDPOINT, timeout=CONNECT_TIMEOUT_S)
    except (httpx.HTTPError, httpx.InvalidURL):
        return False
    return True


def download(
    request: DownloadRequest, *, local_only: bool, bar_class: type[tqdm] | None = None
) -> str:
    """Return the folder of a model in the cache, downloaded unless ``local_only``.

    Raises: Unreachable; CheckpointRefused, when there is no such model or no access to it;
        ResourceError, when it cannot be downloaded.
    """
    name, revision = request["name"], request["revision"]
    try:
        return str(
            huggingface_hub.snapshot_download(
                name,
                revision=revision,
                allow_patterns=request["wanted"],
                ignore_patterns=request["unwanted"],
                etag_timeout=CONNECT_TIMEOUT_S,
                local_files_only=local_only,
                tqdm_class=bar_class,
            )
        )
    except GatedRepoError as error:
        raise CheckpointRefused(
            "E_HUB_ACCESS",
            f"Hub model `{name}` is gated and this account has no access",
            hint="accept its terms on its page, then log in with `hf auth login`",
        ) from error
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        at = f" at revision `{revision}`" if revision else ""
        raise CheckpointRefused(
            "E_NO_MODEL",
            f"no folder and no Hub model `{name}`{at}",
            hint="check the name; a private model needs `hf auth login`",
        ) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        if isinstance(error.__cause__, HfHubHTTPError):
            raise failed(f"model `{name}`", one_line(error.__cause__)) from error
        raise Unreachable from error
    except (HfHubHTTPError, httpx.HTTPError, OSError) as error:
        raise failed(f"model `{name}`", one_line(error)) from error
    except NOT_THE_HUB as error:
        raise _not_the_hub(f"model `{name}`", error) from error


def check_data_set(name: str) -> None:
    """Raise ResourceError when the endpoint's answer about the data set ``name`` is not the Hub's.

    An answer that there is no such data set, or no access to it, passes.
    """
    subject = f"data set `{name}`"
    try:
        huggingface_hub.HfApi().dataset_info(name, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT)
    except (RepositoryNotFoundError, HFValidationError):
        return
    except (HfHubHTTPError, httpx.HTTPError, OSError) as error:
        raise failed(subject, one_line(error)) from error
    except NOT_THE_HUB as error:
        raise _not_the_hub(subject, error) from error


def _not_the_hub(subject: str, error: Exception) -> ResourceError:
    return failed(
        subject,
        f"its answer is not one of the Hub's ({type(error).__name__}: {one_line(error)})",
        hint="check HF_ENDPOINT, and whether a proxy or a login page answers in its place",
    )


def failed(subject: str, why: str, *, hint: str = "") -> ResourceError:
    """Return the error for a download that the endpoint did not let finish."""
    return ResourceError(
        "E_DOWNLOAD",
        f"Hub {subject} cannot be downloaded from {constants.ENDPOINT}: {why}",
        hint=hint or "try again: what is complete is kept; check the disk of HF_HOME too",
    )


class _Output:
    """Sends JSON lines to the parent."""

    def __init__(self) -> None:
        # what the library prints must not get between the lines
        self._file = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)
        self._lock = threading.Lock()
        self._arrived, self._last = 0, 0.0

    def send(self, line: object) -> None:
        with self._lock:
            self._file.write(json.dumps(line) + "\n")

    def add_bytes(self, size: float) -> None:
        """Count ``size`` more bytes that arrived, and report progress once they are enough."""
        with self._lock:
            self._arrived += int(size)
            now = time.monotonic()
            if self._arrived < PROGRESS_BYTES or now < self._last + PROGRESS_INTERVAL_S:
                return
            self._arrived, self._last = 0, now
            self._file.write('{"progress": true}\n')


class _CountedBody(httpx.SyncByteStream):
    """The body of an answer: bytes of files count as progress, those of metadata are limited."""

    def __init__(self, stream: httpx.SyncByteStream, output: _Output, limit: int | None) -> None:
        self._stream, self._output, self._limit = stream, output, limit

    def __iter__(self) -> Iterator[bytes]:
        size = 0
        for chunk in self._stream:
            size += len(chunk)
            if self._limit is None:
                self._output.add_bytes(len(chunk))
            elif size > self._limit:
                raise httpx.RemoteProtocolError("the answer is larger than any of the Hub's")
            yield chunk

    def close(self) -> None:
        self._stream.close()


def _make_client(output: _Output) -> httpx.Client:
    """Return the library's HTTP client, with a check of every answer."""
    from huggingface_hub.utils import _http

    def check(response: httpx.Response) -> None:
        for name in METADATA_HEADERS:  # the library names files in the cache by them
            value = response.headers.get(name, "")
            if not re.fullmatch(r'(W/)?"?[\w.+=:-]*"?', value) or ".." in value:
                raise httpx.RemoteProtocolError(f"its header {name} is `{value[:100]}`")
        is_api = "/api/" in response.request.url.path
        assert isinstance(response.stream, httpx.SyncByteStream)
        is_packed = "Content-Encoding" in response.headers
        most = MAX_PACKED_METADATA_BYTES if is_packed else MAX_METADATA_BYTES
        limit = most if is_api else None
        response.stream = _CountedBody(response.stream, output, limit)
        if is_api and response.is_success and "/revision/" in response.request.url.path:
            response.read()
            if not re.fullmatch("[0-9a-f]{40}", str(response.json()["sha"])):
                raise ValueError(f"its commit is `{str(response.json()['sha'])[:100]}`")

    client = _http.default_client_factory()
    client.event_hooks["response"].append(check)
    client.timeout = httpx.Timeout(constants.HF_HUB_DOWNLOAD_TIMEOUT)
    return client


def _bar_class(output: _Output) -> type[tqdm]:
    """Return a class of progress bars that also report to the parent."""

    class ReportingBar(tqdm):
        def __init__(self, *args: object, **kwargs: object) -> None:
            output.send({"progress": True})  # it is known what to download
            self._counts_bytes = kwargs.get("unit") == "B"
            super().__init__(*args, **kwargs)  # type: ignore[no-untyped-call]

        def update(self, n: float | None = 1) -> bool | None:
            if self._counts_bytes:
                output.add_bytes(n or 0)
            else:
                output.send({"progress": True})  # a file is complete
            return bool(super().update(n))

    return ReportingBar


def main() -> None:
    """Download what the line on stdin asks for."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    output = _Output()
    request: DownloadRequest = json.loads(sys.stdin.readline())
    huggingface_hub.set_client_factory(lambda: _make_client(output))
    try:
        line: dict[str, object] = {
            "folder": download(request, local_only=not is_reachable(), bar_class=_bar_class(output))
        }
    except Unreachable:
        line = {"unreachable": True}
    except QtoolError as error:
        line = {"error": to_wire(error)}
    output.send(line)
    os._exit(0)  # threads of the library may still wait for the endpoint
