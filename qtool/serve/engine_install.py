"""Where vLLM or SGLang is installed: the interpreter that runs it, and its version there.

They pin other versions of packages than the quantization libraries do, so an engine usually has an
environment of its own.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import cache

from qtool.errors import ResourceError
from qtool.inspection.engines.rules import numbers

PROBE_TIMEOUT_S = 60
MAX_SHEBANG = 4096  # bytes
PROBE = """
import importlib.metadata, importlib.util, json, sys
found = importlib.util.find_spec(sys.argv[1])
try:
    version = importlib.metadata.version(sys.argv[1])
except importlib.metadata.PackageNotFoundError:
    version = None
print(json.dumps([found is not None and found.origin is not None, version]))
"""


@dataclass(frozen=True)
class Installation:
    """An engine in the environment of an interpreter."""

    python: str
    """The interpreter."""

    is_there: bool
    """Whether the engine can be imported there."""

    version: str | None
    """None when it is not there or has no version number."""


def find_installation(engine: str, python: str | None) -> Installation:
    """Return where ``engine`` is installed.

    Args:
        engine: the name of its package.
        python: the interpreter that was given. None: this one if it has the engine, else that of
            the engine's command in PATH.
    Raises: ResourceError, for an interpreter that cannot be started.
    """
    if python is not None:
        return _ask(engine, _path_of(python))
    here = _look_here(engine)
    other = None if here.is_there else _python_of_command(engine)
    return _ask(engine, other) if other else here


def _look_here(engine: str) -> Installation:
    found = importlib.util.find_spec(engine)
    try:
        version = importlib.metadata.version(engine)
    except importlib.metadata.PackageNotFoundError:
        version = None
    # a folder of that name in the working directory has no origin
    return _installation(sys.executable, found is not None and found.origin is not None, version)


@cache
def _ask(engine: str, python: str) -> Installation:
    """Return what the interpreter ``python`` has of ``engine``, which it does not import."""
    try:
        answer = subprocess.run(
            [python, "-c", PROBE, engine],
            capture_output=True,
            text=True,
            timeout=PROBE_TIMEOUT_S,
            check=True,
        ).stdout
        is_there, version = json.loads(answer)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        raise _not_started(python) from error
    return _installation(python, bool(is_there), version)


def _installation(python: str, is_there: bool, version: str | None) -> Installation:
    return Installation(python, is_there, version if version and numbers(version) else None)


def _path_of(python: str) -> str:
    # a link in an environment must stay a link
    path = shutil.which(python)
    if path is None:
        raise _not_started(python)
    return path


def _not_started(python: str) -> ResourceError:
    return ResourceError(
        "E_ENGINE_PYTHON",
        f"{python} is not a Python interpreter that can be started",
        hint="check --engine-python",
    )


def _python_of_command(engine: str) -> str | None:
    """Return the interpreter in the first line of the engine's own command; None without one."""
    command = shutil.which(engine)
    if command is None:
        return None
    try:
        with open(command, "rb") as file:  # noqa: PTH123
            first = file.readline(MAX_SHEBANG).decode(errors="replace").strip()
    except OSError:
        return None
    python = first.removeprefix("#!").strip()
    return shutil.which(python) if first.startswith("#!") and "python" in python else None
