"""The process that has imported Ray for one raylet and job, and makes a fork for each of their workers."""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import runpy
import signal
import socket
import sys

import numpy

from orpo_ray.fork_server.children import Children
from orpo_ray.fork_server.launcher import ANSWER
from orpo_ray.fork_server.preload import preload_ray
from orpo_ray.fork_server.request import Request, taken_over

IDLE_S = 300.0  # without a worker: a raylet may have ended long ago
_PR_SET_PDEATHSIG = 1  # of linux/prctl.h


class Workers:
    """Answers launchers, and tells each how its process ended.

    Args:
        requests: where the requests after the first one come from.
        first: the first request, in whose environment Ray is imported.
    """

    def __init__(self, requests: socket.socket, first: Request) -> None:
        self._requests, self._first = requests, first
        self._children = Children()
        self._launchers: dict[int, socket.socket] = {}  # by the process id of the fork

    def serve(self) -> Request | None:
        """Serve until there is nothing to do. Returns None then, and in each fork its request."""
        os.environ.clear()
        os.environ.update(self._first.environment)
        preload_ray()
        self._children.register(self._requests)
        if self._fork(self._first) == 0:
            return self._first
        while True:
            ready = self._children.wait(IDLE_S)
            if ready is None and not self._launchers:
                return None
            for key in ready or ():
                if key.fileobj is self._requests:
                    try:
                        request = taken_over(self._requests)
                    except EOFError:
                        return None
                    if request is not None and self._fork(request) == 0:
                        return request
                elif key.data in self._launchers:
                    # A launcher says nothing: this one was killed, and raylet no longer wants its process.
                    self._children.unregister(key.fileobj)
                    os.kill(key.data, signal.SIGKILL)
            for pid, code in self._children.ended():
                self._report(pid, code)

    def _fork(self, request: Request) -> int | None:
        """Fork; return the process id, and 0 in the fork; None if there can be no more processes."""
        try:
            pid = os.fork()
        except OSError:
            request.close()  # the launcher becomes an ordinary Python
            return None
        if pid == 0:
            self._children.close()
            for file in (self._requests, request.connection, *self._launchers.values()):
                file.close()
            return pid
        self._launchers[pid] = request.connection
        self._children.register(request.connection, pid)
        with contextlib.suppress(OSError):
            request.connection.sendall(ANSWER.pack(1))
        request.close_files()
        return pid

    def _report(self, pid: int, code: int) -> None:
        launcher = self._launchers.pop(pid, None)
        if launcher is None:  # a process that a library has started
            return
        self._children.unregister(launcher)
        with launcher, contextlib.suppress(OSError):
            launcher.sendall(ANSWER.pack(code if code >= 0 else 128 - code))


def become_worker(request: Request) -> None:
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
    # Ray blocks Ctrl-C in raylet, and its workers inherit that.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    random.seed()
    numpy.random.seed()
    set_threads()
    sys.argv = request.command
    sys.path[0] = os.path.dirname(request.command[0])
    runpy.run_path(request.command[0], run_name="__main__")


def end_with(parent: int) -> None:
    """Let this process be killed when its parent, the process with this id, ends.

    Ray's C++ code can deadlock at the end of a process, and raylet forgets such a process. It would stay for ever.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # the parent has ended in the meantime
        os._exit(1)


def set_threads() -> None:
    """Follow OMP_NUM_THREADS, which Ray sets for each worker, and which torch read before the fork."""
    threads = os.environ.get("OMP_NUM_THREADS", "")
    torch = sys.modules.get("torch")
    if torch is not None and threads.isdigit() and int(threads) > 0:
        torch.set_num_threads(int(threads))
