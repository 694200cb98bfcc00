"""A launcher's request for a process, and the decision whether a fork can replace a new Python."""

from __future__ import annotations

import json
import os
import socket
import struct
import sys
from dataclasses import dataclass, field
from typing import Any

from orpo_ray.fork_server.launcher import LENGTH

LIMIT = 8 << 20  # bytes of a request
SECONDS = 10.0  # for all of a request to arrive
STANDARD_FILES = 3
# What a Python reads once, at its start, and what libraries and Ray read when they are imported.
_READ_BY_PYTHON = ("PYTHONPATH", "PYTHONHOME", "LD_PRELOAD")
_READ_BY_LIBRARIES = ("HF_", "TRANSFORMERS_")  # how names begin
_READ_BY_RAY = ("RAY_RAYLET_PID", "RAY_JOB_ID")


@dataclass
class Request:
    """One process that Ray wants."""

    connection: socket.socket
    files: list[int]
    """Descriptors of standard input, output and error."""
    environment: dict[str, str]
    folder: str
    """Working folder."""
    arguments: list[str]
    """What follows the Python: `setup_worker.py` and its arguments."""
    command: list[str] = field(init=False)
    """What `setup_worker.py` would start: `default_worker.py` and its arguments."""
    context: dict[str, Any] = field(init=False)
    """The context of the runtime environment, which `setup_worker.py` applies."""
    is_python: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        self.command, self.context = [], {}
        for argument in self.arguments[1:]:
            name, _, value = argument.partition("=")
            if name == "--serialized-runtime-env-context":
                self.context = json.loads(value)
            elif name == "--language":
                self.is_python = value == "PYTHON"
            else:
                self.command.append(argument)

    @property
    def variables(self) -> dict[str, str]:
        """Environment variables of the runtime environment."""
        found: dict[str, str] = self.context.get("env_vars") or {}
        return found

    @property
    def job(self) -> tuple[str | None, ...]:
        """Process id of the raylet, and job: only their workers can be forks of one process that has imported Ray."""
        wanted = self.environment | self.variables
        return tuple(wanted.get(name) for name in _READ_BY_RAY)

    def can_be_forked(self) -> bool:
        """Say whether a fork of this process is what a new Python would be."""
        wanted = self.environment | self.variables
        names = {name for name in (*wanted, *os.environ) if name.startswith(_READ_BY_LIBRARIES)}
        return (
            self.is_python
            and len(self.files) == STANDARD_FILES
            and self.command[:1] != []
            and os.path.basename(self.command[0]) == "default_worker.py"
            and self.context.get("py_executable") in (None, sys.executable)
            and not self.context.get("command_prefix")
            and not self.context.get("override_worker_entrypoint")
            and all(wanted.get(name) == os.environ.get(name) for name in (*_READ_BY_PYTHON, *names))
        )

    def close_files(self) -> None:
        """Close the standard files, which another process has now."""
        for descriptor in self.files:
            os.close(descriptor)
        self.files.clear()

    def close(self) -> None:
        """Leave the request to another process."""
        self.close_files()
        self.connection.close()


def receive(connection: socket.socket) -> Request | None:
    """Read a launcher's request. Returns None, and closes the connection, if it cannot be read or forked."""
    files: list[int] = []
    try:
        connection.settimeout(SECONDS)
        fields = _read_message(connection, files)
        connection.settimeout(None)
        request = Request(connection, files, **fields)
        if request.can_be_forked():
            return request
    except (OSError, ValueError, TypeError, LookupError, struct.error):
        pass  # the launcher becomes an ordinary Python
    for descriptor in files:
        os.close(descriptor)
    connection.close()
    return None


def hand_over(request: Request, to: socket.socket) -> None:
    """Send a request, with its open files, to another process, without waiting for that.

    Args:
        request: the request, which stays open here.
        to: a socket that keeps messages apart.

    Raises:
        BrokenPipeError, ConnectionResetError: the process has ended.
        OSError: the request cannot be sent now, as when many wait already.
    """
    fields = {"arguments": request.arguments, "environment": request.environment, "folder": request.folder}
    files = [request.connection.fileno(), *request.files]
    socket.send_fds(to, [json.dumps(fields).encode()], files, socket.MSG_DONTWAIT)


def taken_over(from_: socket.socket) -> Request | None:
    """Read what `hand_over` sends. Returns None, and closes what has come, if that is not all of a request.

    Raises:
        EOFError: the other side has ended.
    """
    body, files, _, _ = socket.recv_fds(from_, LIMIT, 1 + STANDARD_FILES)
    if not body:
        raise EOFError
    try:
        connection, *standard = files
        if len(standard) == STANDARD_FILES:
            return Request(socket.socket(fileno=connection), standard, **json.loads(body))
    except ValueError:
        pass  # no files have come, as where there are too many open ones
    for descriptor in files:
        os.close(descriptor)
    return None


def _read_message(connection: socket.socket, files: list[int]) -> dict[str, Any]:
    """Read a launcher's message. Adds the files that come with it to `files`."""
    head, received, _, _ = socket.recv_fds(connection, LENGTH.size, STANDARD_FILES)
    files += received
    length = LENGTH.unpack(head)[0]
    if length > LIMIT:
        raise ValueError(f"a request of {length} bytes")
    parts = bytearray()
    while len(parts) < length:
        data = connection.recv(length - len(parts))
        if not data:
            raise ValueError("a request that ends early")
        parts += data
    found: dict[str, Any] = json.loads(parts)
    return found
