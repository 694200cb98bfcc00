"""Trackio, when `tracking.trackio` asks for it."""

from __future__ import annotations

import io
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any

import PIL.Image

from orpo_ray.config.recipe import Recipe
from orpo_ray.data.bad_rows import BadRow
from orpo_ray.extras import require
from orpo_ray.storage.run_folder import RunFolder
from orpo_ray.tracking.generations import Generation
from orpo_ray.tracking.logger import TrackerError

TABLE = "eval/generations"


class TrackioLogger:
    """Mirrors metrics to a Trackio run of the same name."""

    def __init__(self, recipe: Recipe) -> None:
        import trackio

        section, name = recipe.tracking.trackio, recipe.name.replace("/", "-")
        with _service_errors():
            # Of a Space nothing is known here, and a resumed run logs the steps that it repeats once more.
            lines = [] if section.space_id else trackio.SQLiteStorage.get_logs(section.project, name)
            self._last: dict[str, int] = {}
            for line in lines:
                self._last |= {key: max(line["step"], self._last.get(key, -1)) for key in line}
            self._run: Any = trackio.init(
                section.project,
                name,
                space_id=section.space_id,
                private=None if section.space_id is None else True,
                config=recipe.model_dump(mode="json"),
                resume="allow",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )

    @classmethod
    def open(cls, recipe: Recipe, folder: RunFolder, step: int) -> TrackioLogger | None:
        """Start or resume the Trackio run, if the recipe asks for one.

        Raises:
            UserError: the package is not installed.
        """
        if not recipe.tracking.trackio.enabled:
            return None
        require("trackio", "tracking.trackio.enabled", otherwise="set tracking.trackio.enabled=false")
        return cls(recipe)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Queue the metrics. Those of steps that a resumed run repeats are there already."""
        wanted = {name: value for name, value in metrics.items() if step > self._last.get(name, -1)}
        if wanted:
            with _service_errors():
                self._run.log(wanted, step=step)

    def log_bad_rows(self, rows: Sequence[BadRow]) -> None:
        """Do nothing: rows of the data do not leave the run folder."""

    def log_generations(self, step: int, generations: Sequence[Generation]) -> None:
        """Queue a table with the images."""
        import trackio

        if step <= self._last.get(TABLE, -1):
            return
        columns = ["id", "image", "prompt", "chosen", "rejected", "greedy", "sampled"]
        with _service_errors():
            rows = []
            for each in generations:
                images = [trackio.Image(PIL.Image.open(io.BytesIO(data))) for data in each.images]
                texts = (each.prompt, each.chosen, each.rejected, each.greedy, each.sampled)
                rows.append([each.id, images[0] if len(images) == 1 else images, *texts])
            self._run.log({TABLE: trackio.Table(columns=columns, data=rows)}, step=step)

    def flush(self) -> None:
        """Do nothing: Trackio writes by itself."""

    def close(self) -> None:
        """Write what is left."""
        with _service_errors():
            self._run.finish()


@contextmanager
def _service_errors() -> Iterator[None]:
    """Turn errors of Trackio's storage and of the network into TrackerError, and keep what it prints to itself."""
    try:
        with redirect_stdout(io.StringIO()):
            yield
    except (OSError, ValueError, sqlite3.Error) as error:
        raise TrackerError(f"Trackio: {error}") from error
