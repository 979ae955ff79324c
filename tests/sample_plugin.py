"""The fixture that makes the checkpoints of `samples.py`, once a session; QTOOL_TEST_SAMPLES names a folder that keeps them for the next."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("samples.py")
EXAMPLE = SCRIPT.parents[1] / "examples" / "tiny-python-llama"


@pytest.fixture(scope="session")
def sample(tmp_path_factory):
    """A function: the name of a sample, e.g. `ct/W4A16`, to its folder. The first use of a library makes all its samples."""
    root = tmp_path_factory.getbasetemp()
    if os.environ.get("PYTEST_XDIST_WORKER"):
        root = root.parent
    root = Path(os.environ.get("QTOOL_TEST_SAMPLES") or root / "samples")

    def get(name: str) -> Path:
        library = name.split("/")[0]
        folder = root / library
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (folder / "done").exists():
                run = subprocess.run([sys.executable, SCRIPT, library, EXAMPLE, folder], cwd=folder, capture_output=True, text=True)
                assert run.returncode == 0, run.stderr[-3000:]
                (folder / "done").touch()
        return root / name

    return get
