"""Stop a run on SIGINT or SIGTERM: the first one saves a checkpoint and ends the run, the second ends it at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

from orpo_ray.errors import OrpoRayError

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class RunStopped(OrpoRayError):
    """A signal ended the run before its last step.

    Args:
        number: of the signal.
        saved: the step of the run's latest checkpoint, as far as this process knows.
    """

    title = "stopped"

    def __init__(self, number: int, saved: int | None) -> None:
        self.number, self.saved = number, saved
        self.exit_code = 128 + number  # what a shell expects of a program that a signal ended
        kept = "without a new checkpoint" if saved is None else f"with a checkpoint of step {saved:,}"
        super().__init__(f"{signal.Signals(number).name} {kept}; the same command resumes from the latest checkpoint")

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), (self.number, self.saved))


class StopSignals:
    """Context manager that turns the first signal into a request to stop.

    The second signal, or the end of the grace period, ends the body with RunStopped. Outside the main thread, where no
    handler can be set, signals stay as they are.

    Args:
        request: asks the workers to stop; called once, from the signal handler.
        grace_s: seconds from the first signal to the end.
    """

    def __init__(self, request: Callable[[], None], grace_s: float) -> None:
        self._request, self._grace = request, grace_s
        self.received: int | None = None
        self._error: BaseException | None = None
        self._before: dict[int, Any] = {}
        self._timer: threading.Timer | None = None

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._error is not None and isinstance(error, KeyboardInterrupt):
            raise self._error from None

    def abort(self, error: BaseException) -> None:
        """End the body in the main thread with an error, from any thread."""
        self._error = error
        os.kill(os.getpid(), signal.SIGTERM)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._error is None and self.received is not None:
            self._error = RunStopped(self.received, None)
        if self._error is not None:
            raise KeyboardInterrupt  # of all exceptions, the only one that ends a wait in `ray.get`
        self.received = number
        # A signal ends the wait of the main thread, as the second one does.
        self._timer = threading.Timer(self._grace, os.kill, (os.getpid(), number))
        self._timer.daemon = True
        self._timer.start()
        self._request()
