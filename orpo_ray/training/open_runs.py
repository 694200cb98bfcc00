"""The run folders that a process holds for runs of its own: opened together, and closed as each run ends."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from threading import Lock

from orpo_ray.config.load import parse_recipe
from orpo_ray.config.recipe import Recipe
from orpo_ray.errors import OrpoRayError
from orpo_ray.storage.lease import Lease, LeaseLost
from orpo_ray.storage.run_folder import FINAL, RunFolder
from orpo_ray.storage.scratch import clear_dead_scratch
from orpo_ray.tracking.metrics_file import last_metrics
from orpo_ray.training.checkpoint_choice import choose_newest, clean, clear_saving, inspect
from orpo_ray.training.hosted_runs import HostedRuns
from orpo_ray.training.model_check import check_model
from orpo_ray.training.packed_runs import Listener
from orpo_ray.training.run_identity import check_run_folder
from orpo_ray.training.run_opening import open_run, with_saves


@dataclass(frozen=True)
class OpenRun:
    """A run whose folder this process holds."""

    recipe: Recipe
    checkpoint: str | None
    """Name of the checkpoint to resume from."""
    step: int
    lease: Lease


class OpenRuns:
    """Opens the folders of runs. A listener that closes the folder of a run when the run ends.

    Args:
        hosted: the runs; those that the listener asks to stop are left alone.
        listener: hears of every run, also of one that cannot be opened, or was finished before.

    Attributes:
        opened: the runs that have not ended, by name.
    """

    def __init__(self, hosted: HostedRuns, listener: Listener) -> None:
        self._listener = listener
        self._lost: dict[str, LeaseLost] = {}
        self._checking = Lock()
        self.tell, self.report = listener.tell, listener.report
        names = [name for name in hosted.recipes if not listener.asks_to_stop(name)]
        self.opened: dict[str, OpenRun] = {}
        try:
            with ThreadPoolExecutor(max(1, len(names))) as pool:  # the lease of a dead process lasts half a minute
                list(pool.map(partial(self._open_or_end, hosted), names))
        except BaseException:
            self.__exit__()
            raise

    def warn(self, name: str, text: str) -> None:
        self._listener.warn(name, text)

    def asks_to_stop(self, name: str) -> bool:
        return name in self._lost or self._listener.asks_to_stop(name)

    def ended(self, name: str, error: Exception | None) -> None:
        with contextlib.suppress(OSError):
            self.opened.pop(name).lease.__exit__(None, None, None)
        self._listener.ended(name, error or self._lost.get(name))

    def end(self, names: Iterable[str], error: Exception) -> None:
        """End those of the runs that have not ended by an error of them all."""
        for name in [each for each in names if each in self.opened]:
            self.ended(name, error)

    def __enter__(self) -> OpenRuns:
        return self

    def __exit__(self, *error: object) -> None:
        for name in list(self.opened):
            with contextlib.suppress(OSError):
                self.opened.pop(name).lease.__exit__(None, None, None)

    def by_step(self) -> list[dict[str, OpenRun]]:
        """Return the runs that can train side by side, the furthest first: at the same step, of the same model."""
        groups: dict[tuple[int, str], dict[str, OpenRun]] = defaultdict(dict)
        for name, found in self.opened.items():
            groups[found.step, found.recipe.model.revision or ""][name] = found
        return [groups[place] for place in sorted(groups, reverse=True)]

    def _open_or_end(self, hosted: HostedRuns, name: str) -> None:
        try:
            found = self._open(name, parse_recipe(hosted.recipes[name]), hosted)
        except (OrpoRayError, OSError) as error:
            self._listener.ended(name, error)
            return
        if found is not None:
            self.opened[name] = found

    def _open(self, name: str, recipe: Recipe, hosted: HostedRuns) -> OpenRun | None:
        """Take the folder of a run; None if the run was finished before. Raises UserError and OSError."""
        folder = RunFolder(recipe.run_uri)
        saved = check_run_folder(recipe, folder)
        if saved and folder.has_model(FINAL):
            self.report(name, last_metrics(folder) | {"final": True})
            self._listener.ended(name, None)
            return None
        folder.make()
        lease = Lease(folder, on_lost=lambda lost: self._lost.update({name: lost}))
        lease.__enter__()
        try:
            with self._checking:  # transformers is not made for threads
                pinned, _ = check_model(recipe, saved)
            recipe = with_saves(pinned, hosted.num_steps)
            clear_dead_scratch(recipe.checkpoint.scratch)
            open_run(recipe, hosted.train, folder, is_new=saved is None)
            clear_saving(folder)
            checkpoint = choose_newest(folder, lambda text: self.warn(name, text))
            if checkpoint is not None:
                clean(folder, checkpoint, recipe.checkpoint.keep)
            step = 0 if checkpoint is None else inspect(folder, checkpoint).step or 0
        except BaseException:
            lease.__exit__(None, None, None)
            raise
        return OpenRun(recipe, checkpoint, step, lease)
