"""Start the fork server of this process, and let a Ray that is started here use it."""

from __future__ import annotations

import atexit
import contextlib
import glob
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

SWITCH = "ORPO_RAY_FORK"
"""Environment variable: 0 lets Ray start every process anew."""
PYTHON = "python"
SOCKET = "socket"
LOG = "log"
BACKLOG = 128  # requests that wait
# CUDA cannot be used in a fork of a process that has asked for a device, as some libraries do when imported.
_ACCELERATORS = ("/dev/nvidia[0-9]*", "/dev/nvidiactl", "/dev/kfd", "/dev/accel*", "/dev/dxg", "/dev/vfio/[0-9]*")
# What workers and encoders need. None of it imports Ray, which a process for each job does (workers.py).
_MODULES = (
    "torch",
    "transformers.models.auto",
    "transformers.processing_utils",
    "pyarrow.dataset",
    "pandas",
    "deepspeed",
)
# What Ray starts as the Python of its workers.
_python: Path | None = None


def start_fork_server(modules: Iterable[str] = ()) -> None:
    """Start the fork server of this process, unless it runs or cannot be used; see `forked_workers`.

    The server imports while this process goes on, and ends with this process. Call this before imports that take
    seconds.

    Args:
        modules: what to import besides what every run needs.
    """
    global _python
    if _python is None and _is_usable():
        _python = _start((*_MODULES, *modules))


@contextlib.contextmanager
def forked_workers() -> Iterator[None]:
    """Let the Ray that is started in this context take its workers from the fork server.

    Forks cannot be used with an accelerator and outside Linux; there, Ray starts new processes.
    """
    start_fork_server()
    real = sys.executable
    # Ray takes the Python of its workers from here, and has no option for it.
    sys.executable = str(_python or real)
    try:
        yield
    finally:
        sys.executable = real


def _is_usable() -> bool:
    return (
        sys.platform == "linux"
        and os.environ.get(SWITCH) != "0"
        and not any(glob.glob(pattern) for pattern in _ACCELERATORS)
    )


def _start(modules: tuple[str, ...]) -> Path:
    folder = Path(tempfile.mkdtemp(prefix="orpo-ray-"))  # only this user can open it, and the socket in it
    # Made here, so that a launcher can connect from now on, and waits if the server is not there yet.
    with socket.socket(socket.AF_UNIX) as listener, (folder / LOG).open("w") as log:
        listener.bind(str(folder / SOCKET))
        listener.listen(BACKLOG)
        server = subprocess.Popen(
            [sys.executable, "-m", "orpo_ray.fork_server.server", str(listener.fileno()), str(folder), *modules],
            pass_fds=[listener.fileno()],
            stdin=subprocess.PIPE,  # closed at the end of this process, whatever ends it
            stdout=log,
            stderr=log,
            start_new_session=True,  # Ctrl-C is for this process
        )
    atexit.register(_end, server, folder)
    python = folder / PYTHON
    launcher = Path(__file__).with_name("launcher.py")
    # -I and -S: the launcher imports next to nothing, and starts within 20 ms.
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "{launcher}" "{folder / SOCKET}" "$@"\n')
    python.chmod(0o700)
    return python


def _end(server: subprocess.Popen[bytes], folder: Path) -> None:
    if "ray" in sys.modules:  # before its workers are killed, which end with the server
        sys.modules["ray"].shutdown()
    server.terminate()  # does not wait for its imports, as after an error in a recipe
    server.wait()
    shutil.rmtree(folder, ignore_errors=True)
