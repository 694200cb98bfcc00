"""Save what workers hold before Ray Train ends them: a worker is lost, a node is preempted, or their number changes.

Ray Train's controller calls `SaveBeforeTeardown`, which asks the processes that are left. They answer beside the
training, whose thread may have failed or wait in a collective for a worker that is lost.

Nothing heavy is imported at the top: the controller imports this file.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
from ray.train.v2._internal.execution.callback import WorkerGroupCallback

ANSWER_SECONDS = 10.0  # that a process has to answer a question; one that is being killed never does
POLL_SECONDS = 0.2

_training: Any = None  # the `Worker` of this process, while its state may be worth saving


@dataclass(frozen=True)
class Held:
    """What a worker holds."""

    step: int
    """Steps done."""
    saved: int
    """Steps done in the latest checkpoint."""
    is_whole: bool
    """Whether the worker holds the whole state, and not a shard of it."""
    is_healthy: bool
    """Whether the state is worth a checkpoint."""
    is_training: bool
    """Whether the training goes on. It has failed otherwise."""
    is_uploading: bool = False
    """Whether the worker still uploads its part of the last checkpoint."""


class SaveBeforeTeardown(WorkerGroupCallback):
    """Has the state saved before all workers are ended.

    Any worker that holds the whole state saves it alone. Shards are saved by all workers together, if none is lost.

    Args:
        status: the run's `RunStatus`. After an error that a restart would repeat, nothing is saved.
        timeout_s: limit for a save.
    """

    def __init__(self, status: Any, timeout_s: float) -> None:
        self._status, self._timeout = status, timeout_s

    def before_worker_group_shutdown(self, worker_group: Any) -> None:
        """Save, and return when that is done or has failed; earlier checkpoints are kept."""
        workers = worker_group.get_workers()
        held = _answers(workers, _held)
        if not self._save(workers, held):
            # The checkpoint that they upload may become whole: the parts of the others may be in the store.
            uploading = [workers[rank] for rank, each in held.items() if each and each.is_uploading]
            _answers(uploading, _end_upload, self._timeout)

    def _save(self, workers: list[Any], held: dict[int, Held | None]) -> bool:
        """Save what workers hold; returns whether they did."""
        unsaved = {rank: each for rank, each in held.items() if each and each.is_healthy and each.step > each.saved}
        if not unsaved or self._is_fatal():
            return False
        alone = [rank for rank, each in unsaved.items() if each.is_whole]
        # Ranks may differ by a step: one has the sum of the gradients, and another lost the connection before it.
        for rank in sorted(alone, key=lambda rank: -unsaved[rank].step):
            if _answers([workers[rank]], _save_alone, self._timeout).get(0):
                return True
        if alone or len(unsaved) < len(workers) or not all(each.is_training for each in unsaved.values()):
            return False
        self._save_together(workers)
        return True

    def _save_together(self, workers: list[Any]) -> None:
        """Let all workers end with a checkpoint, as at a signal."""
        _answers(workers[:1], _stop)
        deadline = time.monotonic() + self._timeout
        while any(_answers(workers, _held).values()) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)

    def _is_fatal(self) -> bool:
        try:
            return ray.get(self._status.fatal.remote(), timeout=ANSWER_SECONDS) is not None
        except ray.exceptions.RayError:
            return False


def training_begins(worker: Any) -> None:
    """Offer the state of this process's `Worker` to `SaveBeforeTeardown`."""
    global _training
    _training = worker


def training_ended() -> None:
    """Offer nothing any longer: the run's last state is saved, or no state of it is worth saving."""
    training_begins(None)


def training_failed() -> None:
    """Keep offering the state, which the training thread changes no longer."""
    if _training is not None:
        _training.is_training = False


def _answers(workers: list[Any], question: Callable[[], Any], timeout: float = ANSWER_SECONDS) -> dict[int, Any]:
    """Call a function in the processes of some workers; returns the results of those that answer, by their index."""
    asked = [worker.execute_async(question) for worker in workers]
    ray.wait(asked, num_returns=len(asked), timeout=timeout)
    found = {}
    for index, answer in enumerate(asked):
        try:
            found[index] = ray.get(answer, timeout=0)
        except ray.exceptions.RayError:
            continue  # the process is lost, or its GPU is
    return found


def _held() -> Held | None:
    return None if _training is None else _training.held()


def _save_alone() -> bool:
    return _training is not None and bool(_training.save_alone())


def _end_upload() -> None:
    if _training is not None:
        _training.saver.end_upload()


def _stop() -> None:
    if _training is not None:
        _training.wants_teardown = True
