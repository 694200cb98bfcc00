"""TensorBoard, MLflow and Trackio, read back with their own libraries."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import PIL.Image
import pytest

from orpo_ray.config.recipe import Recipe
from orpo_ray.errors import UserError
from orpo_ray.tracking.generations import Generation
from orpo_ray.tracking.trackers import MultiLogger
from support.tiny_runs import tiny_recipe


def answer(step: int) -> Generation:
    buffer = io.BytesIO()
    PIL.Image.new("RGB", (8, 6), "red").save(buffer, "JPEG")
    return Generation(0, "7", "digest", "What?", "a", "b", f"greedy {step}", "sampled", images=(buffer.getvalue(),))


def run_and_resume(recipe: Recipe) -> None:
    """Log steps 0 to 3, and after a kill steps 2 to 4 once more."""
    for first, steps in ((0, range(4)), (1, range(2, 5))):
        tracker = MultiLogger.open(recipe, first, pytest.fail)
        for step in steps:
            tracker.log(step, {"train/loss": float(step), "eval/rewards/margins": step / 2})
            tracker.log_generations(step, [answer(step)])
        tracker.flush()
        tracker.close()


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recipe = tiny_recipe(tmp_path, "run", tracking={"tensorboard": {"enabled": True}})
    run_and_resume(recipe)
    found = EventAccumulator(f"{recipe.run_uri}/tensorboard")
    found.Reload()
    assert [(each.step, each.value) for each in found.Scalars("train/loss")] == [(step, step) for step in range(5)]
    assert [each.value for each in found.Scalars("eval/rewards/margins")] == [0.0, 0.5, 1.0, 1.5, 2.0]
    texts = found.Tensors("eval/generations/7/text_summary")
    assert b"greedy 4" in texts[-1].tensor_proto.string_val[0]
    (image,) = found.Images("eval/generations/7/0")
    assert (image.width, image.height) == (8, 6)


def test_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # a store without a server, which MLflow discourages
    uri = (tmp_path / "mlruns").as_uri()
    section: dict[str, Any] = {"enabled": True, "tracking_uri": uri, "experiment": "mine"}
    run_and_resume(tiny_recipe(tmp_path, "run", tracking={"mlflow": section}))
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("mine")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("run", "FINISHED")
    assert run.data.params["optim.pairs_per_step"] == "4"
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert [(each.step, each.value) for each in history] == [(step, step) for step in range(5)]
    files = [each.path for each in client.list_artifacts(run.info.run_id, "generations")]
    assert "generations/0-0.png" in files
    assert "generations/step-000004.json" in files


def test_trackio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trackio")
    import trackio.utils

    for module in [module for name, module in sys.modules.items() if name.startswith("trackio")]:
        for name, folder in (("TRACKIO_DIR", "."), ("MEDIA_DIR", "media"), ("ARTIFACTS_DIR", "artifacts")):
            if hasattr(module, name):  # read from the environment when the library is imported
                monkeypatch.setattr(module, name, tmp_path / folder)
    run_and_resume(tiny_recipe(tmp_path, "run", tracking={"trackio": {"enabled": True, "project": "mine"}}))
    lines = trackio.SQLiteStorage.get_logs("mine", "run")
    losses = [(line["step"], line["train/loss"]) for line in lines if "train/loss" in line]
    assert losses == [(step, step) for step in range(5)]
    tables = [line["eval/generations"] for line in lines if "eval/generations" in line]
    assert len(tables) == 5
    assert "greedy 4" in str(tables[-1])
    assert list(tmp_path.rglob("media/**/*.png"))


@pytest.mark.parametrize("name", ["tensorboard", "mlflow", "trackio"])
def test_a_missing_extra_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)  # what Python does when a package is absent
    recipe = tiny_recipe(tmp_path, "run", tracking={name: {"enabled": True}})
    with pytest.raises(UserError) as caught:
        MultiLogger.open(recipe, 0, pytest.fail)
    assert caught.value.field == f"tracking.{name}.enabled"
    assert caught.value.fix == f'pip install "orpo-ray[{name}]", or set tracking.{name}.enabled=false'


def test_mlflow_needs_an_address_and_one_that_fails_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(UserError, match="address of the MLflow server is missing"):
        MultiLogger.open(tiny_recipe(tmp_path, "run", tracking={"mlflow": {"enabled": True}}), 0, pytest.fail)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    warnings: list[str] = []
    tracker = MultiLogger.open(
        tiny_recipe(tmp_path, "other", tracking={"mlflow": {"enabled": True}}), 0, warnings.append
    )
    tracker.log(1, {"train/loss": 1.0})
    tracker.close()
    assert len(warnings) == 1
    assert "tracker mlflow failed" in warnings[0]
