"""TensorBoard, when `tracking.tensorboard` asks for it: event files in the run folder."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import PIL.Image

from orpo_ray.config.recipe import Recipe
from orpo_ray.data.bad_rows import BadRow
from orpo_ray.extras import require
from orpo_ray.storage.run_folder import RunFolder
from orpo_ray.tracking.generations import Generation, as_markdown

FOLDER = "tensorboard"
GENERATIONS = "eval/generations"


class TensorboardLogger:
    """Writes event files to `tensorboard/` in the run folder."""

    def __init__(self, folder: RunFolder, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._folder = folder
        # TensorBoard then hides what an attempt that died has logged after this step.
        self._writer: Any = SummaryWriter(str(folder.path / FOLDER), purge_step=step + 1 if step else None)

    @classmethod
    def open(cls, recipe: Recipe, folder: RunFolder, step: int) -> TensorboardLogger | None:
        """Open the event file, if the recipe asks for TensorBoard.

        Raises:
            UserError: the package is not installed.
        """
        if not recipe.tracking.tensorboard.enabled:
            return None
        require("tensorboard", "tracking.tensorboard.enabled", otherwise="set tracking.tensorboard.enabled=false")
        return cls(folder, step)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write a scalar for each metric."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def log_bad_rows(self, rows: Sequence[BadRow]) -> None:
        """Do nothing: `bad_rows.jsonl` has them."""

    def log_generations(self, step: int, generations: Sequence[Generation]) -> None:
        """Write a text for each pair, and its first image at the first step."""
        for each in generations:
            name = f"{GENERATIONS}/{each.id}"
            self._writer.add_text(name, as_markdown(each), step)
            for place, data in enumerate(each.images if step == 0 else ()):
                pixels = np.asarray(PIL.Image.open(io.BytesIO(data)))
                self._writer.add_image(f"{name}/{place}", pixels, step, dataformats="HWC")

    def flush(self) -> None:
        """Write to disk, and upload to a remote run folder."""
        self._writer.flush()
        self._folder.push(*(f"{FOLDER}/{file.name}" for file in (self._folder.path / FOLDER).iterdir()))

    def close(self) -> None:
        """Flush and close the file."""
        self.flush()
        self._writer.close()
