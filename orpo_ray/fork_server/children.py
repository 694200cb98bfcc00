"""Wait for sockets and for the end of forks at once."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
from collections.abc import Iterator
from typing import Any


class Children:
    """The forks of this process, whose ends wake it up as sockets do."""

    def __init__(self) -> None:
        self._ended, self._ended_write = os.pipe()
        os.set_blocking(self._ended_write, False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._ended, selectors.EVENT_READ)
        signal.set_wakeup_fd(self._ended_write)
        signal.signal(signal.SIGCHLD, lambda *_: None)

    def register(self, file: Any, data: Any = None) -> None:
        """Wait for input on a file too."""
        self._selector.register(file, selectors.EVENT_READ, data)

    def unregister(self, file: Any) -> None:
        """Stop waiting for a file."""
        if file in self._selector.get_map():
            self._selector.unregister(file)

    def wait(self, seconds: float | None = None) -> list[selectors.SelectorKey] | None:
        """Return the files with input; an empty list if only forks have ended. Returns None after `seconds`."""
        keys = [key for key, _ in self._selector.select(seconds)]
        if any(key.fileobj == self._ended for key in keys):
            os.read(self._ended, 4096)
        return [key for key in keys if key.fileobj != self._ended] if keys else None

    def ended(self) -> Iterator[tuple[int, int]]:
        """Yield the process id of each fork that has ended, and its exit code, which is negative for a signal."""
        with contextlib.suppress(ChildProcessError):  # there are no forks
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    return
                yield pid, os.waitstatus_to_exitcode(status)

    def close(self) -> None:
        """Forget all of this in a fork."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self._selector.close()
        os.close(self._ended)
        os.close(self._ended_write)
