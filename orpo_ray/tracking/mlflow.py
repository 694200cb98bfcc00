"""MLflow, when `tracking.mlflow` asks for it."""

from __future__ import annotations

import io
import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import PIL.Image

from orpo_ray.config.recipe import Recipe
from orpo_ray.data.bad_rows import BadRow
from orpo_ray.errors import UserError
from orpo_ray.extras import require
from orpo_ray.storage.run_folder import RunFolder
from orpo_ray.tracking.generations import Generation
from orpo_ray.tracking.logger import TrackerError

URI = "MLFLOW_TRACKING_URI"
TAG = "orpo_ray.run"
"""Tag with the path or URI of the run folder, by which a resumed run finds its MLflow run."""
AT_ONCE = 100  # parameters, and 1,000 metrics, are what MLflow takes in one call
PARAMETER_CHARACTERS = 500


class MlflowLogger:
    """Mirrors metrics to an MLflow run of the same name."""

    def __init__(self, recipe: Recipe, uri: str) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Param

        section = recipe.tracking.mlflow
        with _service_errors():
            self._client: Any = MlflowClient(uri)
            experiment = self._client.get_experiment_by_name(section.experiment)
            number = self._client.create_experiment(section.experiment) if experiment is None else (
                experiment.experiment_id
            )  # fmt: skip
            where = recipe.run_uri.replace("'", "\\'")
            found = self._client.search_runs([number], f"tags.`{TAG}` = '{where}'", max_results=1)
            self._last: dict[str, int] = {}
            if found:
                self._run: str = found[0].info.run_id
                self._client.update_run(self._run, status="RUNNING")
                for name in found[0].data.metrics:
                    self._last[name] = max(each.step for each in self._client.get_metric_history(self._run, name))
                return
            self._run = self._client.create_run(number, run_name=recipe.name, tags={TAG: recipe.run_uri}).info.run_id
            flat = iter(sorted(_flat(recipe.model_dump(mode="json")).items()))
            while batch := list(islice(flat, AT_ONCE)):
                self._client.log_batch(self._run, params=[Param(*each) for each in batch])

    @classmethod
    def open(cls, recipe: Recipe, folder: RunFolder, step: int) -> MlflowLogger | None:
        """Start or resume the MLflow run, if the recipe asks for one.

        Raises:
            UserError: the package is not installed, or there is no address.
        """
        section = recipe.tracking.mlflow
        if not section.enabled:
            return None
        require("mlflow", "tracking.mlflow.enabled", otherwise="set tracking.mlflow.enabled=false")
        uri = section.tracking_uri or os.environ.get(URI)
        if not uri:
            raise UserError("the address of the MLflow server is missing", field="tracking.mlflow.tracking_uri",
                            fix=f"set it, or {URI}, for example http://localhost:5000")  # fmt: skip
        return cls(recipe, uri)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log the metrics. Those of steps that a resumed run repeats are there already."""
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        wanted = {
            name: value for name, value in metrics.items() if math.isfinite(value) and step > self._last.get(name, -1)
        }
        with _service_errors():
            self._client.log_batch(self._run, [Metric(name, value, now, step) for name, value in wanted.items()])

    def log_bad_rows(self, rows: Sequence[BadRow]) -> None:
        """Do nothing: rows of the data do not leave the run folder."""

    def log_generations(self, step: int, generations: Sequence[Generation]) -> None:
        """Store the texts of a step as one file, and each image once."""
        with _service_errors():
            self._client.log_dict(self._run, {"generations": [each.as_line() for each in generations]},
                                  f"generations/step-{step:06d}.json")  # fmt: skip
            for each in generations if step == 0 else ():
                for place, data in enumerate(each.images):
                    image = PIL.Image.open(io.BytesIO(data))
                    self._client.log_image(self._run, image, f"generations/{each.sample_index}-{place}.png")

    def flush(self) -> None:
        """Do nothing: every call waits for the server."""

    def close(self) -> None:
        """Mark the MLflow run as finished."""
        with _service_errors():
            self._client.set_terminated(self._run)


def _flat(section: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    found: dict[str, str] = {}
    for name, value in section.items():
        if isinstance(value, dict) and value:
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[_plain(prefix + name)] = json.dumps(value, ensure_ascii=False)[:PARAMETER_CHARACTERS]
    return found


def _plain(name: str) -> str:
    """Replace what MLflow does not take in a name: a source of data is one of the recipe's keys."""
    return "".join(each if each.isalnum() or each in "_-. /" else "_" for each in name).replace("//", "/")[-250:]


@contextmanager
def _service_errors() -> Iterator[None]:
    """Turn errors of MLflow and of the network into TrackerError."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except (MlflowException, OSError) as error:
        raise TrackerError(f"MLflow: {error}") from error
