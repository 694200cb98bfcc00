"""The process whose copies are Ray's workers: imports what they need, then makes a copy for each raylet and job.

    python -m orpo_ray.fork_server.server DESCRIPTOR FOLDER MODULE... < PIPE

The descriptor is of a listening socket in the folder. The server ends when the pipe is closed, and removes the folder.
A copy (workers.py) imports Ray itself, in the environment that raylet gives the workers of a job, and makes one fork
for each worker. So this process never imports Ray, which reads raylet's process id and the job when it is imported.
"""

from __future__ import annotations

import os
import shutil
import socket
import sys
import time
from typing import Any

from orpo_ray.fork_server.children import Children
from orpo_ray.fork_server.preload import preload
from orpo_ray.fork_server.request import Request, hand_over, receive
from orpo_ray.fork_server.workers import Workers, become_worker, end_with

RETRY_S = 0.1  # after a launcher that could not be heard


def main() -> None:
    descriptor, folder, *modules = sys.argv[1:]
    preload(modules)
    if "ray" in sys.modules:
        raise ImportError("Ray was imported without the environment of a worker")
    server = os.getpid()
    workers = Server(socket.socket(fileno=int(descriptor))).serve()
    if workers is None:
        shutil.rmtree(folder)
        return
    end_with(server)
    parent = os.getpid()
    request = workers.serve()
    if request is not None:
        end_with(parent)
        become_worker(request)


class Server:
    """Takes the requests of launchers, and passes each on to the process for its raylet and job."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self._children = Children()
        self._jobs: dict[Any, tuple[int, socket.socket]] = {}  # process id, and where it takes requests

    def serve(self) -> Workers | None:
        """Serve until the pipe on standard input is closed. Returns None then, and in each fork what it serves."""
        for file in (sys.stdin.buffer, self._listener):
            self._children.register(file)
        while True:
            for key in self._children.wait() or ():
                if key.fileobj is sys.stdin.buffer:
                    return None
                if key.fileobj is self._listener:
                    workers = self._accept()
                    if workers is not None:
                        return workers
            for pid, _ in self._children.ended():
                self._forget(pid)

    def _accept(self) -> Workers | None:
        """Answer a launcher. What cannot be done for want of processes or files is left to an ordinary Python."""
        try:
            request = receive(self._listener.accept()[0])
        except OSError:
            time.sleep(RETRY_S)
            return None
        if request is None:
            return None
        try:
            workers = self._pass_on(request)
        except OSError:
            workers = None
        if workers is None:
            request.close()
        return workers

    def _pass_on(self, request: Request) -> Workers | None:
        """Give a request to the process for its job. Returns in that process, if it is new, what it serves."""
        if request.job in self._jobs:
            pid, requests = self._jobs[request.job]
            try:
                hand_over(request, requests)
                return None
            except (BrokenPipeError, ConnectionResetError):  # it has ended because it had nothing to do
                self._forget(pid)
        here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)  # keeps messages apart
        with there:
            pid = os.fork()
            if pid == 0:
                self._children.close()
                for file in (self._listener, here, *(requests for _, requests in self._jobs.values())):
                    file.close()
                return Workers(there.dup(), request)
        self._jobs[request.job] = (pid, here)
        return None

    def _forget(self, pid: int) -> None:
        for job, (process, requests) in list(self._jobs.items()):
            if process == pid:
                requests.close()
                del self._jobs[job]


if __name__ == "__main__":
    main()
