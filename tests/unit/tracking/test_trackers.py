"""Several trackers at once: what each receives; a tracker that fails does not end the run."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from orpo_ray.config.recipe import Recipe
from orpo_ray.data.bad_rows import BadRow
from orpo_ray.errors import UserError
from orpo_ray.storage.run_folder import RunFolder
from orpo_ray.tracking.generations import Generation
from orpo_ray.tracking.jsonl import read_jsonl
from orpo_ray.tracking.logger import TrackerError
from orpo_ray.tracking.trackers import TRACKERS, MultiLogger
from support.tiny_runs import tiny_recipe

ANSWER = Generation(0, "0", "digest", "What?", "a", "b", greedy="c", sampled="d")


class Recorder:
    """A tracker as a user would add it. Records its calls, and fails at the steps in `failing`."""

    calls: list[tuple[object, ...]]
    failing: frozenset[int] = frozenset()

    def __init__(self) -> None:
        type(self).calls = []

    @classmethod
    def open(cls, recipe: Recipe, folder: RunFolder, step: int) -> Recorder:
        return cls()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if step in self.failing:
            raise TrackerError("the server is down")
        self.calls.append((step, dict(metrics)))

    def log_bad_rows(self, rows: Sequence[BadRow]) -> None:
        self.calls.append(tuple(rows))

    def log_generations(self, step: int, generations: Sequence[Generation]) -> None:
        self.calls.append((step, *generations))

    def flush(self) -> None:
        self.calls.append(("flush",))

    def close(self) -> None:
        self.calls.append(("close",))


class Failing(Recorder):
    failing = frozenset({2})


class FullDisk(Recorder):
    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        raise OSError(28, "No space left on device")


class NeverOpens(Recorder):
    @classmethod
    def open(cls, recipe: Recipe, folder: RunFolder, step: int) -> Recorder:
        raise TrackerError("wrong key")


def test_a_new_tracker_is_one_class_and_one_entry(tmp_path: Path) -> None:
    recipe, row = tiny_recipe(tmp_path, "run"), BadRow(3, "3", "a:3", "too_long", "x")
    logger = MultiLogger.open(recipe, 0, pytest.fail, TRACKERS | {"recorder": Recorder})
    logger.log(1, {"train/loss": 1.0})
    logger.log_bad_rows([row])
    logger.log_generations(1, [ANSWER])
    logger.flush()
    logger.close()
    assert Recorder.calls == [(1, {"train/loss": 1.0}), (row,), (1, ANSWER), ("flush",), ("close",)]
    assert read_jsonl(Path(recipe.run_uri) / "metrics.jsonl") == [{"step": 1, "train/loss": 1.0}]
    assert [line["source"] for line in read_jsonl(Path(recipe.run_uri) / "bad_rows.jsonl")] == ["a:3"]


def test_a_tracker_that_fails_is_dropped_with_one_warning_and_the_others_go_on(tmp_path: Path) -> None:
    recipe, warnings = tiny_recipe(tmp_path, "run"), list[str]()
    trackers = {"never": NeverOpens, "failing": Failing} | TRACKERS
    logger = MultiLogger.open(recipe, 0, warnings.append, trackers)
    for step in (1, 2, 3):
        logger.log(step, {"train/loss": float(step)})
    logger.close()
    assert Failing.calls == [(1, {"train/loss": 1.0})]
    assert [line["step"] for line in read_jsonl(Path(recipe.run_uri) / "metrics.jsonl")] == [1, 2, 3]
    assert len(warnings) == 2
    assert "never" in warnings[0]
    assert "wrong key" in warnings[0]
    assert "failing" in warnings[1]
    assert "the server is down" in warnings[1]


def test_any_other_error_ends_the_run(tmp_path: Path) -> None:
    """Files of the run are required."""
    logger = MultiLogger.open(tiny_recipe(tmp_path, "run"), 0, pytest.fail, {"full": FullDisk})
    with pytest.raises(OSError, match="No space left"):
        logger.log(1, {"train/loss": 1.0})


def test_wandb_that_cannot_be_reached_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef0123456789abcdef01234567")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "1")
    recipe, warnings = tiny_recipe(tmp_path, "unreachable", tracking={"wandb": {"mode": "online"}}), list[str]()
    logger = MultiLogger.open(recipe, 0, warnings.append)
    logger.log(1, {"train/loss": 1.0})
    logger.close()
    assert len(read_jsonl(Path(recipe.run_uri) / "metrics.jsonl")) == 1
    assert len(warnings) == 1
    assert "tracker wandb failed" in warnings[0]


@pytest.mark.parametrize(("enabled", "field"), [("auto", "WANDB_API_KEY is set"), (True, "tracking.wandb.enabled")])
def test_a_missing_extra_names_what_asked_for_it(
    enabled: object, field: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef0123456789abcdef01234567")
    monkeypatch.setitem(sys.modules, "wandb", None)  # what Python does when a package is absent
    recipe = tiny_recipe(tmp_path, "run", tracking={"wandb": {"enabled": enabled}})
    with pytest.raises(UserError) as caught:
        MultiLogger.open(recipe, 0, pytest.fail)
    assert caught.value.field == field
    assert caught.value.fix == 'pip install "orpo-ray[wandb]", or set tracking.wandb.enabled=false'
