"""A host: the process of trials with one worker, which stays from trial to trial.

Tune starts, ranks and stops each trial by itself. Its function for such a trial passes on what the host, an actor,
reports of the trial.
"""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import ray
from ray import tune

from orpo_ray.errors import OrpoRayError
from orpo_ray.storage.run_folder import RunFolder
from orpo_ray.sweep.inherit import inherit_checkpoint
from orpo_ray.sweep.mail import Mail, News
from orpo_ray.sweep.trial_run import TrialSpec
from orpo_ray.training.hosted_runs import HostedRuns
from orpo_ray.training.launch import TrainingFailed

if TYPE_CHECKING:
    from orpo_ray.model.base_models import BaseModels

RETURN_SECONDS = 15.0
"""How long a process that was started again waits for requests. Nobody asks for trials that have been stopped."""
PLACE_SECONDS = 7200.0
"""How long a trial waits for its host to answer: for room on the cluster, which other jobs may hold, or a restart."""
HOST = "host"
"""Key of a Tune config: the name of the trial's host."""


@dataclass(frozen=True)
class Group:
    """Trials that a host trains side by side, or one trial."""

    runs: HostedRuns
    attempts: int
    """How often to train them at most, if errors may not come again. Later attempts go on from checkpoints."""
    parents: Mapping[str, tuple[str, int]] = field(default_factory=dict)
    """Name of a trial -> the run folder from whose checkpoint the trial begins, and the step of the checkpoint."""


class Host:
    """The actor: trains in a thread, and answers beside it."""

    def __init__(self) -> None:
        self._mail = Mail()
        self._thread = ThreadPoolExecutor(1)  # the same one for all trials, since torch keeps some settings per thread
        self._bases: BaseModels | None = None
        self._was_lost = ray.get_runtime_context().was_current_actor_reconstructed

    def train(self, group: Group) -> bool:
        """Train the trials of a group to their ends, or resume them.

        Returns:
            Whether the process can take another group. It cannot after an error that no trial explains.
        """
        names = list(group.runs.recipes)
        self._mail.open(names)
        error = self._thread.submit(self._train, group).exception()
        self._mail.end_all(names, error or TrainingFailed("its host ended before the trial did"))
        return error is None

    def is_sound(self) -> bool:
        """Whether this process is the first one of this host; Ray starts another one if it dies."""
        return not self._was_lost

    def take(self, name: str) -> News:
        """Return the news of a trial; see `Mail.take`."""
        return self._mail.take(name)

    def stop(self, name: str) -> None:
        """Ask a trial to leave after its step."""
        self._mail.stop(name)

    def _train(self, group: Group) -> None:
        import torch  # as the others, it takes seconds to import

        from orpo_ray.model.base_models import BaseModels
        from orpo_ray.model.memory import free_memory
        from orpo_ray.training.hosting import train_hosted
        from orpo_ray.training.worker_start import prefer_expandable_segments

        prefer_expandable_segments()
        self._bases = self._bases or BaseModels()
        if self._was_lost:
            time.sleep(RETURN_SECONDS)
            self._mail.stop_silent(group.runs.recipes)
        for name, (donor, step) in group.parents.items():
            try:
                inherit_checkpoint(RunFolder(donor), step, RunFolder(group.runs.folder_of(name)))
            except (OrpoRayError, OSError) as error:
                self._mail.ended(name, error)
        for attempt in range(group.attempts):
            try:
                if attempt:
                    free_memory()
                train_hosted(group.runs, self._mail, self._bases)
            except Exception as error:
                traceback.print_exc()  # into Ray's log of this process
                if isinstance(error, torch.AcceleratorError):
                    os._exit(1)  # CUDA is of no use to this process any longer; Ray starts another one
                if attempt == group.attempts - 1:
                    raise
            else:
                return


def hosted_trainable(config: dict[str, Any]) -> None:
    """Pass on what a host reports of a trial, as Tune's function.

    Args:
        config: of Tune's trial, by `TrialSpec.as_config`, and `HOST`.

    Raises:
        TrainingFailed: the host found no room, or its process ended too often.
        OrpoRayError: the trial ended with this error.
    """
    name, news, seconds = TrialSpec.from_config(config).name, News(), PLACE_SECONDS
    while not news.has_ended:
        try:
            news = ray.get(ray.get_actor(config[HOST]).take.remote(name), timeout=seconds)
        except ray.exceptions.GetTimeoutError:
            raise TrainingFailed(f"the cluster had no room for its process within {seconds / 3600:g} hours") from None
        except (ray.exceptions.RayActorError, ValueError) as error:  # the latter from the look-up
            raise TrainingFailed(f"its process ended: {str(error).splitlines()[0]}") from None
        for metrics in news.reports:
            tune.report(metrics)
    if news.error is not None:
        raise news.error
