"""`sbatch cluster/slurm.sh RECIPE` on a real Slurm with two nodes, which are daemons of this machine."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from support.paths import ROOT, TESTS
from support.runs import last_step, run, wait_until
from support.slurm import BOUND, KILL_WAIT, Slurm, slurm
from support.tiny_runs import losses, same_curve, tiny_recipe, write_pairs

STARTED = 300  # seconds for the start of Ray and of the workers
STEPS = 120
# In the place of `orpo-ray`: prints how many CPUs a task may use on each node.
AFFINITY = """\
#!/usr/bin/env python
import os
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as On

ray.init(log_to_driver=False)
usable = ray.remote(lambda: len(os.sched_getaffinity(0)))
nodes = [node["NodeID"] for node in ray.nodes()]
found = ray.get([usable.options(scheduling_strategy=On(node, soft=False)).remote() for node in nodes])
print("usable CPUs:", *found)
"""


def submit(cluster: Slurm, recipe: Path) -> str:
    """Submit as the documentation says, for nodes of this size. Returns the job's id."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    options = ["--parsable", "--cpus-per-task=3", f"--output={recipe.parent}/slurm-%j.out"]
    return cluster.run("sbatch", *options, "cluster/slurm.sh", str(recipe), cwd=ROOT, PATH=path, PYTHONPATH=str(TESTS))


@pytest.mark.timeout(600)
def test_ray_may_use_all_cpus_of_its_step(tmp_path: Path) -> None:
    """Where Slurm binds tasks to CPUs, as most clusters do."""
    cpus = 2
    if len(os.sched_getaffinity(0)) < cpus:
        pytest.skip(f"needs {cpus} CPUs")
    program = tmp_path / "bin" / "orpo-ray"
    program.parent.mkdir()
    program.write_text(AFFINITY)
    program.chmod(0o755)
    path = f"{program.parent}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    options = ["--parsable", f"--cpus-per-task={cpus}", f"--output={tmp_path}/slurm.out"]
    with slurm(["one", "two"], cpus=cpus, tasks=BOUND) as cluster:
        job = cluster.run("sbatch", *options, "cluster/slurm.sh", "recipe.yaml", cwd=ROOT, PATH=path)
        state = cluster.wait_for_end(job, STARTED)
    said = (tmp_path / "slurm.out").read_text()
    assert state == "COMPLETED", said
    assert f"usable CPUs: {cpus} {cpus}" in said, said


def nodes_of_workers(job: str) -> set[str]:
    """Return the names of the Slurm nodes that a job's training workers run on."""
    found = set()
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            is_worker = "".join(process.cmdline()[:1]).startswith("ray::RayTrainWorker")
            if is_worker and process.environ().get("SLURM_JOB_ID") == job:
                found.add(process.environ()["SLURMD_NODENAME"])
    return found


def processes_of(job: str) -> list[str]:
    """Return the command lines of the processes of a job that still run."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get("SLURM_JOB_ID") == job:
                found.append(" ".join(process.cmdline()))
    return found


@pytest.mark.timeout(1800)
def test_a_job_trains_on_two_nodes_and_the_same_submission_resumes(ray_cluster: None, tmp_path: Path) -> None:
    data = {"train": str(write_pairs(tmp_path / "data", 40))}
    optim = {"max_steps": STEPS, "adam_epsilon": 1e-4}
    recipe = tiny_recipe(
        tmp_path, "slurm", optim=optim, checkpoint={"every_steps": 5},
        data=data | {"format": "support.slow_rows:in_turn"}, scaling={"num_workers": 2, "cpus_per_worker": 1.6},
    )  # fmt: skip
    path, folder = tmp_path / "recipe.yaml", Path(recipe.run_uri)
    path.write_text(recipe.to_yaml())
    with slurm(["one", "two"]) as cluster:

        def said(job: str) -> str:
            return (tmp_path / f"slurm-{job}.out").read_text()

        def has_step(job: str, step: int) -> bool:
            assert cluster.state(job) in ("PENDING", "RUNNING"), said(job)
            return last_step(folder) >= step

        job = submit(cluster, path)
        wait_until(lambda: has_step(job, 8), "step 8", STARTED)
        assert nodes_of_workers(job) == {"one", "two"}
        # As at the end of the allocation (`--signal=B:TERM@300`): saves a checkpoint and ends.
        cluster.run("scancel", "--batch", "--signal=TERM", job)
        cluster.wait_for_end(job, 120)
        first = last_step(folder)
        assert f"stopped: SIGTERM with a checkpoint of step {first};" in said(job)
        assert first < STEPS

        job = submit(cluster, path)
        wait_until(lambda: has_step(job, first + 8), f"steps after {first}", STARTED)
        cluster.run("scancel", job)  # ends Ray at the same time
        assert cluster.wait_for_end(job, KILL_WAIT + 60) == "CANCELLED"
        wait_until(lambda: not processes_of(job), "the end of all its processes", KILL_WAIT)

        job = submit(cluster, path)
        assert cluster.wait_for_end(job, STARTED) == "COMPLETED", said(job)
        assert "training, last step" in said(job)
    alone = tiny_recipe(tmp_path, "alone", optim=optim, data=data)
    run(alone)
    same_curve(folder, losses(Path(alone.run_uri)))
