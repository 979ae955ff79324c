"""The fixture that makes the checkpoints of `samples.py`, once a session; QTOOL_TEST_SAMPLES names
a folder that keeps them for the next.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from support import EXAMPLE, TESTS

LIBRARIES = ("ct", "gptq", "modelopt")


@pytest.fixture(scope="session")
def sample(tmp_path_factory):
    """A function: the name of a sample, e.g. `ct/W4A16`, to its folder. The first use makes them
    all, the libraries side by side.
    """
    root = tmp_path_factory.getbasetemp()
    if os.environ.get("PYTEST_XDIST_WORKER"):
        root = root.parent
    root = Path(os.environ.get("QTOOL_TEST_SAMPLES") or root / "samples")

    def get(name: str) -> Path:
        root.mkdir(parents=True, exist_ok=True)
        with (root / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            runs = {
                library: start(library, root / library)
                for library in LIBRARIES
                if not (root / library / "done").exists()
            }
            for library, run in runs.items():
                assert run.wait() == 0, (root / library / "log").read_text()[-3000:]
                (root / library / "done").touch()
        return root / name

    return get


@pytest.fixture(scope="module")
def one_thread():
    """The tiny model's matrices are too small for two threads, which only wait for each other on a
    busy machine.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def start(library: str, folder: Path) -> subprocess.Popen[bytes]:
    folder.mkdir(exist_ok=True)
    with (folder / "log").open("w") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "support.samples", library, EXAMPLE, folder],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS.parent}"},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
