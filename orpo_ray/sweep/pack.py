"""A pack: trials that train side by side in one process, each with an adapter of its own on one base model.

Tune starts, ranks and stops each trial by itself. Its function for a packed trial passes on what the pack's process,
an actor, reports of it.
"""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import ray
from ray import tune

from orpo_ray.errors import OrpoRayError
from orpo_ray.sweep.trial_run import TrialSpec
from orpo_ray.training.launch import TrainingFailed

if TYPE_CHECKING:
    from orpo_ray.training.packed_launch import PackConfig

WAIT_SECONDS = 1.0
"""How long a request for news of a trial waits for some."""
RETURN_SECONDS = 15.0
"""How long a process that was started again waits for requests. Nobody asks for trials that have been stopped."""
PLACE_SECONDS = 7200.0
"""How long a pack waits for room on the cluster, which other jobs may hold."""
PACK = "pack"
"""Key of a Tune config: the name of the trial's pack."""


@dataclass
class News:
    """What a pack reports of one trial since the last request."""

    reports: list[dict[str, float]] = field(default_factory=list)
    has_ended: bool = False
    error: BaseException | None = None


class Mail:
    """Passes news of each trial from the thread that trains to those that ask. A `Listener` of the pack."""

    def __init__(self, names: Iterable[str]) -> None:
        self._news = {name: News() for name in names}
        self._asked: set[str] = set()
        self._stopped: set[str] = set()
        self._changed = threading.Condition()

    def tell(self, name: str, **state: object) -> None:
        """Drop what a run of its own shows on the console."""

    def warn(self, name: str, text: str) -> None:
        """Drop it, as trials that are not packed do."""

    def report(self, name: str, metrics: dict[str, float]) -> None:
        """Take an evaluation of a trial, or the metrics of a checkpoint."""
        with self._changed:
            self._news[name].reports.append(metrics)
            self._changed.notify_all()

    def ended(self, name: str, error: BaseException | None) -> None:
        """Take the end of a trial."""
        if error is not None and not isinstance(error, OrpoRayError):
            error = TrainingFailed(f"{type(error).__name__}: {error}")  # not every exception can be pickled
        if error is not None:  # whose traceback would keep the model
            error.__traceback__ = error.__context__ = error.__cause__ = None
        with self._changed:
            news = self._news[name]
            if not news.has_ended:
                news.has_ended, news.error = True, error
            self._changed.notify_all()

    def asks_to_stop(self, name: str) -> bool:
        """Whether Tune has stopped a trial, or it has ended."""
        return name in self._stopped or self._news[name].has_ended

    def stop(self, name: str) -> None:
        """Ask a trial to leave."""
        self._stopped.add(name)

    def stop_silent(self) -> None:
        """Stop the trials that nobody has asked for."""
        self._stopped |= self._news.keys() - self._asked

    def end_all(self, error: BaseException) -> None:
        """End the trials that have not ended by an error of them all."""
        for name in self._news:
            self.ended(name, error)

    def take(self, name: str) -> News:
        """Return the news of a trial as soon as there are some, or none after `WAIT_SECONDS`."""
        with self._changed:
            self._asked.add(name)
            self._changed.wait_for(lambda: self._news[name].reports or self._news[name].has_ended, WAIT_SECONDS)
            news = self._news[name]
            self._news[name] = News(has_ended=news.has_ended, error=news.error)
            return news


class Pack:
    """The process of a pack, as an actor: trains in a thread, and answers beside it.

    Args:
        config: what the trials are given.
        attempts: how often to train them on from their checkpoints, if errors may not come again.
    """

    def __init__(self, config: PackConfig, attempts: int) -> None:
        self._mail = Mail(config.recipes)
        was_lost = ray.get_runtime_context().was_current_actor_reconstructed
        self._training = ThreadPoolExecutor(1).submit(_train, config, attempts, was_lost, self._mail)
        self._training.add_done_callback(self._end)

    def take(self, name: str) -> News:
        """Return the news of a trial; see `Mail.take`."""
        return self._mail.take(name)

    def stop(self, name: str) -> None:
        """Ask a trial to leave after its step."""
        self._mail.stop(name)

    def wait(self) -> None:
        """Wait for the end of all trials."""
        wait([self._training])

    def _end(self, training: Future[None]) -> None:
        self._mail.end_all(training.exception() or TrainingFailed("its pack ended without it"))


def _train(config: PackConfig, attempts: int, was_lost: bool, mail: Mail) -> None:
    # Imports torch and transformers, which takes seconds.
    import torch

    from orpo_ray.training.packed_launch import free_memory, train_pack
    from orpo_ray.training.worker_start import prefer_expandable_segments

    prefer_expandable_segments()
    if was_lost:
        time.sleep(RETURN_SECONDS)
        mail.stop_silent()
    device = torch.device("cuda" if config.uses_gpu else "cpu")
    for attempt in range(attempts):
        try:
            train_pack(config, device, mail)
        except Exception:
            if attempt == attempts - 1:
                raise
            traceback.print_exc()  # into Ray's log of this process
        else:
            return
        free_memory()


def packed_trainable(config: dict[str, Any]) -> None:
    """Pass on what a pack reports of a trial, as Tune's function.

    Args:
        config: of Tune's trial, by `TrialSpec.as_config`, and `PACK`.

    Raises:
        TrainingFailed: the pack found no room, or its process ended too often.
        OrpoRayError: the trial ended with this error.
    """
    name, news, seconds = TrialSpec.from_config(config).name, News(), PLACE_SECONDS
    while not news.has_ended:
        try:
            news = ray.get(ray.get_actor(config[PACK]).take.remote(name), timeout=seconds)
        except ray.exceptions.GetTimeoutError:
            raise TrainingFailed(f"the cluster had no room for its pack within {seconds / 3600:g} hours") from None
        except (ray.exceptions.RayActorError, ValueError) as error:  # the latter from the look-up
            raise TrainingFailed(f"the process of its pack ended: {str(error).splitlines()[0]}") from None
        for metrics in news.reports:
            tune.report(metrics)
    if news.error is not None:
        raise news.error
