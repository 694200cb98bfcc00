"""Weights & Biases, when `tracking.wandb` asks for it."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import PIL.Image

from orpo_ray.config.recipe import Recipe
from orpo_ray.data.bad_rows import BadRow
from orpo_ray.extras import require
from orpo_ray.storage.run_folder import RunFolder
from orpo_ray.tracking.generations import Generation
from orpo_ray.tracking.logger import TrackerError

# Seconds that the start of a run waits for the service, unless WANDB_INIT_TIMEOUT says otherwise.
INIT_TIMEOUT = 30.0
# Seconds that the end of a run waits for uploads. Whatever is not uploaded by then stays in the run folder, and
# `wandb sync` uploads it later.
FINISH_TIMEOUT = 120.0
TABLE = "eval/generations"
DATA_DIR = "WANDB_DATA_DIR"


class WandbLogger:
    """Mirrors metrics to a W&B run of the same name."""

    def __init__(self, recipe: Recipe, run_dir: Path) -> None:
        import wandb

        section = recipe.tracking.wandb
        self._staging = run_dir / "wandb" if section.mode == "offline" else None
        with _service_errors():
            self._run: Any = wandb.init(
                project=section.project,
                entity=section.entity,
                name=recipe.name,
                # The same id makes a resumed run continue its curves.
                id=recipe.name.replace("/", "-"),
                resume="allow",
                reinit="create_new",  # trials of one process have a run each
                mode=section.mode,
                dir=run_dir,
                config=recipe.model_dump(mode="json"),
                settings=wandb.Settings(
                    console="off",
                    disable_code=True,
                    disable_git=True,
                    init_timeout=float(os.environ.get("WANDB_INIT_TIMEOUT", INIT_TIMEOUT)),
                    finish_timeout=FINISH_TIMEOUT,
                ),
            )

    @classmethod
    def open(cls, recipe: Recipe, folder: RunFolder, step: int) -> WandbLogger | None:
        """Start or resume the W&B run. `enabled: auto` follows WANDB_API_KEY, which stays in the environment.

        W&B itself ignores the steps that a resumed run logs again.

        Raises:
            UserError: the package is not installed.
        """
        enabled = recipe.tracking.wandb.enabled
        if not enabled or (enabled == "auto" and not os.environ.get("WANDB_API_KEY")):
            return None
        purpose = "WANDB_API_KEY is set" if enabled == "auto" else "tracking.wandb.enabled"
        require("wandb", purpose, otherwise="set tracking.wandb.enabled=false")
        return cls(recipe, folder.path)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Queue metrics; W&B uploads them in the background."""
        with _service_errors():
            self._run.log(dict(metrics), step=step)

    def log_bad_rows(self, rows: Sequence[BadRow]) -> None:
        """Do nothing: rows of the data do not leave the run folder."""

    def log_generations(self, step: int, generations: Sequence[Generation]) -> None:
        """Queue a table with the images."""
        import wandb

        columns = ["step", "id", "image", "prompt", "chosen", "rejected", "greedy", "sampled"]
        table = wandb.Table(columns=columns)
        with _service_errors(), _staged_in(self._staging):
            for each in generations:
                images = [wandb.Image(PIL.Image.open(io.BytesIO(data))) for data in each.images]
                image = images[0] if len(images) == 1 else images or None
                texts = (each.prompt, each.chosen, each.rejected, each.greedy, each.sampled)
                table.add_data(step, each.id, image, *texts)
            self._run.log({TABLE: table}, step=step)

    def flush(self) -> None:
        """Do nothing: W&B uploads by itself."""

    def close(self) -> None:
        """Upload what is left, for at most FINISH_TIMEOUT seconds."""
        with _service_errors():
            self._run.finish()


@contextmanager
def _service_errors() -> Iterator[None]:
    """Turn errors of W&B and of the network into TrackerError."""
    import wandb

    try:
        yield
    except (wandb.Error, OSError) as error:
        raise TrackerError(f"W&B: {error}") from error


@contextmanager
def _staged_in(folder: Path | None) -> Iterator[None]:
    """Keep the images of a table in the run folder until `wandb sync`: W&B would keep them in the home folder."""
    before = os.environ.get(DATA_DIR)
    if folder is not None and before is None:
        os.environ[DATA_DIR] = str(folder)
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(DATA_DIR, None)
