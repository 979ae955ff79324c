"""A Hub that does not behave: each answer that is not the Hub's ends with exit code 4 and names the
endpoint, in bounded time, and nothing is written outside of the cache.
"""

from __future__ import annotations

import contextlib
import errno
import gzip
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import pytest
from huggingface_hub import constants
from support.gguf_bytes import Gguf

from qtool.calibration import CalibrationSpec, check_source, isolated
from qtool.checkpoint import hub, open_checkpoint, resolve_model
from qtool.errors import CheckpointRefused, ResourceError, UsageError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CONFIG = b'{"model_type": "llama"}'
INFO = {"id": "org/model", "sha": COMMIT, "siblings": [{"rfilename": "config.json"}]}
TREE = [{"type": "file", "path": "config.json", "size": len(CONFIG), "oid": "a" * 40}]


class Endpoint:
    """A server whose answers a test chooses: kind of request -> function of the handler."""

    def __init__(self):
        self.answers = {"info": self.json(INFO), "tree": self.json(TREE), "file": self.file()}
        self.ended = threading.Event()
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):  # also for HEAD
                path = urlsplit(self.path).path
                kind = "file" if "/resolve/" in path else "tree" if "/tree/" in path else "info"
                if path in ("", "/"):
                    endpoint.page(200, b"")(self)
                else:
                    endpoint.answers[kind](self)

            do_HEAD = do_GET  # noqa: N815

            def handle(self):
                with contextlib.suppress(OSError):  # the client gave up
                    super().handle()

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    @staticmethod
    def page(status, content, length=None, **headers):
        def answer(handler):
            handler.send_response(status)
            handler.send_header("Content-Length", str(len(content) if length is None else length))
            for name, value in headers.items():
                handler.send_header(name.replace("_", "-"), value)
            handler.end_headers()
            if handler.command == "GET":
                handler.wfile.write(content)
                handler.close_connection = length is not None

        return answer

    def json(self, value):
        return self.page(200, json.dumps(value).encode())

    def file(self, content=CONFIG, etag="a" * 40, **options):
        headers = {"ETag": f'"{etag}"', "X_Repo_Commit": COMMIT}
        return self.page(200, content, **{**headers, **options})

    def silent(self, handler):
        self.ended.wait()

    def drip(self, handler):
        handler.send_response(200)
        handler.send_header("Content-Length", "100000")
        for name, value in (("ETag", f'"{"a" * 40}"'), ("X-Repo-Commit", COMMIT)):
            handler.send_header(name, value)
        handler.end_headers()
        while handler.command == "GET" and not self.ended.wait(0.1):
            handler.wfile.write(b" ")

    def drip_headers(self, handler):
        while not self.ended.wait(0.1):
            handler.wfile.write(b"H")


@pytest.fixture
def endpoint(tmp_path, monkeypatch):
    found = Endpoint()
    threading.Thread(target=found.server.serve_forever, args=(0.05,), daemon=True).start()
    for name, value in {
        "HF_ENDPOINT": found.url,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_CACHE": str(tmp_path / "hf" / "hub"),  # GPTQModel sets it when it is imported
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(constants, "ENDPOINT", found.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
    yield found
    found.ended.set()
    found.server.shutdown()
    found.server.server_close()


def test_an_endpoint_that_behaves_is_downloaded_from(endpoint):
    assert (resolve_model("org/model") / "config.json").read_bytes() == CONFIG


def test_a_tag_chooses_a_gguf_file(endpoint, tmp_path):
    content = Gguf().write(tmp_path / "small.gguf").read_bytes()
    names = ("Small-Q4_0.gguf", "Small-Q8_0.gguf", "Small-Q8_0.md", "mmproj-Q8_0.gguf")
    entry = {"type": "file", "size": len(content), "oid": "b" * 40}
    endpoint.answers |= {
        "info": endpoint.json({**INFO, "siblings": [{"rfilename": name} for name in names]}),
        "tree": endpoint.json([{**entry, "path": name} for name in names]),
        "file": endpoint.file(content, etag="b" * 40),
    }
    checkpoint = open_checkpoint(resolve_model("org/model:Q8_0"))
    assert checkpoint.name == "Small-Q8_0"
    assert [path.name for path in (tmp_path / "hf").rglob("*.gguf")] == ["Small-Q8_0.gguf"]
    with pytest.raises(CheckpointRefused, match="ends in `Q5_K`"):
        resolve_model("org/model:Q5_K")


NOT_THE_HUB = {
    "a page in place of the model": {"info": Endpoint.page(200, b"<html>log in</html>")},
    "a page in place of the files": {"tree": Endpoint.page(200, b"<html>log in</html>")},
    "an empty answer": {"info": Endpoint.page(200, b"")},
    "a list": {"info": Endpoint.page(200, b"[]")},
    "null": {"info": Endpoint.page(200, b"null")},
    "no commit": {"info": Endpoint.page(200, b'{"id": "org/model"}')},
    "a commit that leaves the cache": {
        "info": Endpoint.page(200, json.dumps({**INFO, "sha": "../../../../evil"}).encode())
    },
    "a commit that is a number": {
        "info": Endpoint.page(200, json.dumps({**INFO, "sha": 5}).encode())
    },
    "files of another shape": {"tree": Endpoint.page(200, b'{"a": 1}')},
    "files without names": {"tree": Endpoint.page(200, b'[{"type": "file"}]')},
    "deep JSON": {"info": Endpoint.page(200, b"[" * 100_000)},
    "a gzip bomb": {
        "info": Endpoint.page(200, gzip.compress(bytes(300 << 20), 1), Content_Encoding="gzip")
    },
    "not UTF-8": {"info": Endpoint.page(200, b'{"id": "\xff"}')},
    "a teapot": {"info": Endpoint.page(418, b"")},
    "a loop of redirects": {"info": Endpoint.page(302, b"", Location="/api/models/org/model")},
    "a redirect to nowhere": {"tree": Endpoint.page(302, b"", Location="http://127.0.0.1:9/")},
    "a body that is cut": {"info": Endpoint.page(200, b'{"id": "org/mo', length=5000)},
    "a file that is cut": {"file": lambda h: Endpoint.file(Endpoint, b"{", length=500)(h)},
    "an ETag that leaves the cache": {
        "file": lambda h: Endpoint.file(Endpoint, etag="../../../../evil")(h)
    },
    "another commit for a file": {
        "file": lambda h: Endpoint.file(Endpoint, X_Repo_Commit="../../evil")(h)
    },
    "a name that leaves the cache": {
        "tree": Endpoint.page(
            200, json.dumps([{**TREE[0], "path": "../../../../evil.json"}]).encode()
        )
    },
    "an absolute name": {
        "tree": Endpoint.page(200, json.dumps([{**TREE[0], "path": "/evil.json"}]).encode())
    },
}


QUICK = {
    "a page in place of the model",
    "a list",
    "deep JSON",
    "a commit that leaves the cache",
    "an ETag that leaves the cache",
    "a name that leaves the cache",
    "silent info",
    "drip file",
}


def cases(names):
    return [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in names]


@pytest.mark.parametrize("case", cases(NOT_THE_HUB))
def test_an_answer_that_is_not_the_hubs_ends_with_4_and_names_the_endpoint(
    endpoint, tmp_path, monkeypatch, capfd, case
):
    monkeypatch.setattr(hub, "STALL_S", 3.0)
    endpoint.answers |= NOT_THE_HUB[case]
    with pytest.raises(ResourceError) as caught:
        resolve_model("org/model")
    assert caught.value.code in ("E_DOWNLOAD", "E_HUB_UNREACHABLE")
    assert endpoint.url in caught.value.message
    assert caught.value.hint
    assert "Traceback" not in capfd.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} <= {"hf"}
    assert not list(tmp_path.rglob("*evil*"))


@pytest.mark.parametrize("url", ["http://[", "https://\x1b[31m"])
def test_an_endpoint_that_is_no_url_is_a_usage_error(tmp_path, monkeypatch, url):
    monkeypatch.setenv("HF_ENDPOINT", url)
    for place in ("org/model", str(tmp_path)):
        with pytest.raises(UsageError, match="not a URL"):
            resolve_model(place)


SLOW = {
    f"{how} {kind}": {kind: how}
    for how, kind in (
        ("silent", "info"),
        ("silent", "file"),
        ("drip", "file"),
        ("drip_headers", "info"),
    )
}


@pytest.mark.parametrize("case", cases(SLOW))
def test_an_endpoint_that_is_slow_is_given_up(endpoint, monkeypatch, case):
    [(kind, how)] = SLOW[case].items()
    monkeypatch.setattr(hub, "METADATA_S", 3.0)
    monkeypatch.setattr(hub, "STALL_S", 2.0)
    endpoint.answers[kind] = getattr(endpoint, how)
    start = time.monotonic()
    with pytest.raises(ResourceError) as caught:
        resolve_model("org/model")
    assert caught.value.code == ("E_HUB_UNREACHABLE" if kind == "info" else "E_DOWNLOAD")
    assert endpoint.url in caught.value.message
    assert time.monotonic() - start < 15


def test_a_folder_that_may_not_be_entered_is_not_looked_for_in_the_hub(monkeypatch):
    def is_there(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(hub, "is_there", is_there)
    with pytest.raises(CheckpointRefused, match="org/model cannot be read: Permission denied"):
        resolve_model("org/model")


def test_a_model_in_the_cache_is_used_when_the_endpoint_fails(endpoint, monkeypatch):
    folder = resolve_model("org/model")
    monkeypatch.setattr(hub, "METADATA_S", 3.0)
    endpoint.answers["info"] = endpoint.silent
    assert resolve_model("org/model") == folder
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        monkeypatch.setenv(name, "1")
        assert resolve_model("org/model") == folder
        with pytest.raises(ResourceError, match=f"{name} is set"):
            resolve_model("org/other")
        monkeypatch.setenv(name, "0")


@pytest.mark.slow
@pytest.mark.parametrize("how", ["page", "silent"])
def test_a_data_set_of_an_endpoint_that_does_not_behave_ends_with_4(endpoint, monkeypatch, how):
    monkeypatch.setattr(isolated, "HUB_S", 8.0)
    answer = Endpoint.page(200, b"<html>") if how == "page" else getattr(endpoint, how)
    endpoint.answers["info"] = answer
    with pytest.raises(ResourceError) as caught:
        check_source(CalibrationSpec("org/data"))
    assert caught.value.code in ("E_DOWNLOAD", "E_HUB_UNREACHABLE")
    assert endpoint.url in caught.value.message
