"""One writer for a run folder: a lease that its holder renews, and that a successor takes when the holder is dead.

Object stores have no locks, and clocks of two machines differ. So a holder writes a number that grows, and whoever
finds a lease watches whether the number still grows. Two runs that begin within a second in one object store may both
take the lease; the one that wrote first then finds the other's at its next renewal, and ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from types import TracebackType
from typing import Any

import psutil

from orpo_ray.errors import OrpoRayError, UserError
from orpo_ray.storage.run_folder import RunFolder

LEASE_FILE = "lease.json"
RENEW_SECONDS = 5.0
DEAD_SECONDS = 30.0
"""A holder on another machine that has not renewed for this long is dead."""


class LeaseLost(OrpoRayError):
    """Another run took over the run folder, because this one had not renewed its lease for too long."""


@dataclass(frozen=True)
class Holder:
    """Who holds a lease."""

    id: str
    host: str
    pid: int
    started: float
    """Start of the process in seconds since 1970, by its own machine."""
    renewals: int = 0

    @classmethod
    def this_process(cls) -> Holder:
        """Return a new holder."""
        started = psutil.Process().create_time()
        return cls(uuid.uuid4().hex, socket.gethostname(), os.getpid(), started)

    @property
    def is_local(self) -> bool:
        """Whether the holder runs, or ran, on this machine."""
        return self.host == socket.gethostname()

    @property
    def is_alive(self) -> bool:
        """Whether a local holder still runs."""
        try:
            return abs(psutil.Process(self.pid).create_time() - self.started) < 1.0
        except psutil.NoSuchProcess:
            return False


def holder_of(folder: RunFolder) -> Holder | None:
    """Read who holds, or held, the lease of a run folder; None if nobody does, or if it is being written."""
    path = folder.path / LEASE_FILE
    if folder.is_remote:
        path.unlink(missing_ok=True)
    folder.pull(LEASE_FILE)
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return Holder(**found)
    except (FileNotFoundError, ValueError, TypeError):
        return None


class Lease:
    """Context manager that holds the lease of a run folder.

    Args:
        folder: of the run; must exist.
        on_lost: called from the renewing thread if another run has taken the lease.
        wait: called once with a message before this waits for a holder that may be dead.

    Raises:
        UserError: on entering, if another run holds the lease, or the run folder cannot be written.
    """

    def __init__(
        self, folder: RunFolder, on_lost: Callable[[LeaseLost], None], wait: Callable[[str], None] = lambda text: None
    ) -> None:
        self._folder, self._on_lost, self._wait = folder, on_lost, wait
        self._own = Holder.this_process()
        self.dead: Holder | None = None
        """The holder whose lease this one has taken, once entered."""
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._renew, daemon=True)

    @property
    def id(self) -> str:
        """The id of this holder."""
        return self._own.id

    def __enter__(self) -> Lease:
        holder = holder_of(self._folder)
        if holder is not None and not self._is_dead(holder):
            raise UserError(
                f"another run writes to this run folder: process {holder.pid} on {holder.host}",
                field=self._folder.uri,
                fix="wait until it has ended, stop it, or choose another name (name=...)",
            )
        self.dead = holder
        try:
            self._write()
        except OSError as error:
            raise UserError(
                f"cannot write to the run folder: {error}",
                field="checkpoint.storage",
                value=self._folder.uri,
                fix="make room, or check your access to the folder",
            ) from None
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._end.set()
        self._thread.join()
        # A store that refuses has ended the run with its own message; the lease then ends by itself.
        with contextlib.suppress(OSError):
            holder = holder_of(self._folder)
            if holder is not None and holder.id == self._own.id:
                self._folder.delete(LEASE_FILE)

    def _is_dead(self, holder: Holder) -> bool:
        if holder.is_local:
            return not holder.is_alive
        self._wait(f"waiting for up to {DEAD_SECONDS:.0f} s: a run on {holder.host} may still write to this run folder")
        deadline = time.monotonic() + DEAD_SECONDS
        while time.monotonic() < deadline:
            time.sleep(1.0)
            now = holder_of(self._folder)
            if now is None:
                return True
            if now != holder:
                return False
        return True

    def _renew(self) -> None:
        while not self._end.wait(RENEW_SECONDS):
            try:
                holder = holder_of(self._folder)
                if holder is not None and holder.id != self._own.id:
                    self._on_lost(LeaseLost(f"a run on {holder.host} took over the run folder {self._folder.uri}"))
                    return
                self._write()
            except OSError:
                continue  # the store does not answer; the next renewal may succeed

    def _write(self) -> None:
        self._own = replace(self._own, renewals=self._own.renewals + 1)
        path = self._folder.path / LEASE_FILE
        scratch = path.with_suffix(".tmp")
        scratch.write_text(json.dumps(asdict(self._own)), encoding="utf-8")
        scratch.replace(path)
        self._folder.push(LEASE_FILE)
