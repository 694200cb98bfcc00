"""A worker that is slower than the other is named while the run goes on, and at its end."""

from __future__ import annotations

import io
import threading
import time
from pathlib import Path
from statistics import mean

import psutil
import pytest
from rich.console import Console

from orpo_ray import console as commands
from orpo_ray.tracking.jsonl import read_jsonl
from orpo_ray.training.launch import launch_training
from support.runs import last_step, wait_until
from support.tiny_runs import tiny_recipe


@pytest.mark.nightly
@pytest.mark.timeout(240)
def test_a_slowed_worker_is_named(ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tiny_recipe(
        tmp_path, "slowed", optim={"max_steps": 50}, scaling={"num_workers": 2}, checkpoint={"every_steps": 10}
    )
    folder = Path(recipe.run_uri)
    finished = threading.Event()

    def slow_one_down() -> None:
        wait_until(lambda: last_step(folder) >= 2, "step 2")
        workers = [each for each in psutil.Process().children(recursive=True) if "RayTrainWorker" in each.name()]
        worker = max(workers, key=psutil.Process.create_time)
        while not finished.is_set():  # of 100 ms, it may run 20
            worker.suspend()
            time.sleep(0.08)
            worker.resume()
            time.sleep(0.02)

    thread = threading.Thread(target=slow_one_down)
    thread.start()
    shown = Console(file=io.StringIO(), width=1000)
    try:
        summary = launch_training(recipe, shown)
    finally:
        finished.set()
        thread.join()
    lines = [line for line in read_jsonl(folder / "metrics.jsonl") if "train/loss" in line]
    slow = int(lines[-1]["train/slow_worker"])
    assert lines[-1]["train/slow_worker_steps"] >= 15

    def of_run(name: str, rank: int) -> float:
        return mean(line[f"train/worker_{name}/{rank}"] for line in lines[10:])

    assert of_run("seconds", slow) > 1.5 * of_run("seconds", 1 - slow)
    said = shown.file.getvalue()  # type: ignore[attr-defined]
    assert said.count("is slower than the others") == 1
    assert f"warning: worker {slow} on " in said
    for rank in (0, 1):
        assert of_run("memory_gb", rank) > 0.1
        saves = [line["step"] for line in lines if line[f"train/worker_checkpoint_seconds/{rank}"] > 0]
        assert saves == [11, 21, 31, 41]
        assert all(line[f"train/worker_data_wait_seconds/{rank}"] >= 0 for line in lines)
    monkeypatch.setattr(commands, "console", shown)
    commands.print_trained(summary, "report.html")
    assert f"slow        worker {slow}, in " in shown.file.getvalue()  # type: ignore[attr-defined]
