"""A launcher's request for a process, and the decision whether a fork can replace a new Python."""

from __future__ import annotations

import json
import os
import socket
import sys
from dataclasses import dataclass, field
from typing import Any

from orpo_ray.fork_server.launcher import LENGTH

LIMIT = 8 << 20  # bytes of a request
SECONDS = 10.0  # for all of a request to arrive
# What a Python reads once, at its start, and Ray when it is imported.
_READ_BY_PYTHON = ("PYTHONPATH", "PYTHONHOME", "LD_PRELOAD")
_READ_BY_RAY = ("RAY_JOB_ID", "RAY_RAYLET_PID")


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

    def can_be_forked(self) -> bool:
        """Say whether a fork of this process is what a new Python would be."""
        wanted = self.environment | self.variables
        same = _READ_BY_PYTHON + (_READ_BY_RAY if "ray" in sys.modules else ())
        return (
            self.is_python
            and len(self.files) == 3
            and self.command[:1] != []
            and os.path.basename(self.command[0]) == "default_worker.py"
            and self.context.get("py_executable") in (None, sys.executable)
            and not self.context.get("command_prefix")
            and not self.context.get("override_worker_entrypoint")
            and all(wanted.get(name) == os.environ.get(name) for name in same)
        )


def receive(connection: socket.socket) -> Request | None:
    """Read a request. Returns None, and closes the connection, if it cannot be read or forked."""
    files: list[int] = []
    try:
        connection.settimeout(SECONDS)
        head, files, _, _ = socket.recv_fds(connection, LENGTH.size, 3)
        body = _read(connection, LENGTH.unpack(head)[0])
        connection.settimeout(None)
        request = Request(connection, files, **json.loads(body))
        if request.can_be_forked():
            return request
    except (OSError, ValueError, TypeError, LookupError):
        pass  # the launcher becomes an ordinary Python
    for descriptor in files:
        os.close(descriptor)
    connection.close()
    return None


def _read(connection: socket.socket, length: int) -> bytes:
    if length > LIMIT:
        raise ValueError(f"a request of {length} bytes")
    parts = bytearray()
    while len(parts) < length:
        data = connection.recv(length - len(parts))
        if not data:
            raise ValueError("a request that ends early")
        parts += data
    return bytes(parts)
