"""A small Hugging Face Hub on this machine: repositories of one commit, over real HTTP. It does
what `snapshot_download` asks for and no more.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REVISIONS = ("main", "v1.0", COMMIT)


class HubServer:
    """Serves ``repositories``, name -> path -> content. ``requested`` keeps the paths that were asked for.

    ``gated``: files need an access that nobody has. ``broken``: this file fails. ``silent``:
        nothing is ever answered.
    """

    def __init__(self, repositories: Mapping[str, Mapping[str, bytes]]) -> None:
        self.repositories = repositories
        self.requested: list[str] = []
        self.gated = False
        self.broken = ""
        self.silent = False
        self._ended = threading.Event()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                hub.answer(self, urlsplit(self.path).path)

            def do_HEAD(self) -> None:
                self.do_GET()

            def log_message(self, format: str, *args: Any) -> None:
                return None

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
        )

    def __enter__(self) -> HubServer:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Answer nobody any more, on a closed port."""
        if not self._ended.is_set():
            self._ended.set()
            self._server.shutdown()
            self._server.server_close()

    def answer(self, request: BaseHTTPRequestHandler, path: str) -> None:
        while self.silent and not self._ended.is_set():
            time.sleep(0.05)
        self.requested.append(path)
        if path in ("", "/"):
            return self._send(request, 200, b"a hub")
        parts = unquote(path).strip("/").split("/")
        # api/models/ORG/NAME/revision|tree/REVISION
        if parts[:2] == ["api", "models"] and len(parts) >= 6:
            return self._api("/".join(parts[2:4]), parts[4], parts[5], request)
        if len(parts) >= 5 and parts[2] == "resolve":  # ORG/NAME/resolve/REVISION/FILE
            return self._file("/".join(parts[:2]), parts[3], "/".join(parts[4:]), request)
        return self._send(request, 404, b"", {"X-Error-Code": "RepoNotFound"})

    def _api(self, name: str, what: str, revision: str, request: BaseHTTPRequestHandler) -> None:
        files = self.repositories.get(name)
        if files is None:
            return self._send(request, 404, b"", {"X-Error-Code": "RepoNotFound"})
        if revision not in REVISIONS:
            return self._send(request, 404, b"", {"X-Error-Code": "RevisionNotFound"})
        answer: Any = {
            "id": name,
            "sha": COMMIT,
            "siblings": [{"rfilename": path} for path in files],
        }
        if what == "tree":
            answer = [
                {"type": "file", "path": path, "size": len(content), "oid": _etag(content)}
                for path, content in files.items()
            ]
        return self._send(
            request, 200, json.dumps(answer).encode(), {"Content-Type": "application/json"}
        )

    def _file(self, name: str, revision: str, path: str, request: BaseHTTPRequestHandler) -> None:
        content = self.repositories.get(name, {}).get(path)
        if content is None or revision not in REVISIONS:
            return self._send(request, 404, b"", {"X-Error-Code": "EntryNotFound"})
        if self.gated:
            return self._send(request, 403, b"", {"X-Error-Code": "GatedRepo"})
        if path == self.broken and request.command == "GET":
            return self._send(request, 418, b"the disk of the hub is broken")
        return self._send(
            request,
            200,
            content,
            {"ETag": f'"{_etag(content)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "none"},
        )

    def _send(
        self,
        request: BaseHTTPRequestHandler,
        status: int,
        content: bytes,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        try:
            request.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
                request.send_header(name, value)
            request.end_headers()
            if request.command == "GET":
                request.wfile.write(content)
        except (BrokenPipeError, ConnectionResetError):
            pass  # the client gave up


def _etag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
