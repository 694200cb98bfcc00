"""A run on three hosts, with its storage in an object store, whose links are cut."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from orpo_ray.config.recipe import Recipe
from orpo_ray.storage.run_folder import RunFolder
from orpo_ray.tracking.jsonl import read_jsonl
from orpo_ray.tracking.metrics_file import RESTARTS
from support.elastic_runs import elastic_recipe
from support.hosts import HERE, Host, hosts, ray_on
from support.paths import TESTS
from support.runs import run, wait_until
from support.s3_server import BUCKET, s3_server
from support.tiny_runs import losses

STARTED = 300  # seconds for the start of workers, which import everything anew
SHORT_S = 8  # of a cut that Ray's health checks and TCP outlast
BOUND_S = 300  # from a cut that lasts to the next step


@contextmanager
def training_on(
    host: Host, environment: dict[str, str], recipe: Recipe, folder: Path
) -> Iterator[subprocess.Popen[str]]:
    """Run `orpo-ray train` on a host, and end it."""
    path, said = folder / f"{recipe.name}.yaml", folder / "said"
    path.write_text(recipe.to_yaml())
    with said.open("w") as out:
        process = subprocess.Popen(
            host.command(sys.executable, "-m", "orpo_ray", "train", str(path)), env=environment, stderr=out, text=True
        )
        try:
            yield process
        finally:
            process.kill()
            process.wait()


@pytest.mark.timeout(1800)
def test_a_run_outlasts_a_short_cut_and_goes_on_without_a_host_that_stays_away(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")]))
    with hosts(3) as (head, second, third), s3_server(monkeypatch, HERE):
        recipe = elastic_recipe(tmp_path, "cut", timeout_s=120)
        recipe = recipe.model_copy(
            update={
                "checkpoint": recipe.checkpoint.model_copy(update={"storage": f"s3://{BUCKET}/runs", "every_steps": 5})
            }
        )
        folder = RunFolder(recipe.run_uri)

        def workers_of_steps() -> dict[int, int]:
            folder.pull("metrics.jsonl")
            lines = read_jsonl(folder.path / "metrics.jsonl")
            return {line["step"]: line["train/num_workers"] for line in lines if "train/num_workers" in line}

        with ray_on([head, second, third]) as environment, training_on(head, environment, recipe, tmp_path) as process:

            def wait_for(count: int, since: int, seconds: float) -> int:
                def made() -> list[int]:
                    assert process.poll() is None, (tmp_path / "said").read_text()
                    return [step for step, workers in workers_of_steps().items() if workers == count and step > since]

                wait_until(lambda: len(made()) >= 10, f"ten steps of {count} worker(s) after {since}", seconds)
                return max(workers_of_steps())

            last = wait_for(2, 0, STARTED)
            assert second.has("RayTrainWorker")
            assert third.has("RayTrainWorker")
            third.cut()
            time.sleep(SHORT_S)
            third.connect()
            last = wait_for(2, last, BOUND_S)
            third.cut()
            began = time.monotonic()
            wait_for(1, last, BOUND_S)
            print(f"ten steps of one worker {time.monotonic() - began:.0f} s after the cut")
            # The signal goes to the command, as `ip netns exec` has become it.
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=120) == 128 + signal.SIGTERM, (tmp_path / "said").read_text()
        folder.pull("metrics.jsonl")
        curve = losses(folder.path)
        assert sorted(curve) == list(range(1, len(curve) + 1))
        # By the cut that lasted, and not by the short one.
        restarts = [line[RESTARTS] for line in read_jsonl(folder.path / "metrics.jsonl") if RESTARTS in line]
        assert restarts == [1]
    alone = elastic_recipe(tmp_path, "alone", num_workers=1)
    update = {
        "optim": alone.optim.model_copy(update={"max_steps": len(curve)}),
        "data": alone.data.model_copy(update={"format": "auto"}),  # the same rows, sooner
    }
    alone = alone.model_copy(update=update)
    run(alone)
    expected = losses(Path(alone.run_uri))
    assert curve == pytest.approx(expected, abs=1e-4)
