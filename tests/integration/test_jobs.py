"""Jobs on a Ray that asks for a token: `ray job submit` as the documentation has it, and `orpo-ray submit`."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import yaml

from orpo_ray.ray_cluster.new_ray import unused_ports
from orpo_ray.tracking.jsonl import read_jsonl
from orpo_ray.tracking.metrics_file import REPEATED, RESTARTS
from support.commands import orpo_ray, ray_job_submit
from support.local_head import local_head, without_ray
from support.paths import ROOT
from support.runs import last_step, run, wait_until
from support.tiny_runs import losses, tiny_recipe, write_pairs

SCRIPTS = Path(sys.executable).parent
OPTIM = {"max_steps": 45}
# Ray Data's actors for the whole cluster, and idle processes, which Ray starts for whoever comes next.
LASTING = ("ray::_StatsActor", "ray::_UsageCollectionActor", "ray::_AutoscalingCoordinatorActor", "ray::IDLE")


@pytest.fixture
def dashboard(ray_cluster: None) -> str:
    import ray

    address = ray._private.worker.global_worker.node.webui_url  # type: ignore[attr-defined]
    assert address.startswith("127.0.0.1:")
    return f"http://{address}"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A working directory with a recipe, and the runtime environment of nodes that have orpo-ray."""
    folder = tmp_path / "project"
    (folder / "recipes").mkdir(parents=True)
    data = {"train": str(write_pairs(tmp_path / "data", 40))}
    recipe = tiny_recipe(tmp_path / "runs", "job", optim=OPTIM, data=data)
    (folder / "recipes" / "tiny.yaml").write_text(recipe.to_yaml())
    (folder / "cluster").mkdir()
    runtime_env = {"env_vars": {"PATH": f"{SCRIPTS}:${{PATH}}", "RAY_JOB_STOP_WAIT_TIME_S": "120"}}
    (folder / "cluster" / "runtime_env.yaml").write_text(yaml.safe_dump(runtime_env))
    return folder


def processes() -> dict[psutil.Process, str]:
    """Return the processes of this process's Ray that run now, with their commands, without what outlives a job."""
    found = {}
    for each in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if each.status() != psutil.STATUS_ZOMBIE:
                found[each] = " ".join(each.cmdline())
    return {each: command for each, command in found.items() if not command.startswith(LASTING)}


def submit(dashboard: str, project: Path) -> str:
    """Submit with Ray's own command. Returns the job's id."""
    options = ("--address", dashboard, "--working-dir", ".", "--no-wait", "--runtime-env", "cluster/runtime_env.yaml")
    done = ray_job_submit(*options, "--", "orpo-ray", "train", "recipes/tiny.yaml", cwd=project)
    assert done.returncode == 0, done.stdout + done.stderr
    return re.findall(r"raysubmit_\w+", done.stdout + done.stderr)[0]


def test_a_job_that_fails_says_why_and_so_does_the_command(dashboard: str, project: Path) -> None:
    command = ("submit", "recipes/tiny.yaml", "--address", dashboard, "--no-cost", "data.train=/none/pairs.jsonl")
    done = orpo_ray(*command, cwd=project)
    assert done.returncode == 2, done.stdout + done.stderr
    assert re.fullmatch(r"raysubmit_\w+", done.stdout.strip()), done.stdout
    assert "error: data.train: " in done.stderr  # the job's log
    assert "/none/pairs.jsonl" in done.stderr
    assert "failed: " in done.stderr


@pytest.mark.nightly
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("what", "end", "left"),
    [
        ("data check", "data_check.html", "data_check.html"),
        ("data prepare", "orpo-ray train", "data/manifest.json"),
        ("train", "training, last step", "final/config.json"),
        ("tune", "best", "sweep.json"),
    ],
)
def test_a_recipe_is_submitted_and_followed_to_its_end(
    dashboard: str, project: Path, tmp_path: Path, what: str, end: str, left: str
) -> None:
    overrides = ["optim.max_steps=4"]
    if what == "tune":
        overrides += ["data.eval_fraction=0.2", "tune.num_trials=2", "tune.scheduler=none"]
    options = ("--address", dashboard, "--command", what, "--price-per-hour", "H100=1.5")
    command = ("submit", "recipes/tiny.yaml", *options, *overrides)
    done = orpo_ray(*command, cwd=project, env={"WANDB_API_KEY": "not-a-real-key-but-secret"})
    assert done.returncode == 0, done.stdout + done.stderr
    job = done.stdout.strip()  # nothing else on stdout
    assert re.fullmatch(r"raysubmit_\w+", job), done.stdout
    cost = re.search(r"^cost +(2 trials, each )?about .* and .*\$[\d.]+ on 1 x ", done.stderr, re.MULTILINE)
    assert bool(cost) == (what in ("train", "tune")), done.stderr
    assert bool(cost and cost[1]) == (what == "tune"), done.stderr
    assert re.search(r"^job +" + job, done.stderr, re.MULTILINE)
    assert end in done.stderr  # the end of the job's log
    assert (tmp_path / "runs" / "job" / left).is_file()
    # What everyone with access to the dashboard can read.
    from ray.job_submission import JobSubmissionClient

    found = JobSubmissionClient(dashboard).get_job_info(job)
    assert found.entrypoint == shlex.join(["python", "-m", "orpo_ray", *what.split(), "recipes/tiny.yaml", *overrides])
    assert "not-a-real-key" not in str(found)


@pytest.mark.nightly
@pytest.mark.timeout(600)
def test_a_run_is_evaluated_and_exported_and_the_cluster_checked_by_jobs(
    dashboard: str, project: Path, tmp_path: Path
) -> None:
    data = str(tmp_path / "data" / "train.jsonl")
    recipe = tiny_recipe(tmp_path / "runs", "job", optim={"max_steps": 2}, data={"train": data})
    run(recipe)
    command = ("submit", "recipes/tiny.yaml", "--address", dashboard, "--command")
    done = orpo_ray(*command, f"evaluate data.eval={data} eval.max_pairs=8 --generate 2", cwd=project)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "8 pairs" in done.stderr
    done = orpo_ray(*command, f"export --output {tmp_path}/exported", cwd=project)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "exported" / "config.json").is_file()
    done = orpo_ray(*command, "doctor", cwd=project)
    assert re.search(r"^ok +version of orpo-ray ", done.stderr, re.MULTILINE), done.stderr
    assert re.search(r"^ok +storage +\S+ is written and seen by 1 node", done.stderr, re.MULTILINE), done.stderr


@pytest.mark.nightly
@pytest.mark.timeout(1800)
def test_a_stopped_job_saves_and_the_same_submission_resumes(dashboard: str, project: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "runs" / "job"
    before = processes()
    first = submit(dashboard, project)
    wait_until(lambda: run_dir.is_dir() and last_step(run_dir) >= 5, "step 5", 240)
    ours = {each: command for each, command in processes().items() if each not in before}
    assert any("recipes/tiny.yaml" in command for command in ours.values()), ours  # the driver
    assert any(command.startswith("ray::RayTrainWorker") for command in ours.values()), ours
    stop = [str(SCRIPTS / "ray"), "job", "stop", "--address", dashboard, first]
    stopped = subprocess.run(stop, capture_output=True, text=True, check=False)
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr
    left: dict[psutil.Process, str] = {}

    def has_ended() -> bool:
        left.clear()
        left.update((each, command) for each, command in processes().items() if each in ours)
        return not left

    try:
        wait_until(has_ended, "the end of the job's processes", 60)
    except AssertionError:
        raise AssertionError(f"the job has left {left}") from None
    step = last_step(run_dir)
    assert 5 <= step < OPTIM["max_steps"]
    assert list(run_dir.glob("checkpoint_*"))

    again = orpo_ray("submit", "recipes/tiny.yaml", "--no-cost", "--address", dashboard, cwd=project)
    assert again.returncode == 0, again.stdout + again.stderr
    # It went on from the last step, and made none again, as a run from the start would have.
    restarts = [line for line in read_jsonl(run_dir / "metrics.jsonl") if RESTARTS in line]
    assert [(line["step"], line[RESTARTS], line[REPEATED]) for line in restarts] == [(step, 1, 0)]
    reference = run(
        tiny_recipe(tmp_path / "runs", "reference", optim=OPTIM, data={"train": str(tmp_path / "data" / "train.jsonl")})
    )
    assert losses(run_dir) == pytest.approx(losses(Path(reference.run_uri)), abs=1e-4)


@pytest.mark.nightly
@pytest.mark.timeout(900)
def test_the_command_of_the_documentation_runs_as_it_is_written(tmp_path: Path) -> None:
    """Without a runtime environment, with `orpo-ray` from the environment in which the head was started."""
    page = (ROOT / "docs" / "clusters.md").read_text()
    (line,) = re.findall(r"`(ray job submit [^`]* -- orpo-ray train recipes/quickstart.yaml)`", page)
    port = unused_ports(1)[0]
    program, *arguments = shlex.split(line.replace("http://127.0.0.1:8265", f"http://127.0.0.1:{port}"))
    assert (program, arguments[:2]) == ("ray", ["job", "submit"])
    assert f"http://127.0.0.1:{port}" in arguments
    overrides = (f"checkpoint.storage={tmp_path}/runs", "optim.max_steps=4", "eval.max_pairs=16")
    options = ("--num-cpus=3", "--object-store-memory=300000000", f"--dashboard-port={port}")
    with local_head(*options) as head:
        token = without_ray(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=os.fspath(head.token))
        done = ray_job_submit(*arguments[2:], *overrides, cwd=ROOT, env=token)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-3000:]
    assert "training, last step" in done.stdout
    assert (tmp_path / "runs" / "quickstart" / "final" / "config.json").is_file()


def test_a_job_without_the_token_is_refused_before_the_upload(dashboard: str, project: Path, tmp_path: Path) -> None:
    wrong = tmp_path / "token"
    wrong.write_text("0" * 64)
    for variables in ({"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(wrong)}):
        command = ("submit", "recipes/tiny.yaml", "--no-cost", "--address", dashboard)
        refused = orpo_ray(*command, cwd=project, env=variables)
        assert refused.returncode == 2, refused.stderr
        assert "the cluster asks for a token, and none or another one was given" in refused.stderr
        assert "Traceback" not in refused.stderr
        assert os.fspath(tmp_path / "runs") in refused.stderr  # it has said where the run would be
