"""The state of a run: an actor that the workers write to, and that the driver reads."""

from __future__ import annotations

import contextlib
import pickle
import shutil
import weakref
from pathlib import Path
from typing import Any

import ray

from orpo_ray.ray_cluster.start import on_this_node
from orpo_ray.storage.scratch import make_scratch


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)
class RunStatus:
    """Actor with the latest state of a run, its warnings, and the error, if any, that a restart would repeat.

    Start it with `start_status`. If its process dies, Ray starts it again. It then reads what it must not forget from
    its file, and `ProgressDisplay` gives it the config.

    Args:
        file: for what a restart keeps: warnings, the fatal error, the request to stop and the latest checkpoint.
    """

    def __init__(self, file: str) -> None:
        self._file = Path(file)
        kept: dict[str, Any] = {}
        if self._file.exists():
            kept = pickle.loads(self._file.read_bytes())
        self._state: dict[str, Any] = kept.get("state", {"warnings": []})
        self._fatal: Exception | None = kept.get("fatal")
        self._stop: bool = kept.get("stop", False)
        self._config: ray.ObjectRef | None = None

    def begin(self, config: list[ray.ObjectRef]) -> None:
        """Keep a reference to what the workers train with. In a list, since Ray would fetch a bare one."""
        (self._config,) = config

    def config(self) -> ray.ObjectRef | None:
        """Return the reference, or None while the driver is not ready."""
        return self._config

    def update(self, **state: Any) -> bool:
        """Merge values into the state: `step, num_steps, phase` and metrics. Return whether the run should stop."""
        self._state.update(state)
        if "saved_at" in state:
            self._keep()
        return self._stop

    def request_stop(self) -> None:
        """Ask the workers to save a checkpoint and to end."""
        self._stop = True
        self._state["phase"] = "stopping: saving a checkpoint"
        self._keep()

    def warn(self, text: str) -> None:
        """Add a warning for the console. One that is repeated is shown once."""
        if text not in self._state["warnings"]:
            self._state["warnings"].append(text)
            self._keep()

    def state(self) -> dict[str, Any]:
        """Return the state, and whether the actor has a config."""
        return self._state | {"has_config": self._config is not None}

    def fail(self, error: Exception) -> None:
        """Keep the first error that a restart would repeat."""
        self._fatal = self._fatal or error
        self._keep()

    def _keep(self) -> None:
        scratch = self._file.with_suffix(".tmp")
        with contextlib.suppress(OSError):  # on a full disk, what is in memory must do
            scratch.write_bytes(ray.cloudpickle.dumps({"state": self._state, "fatal": self._fatal, "stop": self._stop}))
            scratch.replace(self._file)

    def fatal(self) -> Exception | None:
        """Return the error that a restart would repeat, or None."""
        return self._fatal


def start_status() -> Any:
    """Start a run's `RunStatus` on the driver's node, so that it outlives all others."""
    folder = make_scratch()  # on the driver's node, as the actor is
    status = RunStatus.options(scheduling_strategy=on_this_node()).remote(str(folder / "status"))  # type: ignore[attr-defined]
    weakref.finalize(status, shutil.rmtree, folder, ignore_errors=True)
    return status


class StatusLine:
    """A worker's line to the `RunStatus` actor. It never waits, and is silent if the actor is gone with the driver."""

    def __init__(self, status: Any) -> None:
        self._status = status
        self._answers: list[ray.ObjectRef] = []
        self._asks_to_stop = False

    def update(self, **state: Any) -> None:
        """Send values to the actor."""
        with contextlib.suppress(ray.exceptions.RayActorError):
            self._answers.append(self._status.update.remote(**state))

    def warn(self, text: str) -> None:
        """Send a warning."""
        with contextlib.suppress(ray.exceptions.RayActorError):
            self._status.warn.remote(text)

    def asks_to_stop(self) -> bool:
        """Whether the actor has asked the run to stop, by the answers that have come so far."""
        if self._answers:
            ready, self._answers = ray.wait(self._answers, num_returns=len(self._answers), timeout=0)
            with contextlib.suppress(ray.exceptions.RayActorError):
                self._asks_to_stop = any([self._asks_to_stop, *ray.get(ready)])
        return self._asks_to_stop
