"""What Ray starts as the Python of a worker: asks the fork server for a process, and ends when that process ends.

    python -I -S launcher.py SOCKET ARGUMENT...

Imports nothing of this package and little else, so that it starts within 20 ms. What is no worker, or cannot be forked,
becomes an ordinary Python.
"""

import json
import os
import socket
import struct
import sys

LENGTH = struct.Struct("!I")  # of a request in bytes, before it
ANSWER = struct.Struct("!i")  # what the server sends: 1 when it has forked, then the exit status


def main() -> None:
    address, *arguments = sys.argv[1:]
    if arguments and arguments[0].endswith("setup_worker.py"):
        status = run_forked(address, arguments)
        if status is not None:
            os._exit(status)
    os.execv(sys.executable, [sys.executable, *arguments])


def run_forked(address: str, arguments: list[str]) -> int | None:
    """Return the exit status of the forked worker after its end; None if there is no fork."""
    request = json.dumps({"arguments": arguments, "environment": dict(os.environ), "folder": os.getcwd()}).encode()
    with socket.socket(socket.AF_UNIX) as server:
        try:
            server.connect(address)
            socket.send_fds(server, [LENGTH.pack(len(request))], [0, 1, 2])
            server.sendall(request)
            if wait_for_answer(server) is None:
                return None
        except OSError:
            return None
        status = wait_for_answer(server)
        return 1 if status is None else status  # the server is gone, and with it who knows the status


def wait_for_answer(server: socket.socket) -> int | None:
    """Return a number that the server sends; None if it closes the connection."""
    data = server.recv(ANSWER.size, socket.MSG_WAITALL)
    return ANSWER.unpack(data)[0] if len(data) == ANSWER.size else None


if __name__ == "__main__":
    main()
