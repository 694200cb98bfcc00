"""Sweeps of real runs: interrupted and resumed, with trials that fail, with population-based training."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from orpo_ray.config.recipe import Recipe
from support.commands import on_this_cluster, orpo_ray
from support.runs import wait_until
from support.tiny_runs import losses, tiny_recipe

pytestmark = pytest.mark.timeout(1800)


def sweep_recipe(folder: Path, name: str, steps: int = 12, **tune: Any) -> Path:
    """Write the recipe of a sweep whose trials are evaluated every four steps."""
    recipe: Recipe = tiny_recipe(
        folder / "runs", name, data={"eval": "easy-vqa:test"}, eval={"max_pairs": 16, "every_steps": 4},
        optim={"max_steps": steps, "schedule": "constant"}, checkpoint={"every_steps": 4},
        tune={"metric": "eval/rewards/margins", "max_concurrent": 1} | tune,
    )  # fmt: skip
    path = folder / f"{name}.yaml"
    path.write_text(recipe.to_yaml())
    return path


def table(folder: Path, name: str) -> list[dict[str, str]]:
    """Read the table of a sweep."""
    with (folder / "runs" / name / "trials.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_sweep_whose_driver_is_killed_goes_on_and_has_the_same_best(tmp_path: Path) -> None:
    options = {"num_trials": 3, "scheduler": "none"}
    whole = orpo_ray("tune", str(sweep_recipe(tmp_path, "whole", **options)), cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    path, record = sweep_recipe(tmp_path, "killed", **options), tmp_path / "runs" / "killed" / "sweep.json"
    driver = subprocess.Popen([sys.executable, "-m", "orpo_ray", "tune", str(path)], cwd=tmp_path)
    deadline = time.monotonic() + 600
    while not _is_in_the_middle(record):
        assert driver.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.2)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    over = [trial for trial in json.loads(record.read_text())["trials"] if trial["state"] == "finished"]
    again = orpo_ray("tune", str(path), cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    for trial in over:
        assert f"{trial['number']:04d}  begins" not in again.stderr
        assert f"{trial['number']:04d}  goes on" not in again.stderr
    keys = ("orpo.beta", "optim.learning_rate")
    first, second = table(tmp_path, "whole"), table(tmp_path, "killed")
    assert [[row[key] for key in keys] for row in first] == [[row[key] for key in keys] for row in second]
    for one, other in zip(first, second, strict=True):
        margins = "eval/rewards/margins"
        assert float(one[margins]) == pytest.approx(float(other[margins]), abs=1e-4)
    for trial in (tmp_path / "runs" / "killed" / "trials").iterdir():
        assert sorted(losses(trial)) == list(range(1, 13))


def _is_in_the_middle(record: Path) -> bool:
    """Whether a trial is over, and another one was evaluated."""
    if not record.exists():
        return False
    trials = json.loads(record.read_text())["trials"]
    return len(trials) > 1 and trials[0]["state"] == "finished" and bool(trials[1]["history"])


def test_population_based_training_exploits(tmp_path: Path) -> None:
    path = sweep_recipe(tmp_path, "pbt", steps=20, num_trials=4, scheduler="pbt", max_concurrent=4)
    result = orpo_ray("tune", str(path), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    rows = table(tmp_path, "pbt")
    successors = [row for row in rows if row["parent"]]
    assert successors, result.stderr
    for row in successors:
        steps = sorted(losses(tmp_path / "runs" / "pbt" / "trials" / row["trial"]))
        assert steps[0] == int(row["parent_step"]) + 1
        lines = (tmp_path / "runs" / "pbt" / "trials" / row["trial"] / "metrics.jsonl").read_text().splitlines()
        rates = [line["train/learning_rate"] for line in map(json.loads, lines) if "train/learning_rate" in line]
        assert rates[-1] == pytest.approx(float(row["optim.learning_rate"]))


def test_trials_that_fail_do_not_end_the_sweep(tmp_path: Path) -> None:
    """One has data that does not exist, one diverges; the others end."""
    missing = tmp_path / "missing.jsonl"
    search = {
        "data.train": {"choices": ["easy-vqa:train", str(missing)]},
        "optim.learning_rate": {"choices": [1e-3, 1e12]},
    }
    path = sweep_recipe(tmp_path, "failing", search=search, searcher="grid", scheduler="none")
    result = orpo_ray("tune", str(path), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    rows = table(tmp_path, "failing")
    assert len(rows) == 4
    states = {(str(missing) in row["data.train"], row["optim.learning_rate"]): row for row in rows}
    assert states[False, "0.001"]["state"] == "finished"
    for key in ((True, "0.001"), (True, "1000000000000.0")):
        assert states[key]["state"] == "failed"
        assert "missing.jsonl" in states[key]["error"]
    diverged = states[False, "1000000000000.0"]
    assert diverged["state"] == "failed"
    assert "not finite" in diverged["error"]
    assert "data.train" in result.stderr


def test_two_sweeps_at_once_on_one_ray_both_end(ray_cluster: None, tmp_path: Path) -> None:
    """Each works out its trials at a time as if it were alone; what does not fit waits."""
    paths = [
        sweep_recipe(tmp_path, "one", num_trials=2, scheduler="none", max_concurrent="auto"),
        sweep_recipe(tmp_path, "two", num_trials=4, scheduler="asha", max_concurrent="auto"),
    ]
    commands = [[sys.executable, "-m", "orpo_ray", "tune", str(path)] for path in paths]
    sweeps = [subprocess.Popen(command, cwd=tmp_path, env=on_this_cluster()) for command in commands]
    assert [sweep.wait(900) for sweep in sweeps] == [0, 0]
    for path, count in zip(paths, (2, 4), strict=True):
        states = [row["state"] for row in table(tmp_path, path.stem)]
        assert len(states) == count
        assert set(states) <= {"finished", "stopped early"}
    wait_until(_is_free, "the return of all CPUs", 60)


def _is_free() -> bool:
    import ray

    return ray.available_resources().get("CPU") == ray.cluster_resources()["CPU"]
