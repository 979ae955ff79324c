"""`EngineChild`: the engine's process as the operating system sees it, from start to end.

This module imports little, so that the process starts before the server's own imports, which take
a second.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from typing import Self

from qtool.serve.backend.messages import Start, encode
from qtool.serve.settings import ServeSettings

END_TIMEOUT_S = 5.0  # for the engine to end by itself
# On a CPU oneDNN keeps a kernel for each number of tokens that a step has had. By default a
# thousand, which takes hours of mixed load to fill; these are full within minutes.
SMALL_CACHES = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128", "LRU_CACHE_CAPACITY": "128"}


class EngineChild:
    """The engine's process, started when this is made. It imports torch and loads the model at
    once. A context manager, whose exit ends the process.

    Args:
        settings: name the model, and have the engine's options.
    """

    def __init__(self, settings: ServeSettings) -> None:
        start = Start(
            settings.model_path,
            options=vars(settings.engine_config),
            log_level=settings.log_level.upper(),
        )
        self.start_time_s = time.monotonic()
        self.connection, theirs = socket.socketpair()
        """For messages; the engine ends when it is closed."""
        command = [sys.executable, "-m", "qtool.serve.backend.engine_process", str(theirs.fileno())]
        with theirs:
            self.process = subprocess.Popen(
                command,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=sys.stderr,
                start_new_session=True,  # a terminal's signals to the group are for the server
                env={**SMALL_CACHES, **os.environ},
            )
        with contextlib.suppress(OSError):  # it has ended, which the next read reports
            self.connection.sendall(encode(start))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.connection.close()
        self.wait()

    def wait(self) -> None:
        """Wait until the process has ended, after its connection was closed; kill it after
        `END_TIMEOUT_S`.
        """
        try:
            self.process.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
