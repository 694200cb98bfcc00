"""The process whose copies are Ray's workers: imports what they need, then forks one for each request.

    python -m orpo_ray.fork_server.server DESCRIPTOR FOLDER MODULE... < PIPE

The descriptor is of a listening socket in the folder. The server ends when the pipe is closed, and removes the folder.

Ray itself is imported at the first request, in the environment that raylet gives its workers: Ray reads some of it,
such as raylet's process id, when it is imported. Only workers of that raylet and job are forked.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import os
import random
import runpy
import selectors
import shutil
import signal
import socket
import sys
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import numpy

from orpo_ray.fork_server.launcher import ANSWER
from orpo_ray.fork_server.request import Request, receive

_PR_SET_PDEATHSIG = 1  # of linux/prctl.h
# What Ray's workers and Ray Train's controller import besides.
WITH_RAY = (
    "ray.train",
    "ray.tune",
    "ray.data",
    "ray.data._internal.execution.streaming_executor",
    "ray.data._internal.planner.planner",
    "pydantic.v1",
    "pyarrow.json",
    "orpo_ray.training.launch",
    "orpo_ray.training.worker",
    "orpo_ray.training.replicated_engine",
)


def main() -> None:
    descriptor, folder, *modules = sys.argv[1:]
    preload(modules)
    server = os.getpid()
    listener = socket.socket(fileno=int(descriptor))
    request = Server(listener).serve()
    if request is None:
        shutil.rmtree(folder)
    else:
        become_worker(request, server)


def preload(modules: Iterable[str]) -> None:
    """Import modules, and take them out of the reach of the collector, which would make every fork copy them."""
    gc.disable()  # it would look through all modules again and again: a seventh of the time
    # DeepSpeed's autotuner, which no run uses, imports MLflow where it is installed: more than a second.
    sys.modules.setdefault("mlflow", None)  # type: ignore[arg-type]
    for name in modules:
        importlib.import_module(name)
    if sys.modules["mlflow"] is None:
        del sys.modules["mlflow"]
    gc.enable()
    gc.freeze()


def preload_ray() -> None:
    """Import Ray and what imports it, without use of Ray's random generator, whose state forks would share.

    Two workers that draw the same identifiers, say of a task, end an actor that both of them call.
    """
    import ray.actor

    kind: Any = ray.actor.ActorClassID
    # `@ray.remote` draws one for each class.
    vars(ray.actor)["ActorClassID"] = SimpleNamespace(from_random=lambda: kind(os.urandom(kind.size())))
    preload(WITH_RAY)
    vars(ray.actor)["ActorClassID"] = kind


class Server:
    """Answers launchers, and tells each how its process ended."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self._launchers: dict[int, socket.socket] = {}  # by the process id of the fork
        self._ended, self._ended_write = os.pipe()
        os.set_blocking(self._ended_write, False)
        self._selector = selectors.DefaultSelector()

    def serve(self) -> Request | None:
        """Serve until the pipe on standard input is closed. Returns None then, and in each fork its request."""
        signal.set_wakeup_fd(self._ended_write)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        for file in (sys.stdin.buffer, self._ended, self._listener):
            self._selector.register(file, selectors.EVENT_READ)
        while True:
            for key, _ in self._selector.select():
                if key.fileobj is sys.stdin.buffer:
                    return None
                if key.fileobj is self._listener:
                    request = receive(self._listener.accept()[0])
                    if request is not None and self._fork(request) == 0:
                        return request
                elif key.fileobj == self._ended:
                    os.read(self._ended, 4096)
                    self._report_ended()
                elif key.data in self._launchers:
                    # A launcher says nothing: this one was killed, and raylet no longer wants its process.
                    self._selector.unregister(key.fileobj)
                    os.kill(key.data, signal.SIGKILL)

    def _fork(self, request: Request) -> int:
        """Fork; return the process id, and 0 in the fork."""
        if "ray" not in sys.modules:
            os.environ.update(request.environment)
            preload_ray()
        pid = os.fork()
        if pid == 0:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            self._selector.close()
            for file in (self._listener, request.connection, *self._launchers.values()):
                file.close()
            os.close(self._ended)
            os.close(self._ended_write)
            return pid
        for descriptor in request.files:
            os.close(descriptor)
        self._launchers[pid] = request.connection
        self._selector.register(request.connection, selectors.EVENT_READ, pid)
        with contextlib.suppress(OSError):
            request.connection.sendall(ANSWER.pack(1))
        return pid

    def _report_ended(self) -> None:
        while self._launchers:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            launcher = self._launchers.pop(pid)
            with contextlib.suppress(KeyError):
                self._selector.unregister(launcher)
            code = os.waitstatus_to_exitcode(status)
            with launcher, contextlib.suppress(OSError):
                launcher.sendall(ANSWER.pack(code if code >= 0 else 128 - code))


def become_worker(request: Request, server: int) -> None:
    """Run Ray's `default_worker.py` in this process, as a new Python would."""
    from ray._private.utils import update_envs
    from ray._raylet import Config  # type: ignore[attr-defined]

    for number, file in enumerate(request.files):
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(request.environment)
    update_envs(request.variables)
    Config.initialize("")  # reads Ray's settings from the environment once more
    os.chdir(request.folder)
    os.setpgrp()  # raylet ends a worker's whole process group
    end_with(server)
    # Ray blocks Ctrl-C in raylet, and its workers inherit that.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    random.seed()
    numpy.random.seed()
    set_threads()
    sys.argv = request.command
    sys.path[0] = os.path.dirname(request.command[0])
    runpy.run_path(request.command[0], run_name="__main__")


def end_with(server: int) -> None:
    """Let this process be killed when the server ends.

    Ray's C++ code can deadlock at the end of a process, and raylet forgets such a process. It would stay for ever.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != server:  # the server has ended in the meantime
        os._exit(1)


def set_threads() -> None:
    """Follow OMP_NUM_THREADS, which Ray sets for each worker, and which torch read before the fork."""
    threads = os.environ.get("OMP_NUM_THREADS", "")
    torch = sys.modules.get("torch")
    if torch is not None and threads.isdigit() and int(threads) > 0:
        torch.set_num_threads(int(threads))


if __name__ == "__main__":
    main()
