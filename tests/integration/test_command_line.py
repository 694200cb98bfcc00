"""Complete runs by command: train, evaluate, export; a sweep."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil
import pyarrow.parquet as pq
import pytest
import yaml

from support.commands import orpo_ray, orpo_ray_here
from support.paths import ROOT
from support.ports import is_loopback, listening
from support.tiny_runs import losses, tiny_recipe

QUICKSTART = str(ROOT / "recipes/quickstart.yaml")
TINY_OVERRIDES = [
    "optim.max_steps=8",
    "optim.pairs_per_step=4",
    "eval.max_pairs=24",
    "data.shuffle_window=64",
]


class FirstRun(NamedTuple):
    """A run as a new user has it, with its own Ray."""

    folder: Path
    """The run folder."""
    home: Path
    rays: Path
    """The folder for Ray's sessions."""
    ports: dict[tuple[str, int], str]
    """What its processes listened on: address and port -> command."""
    err: str


def with_dead_cluster(folder: Path) -> dict[str, str]:
    """Return an environment in which Ray finds the address of a cluster that no longer runs.

    The folder's path must be short, since the paths of Ray's sockets may have 107 bytes.
    """
    (folder / "ray").mkdir()
    (folder / "ray" / "ray_current_cluster").write_text("127.0.0.1:1")
    return {"RAY_TMPDIR": str(folder)}


@pytest.fixture
def short_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def first_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FirstRun]:
    """Train with the quickstart's recipe, and look at the open ports all the time."""
    home = tmp_path_factory.mktemp("home")
    with tempfile.TemporaryDirectory() as name:
        variables = with_dead_cluster(Path(name)) | {"HOME": str(home)}
        own = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")} | variables
        options = [*TINY_OVERRIDES, "eval.on_start=true", "eval.generate=2", "eval.max_new_tokens=4"]
        command = [sys.executable, "-m", "orpo_ray", "train", QUICKSTART, *options, "scaling.num_workers=2"]
        ports: dict[tuple[str, int], str] = {}
        with (
            (home / "err").open("w") as err,
            subprocess.Popen(command, cwd=home, env=own, stderr=err, umask=0o022) as run,
        ):
            while run.poll() is None:
                ports |= listening(psutil.Process(run.pid))
                time.sleep(0.3)
        said = (home / "err").read_text()
        assert run.returncode == 0, said
        yield FirstRun(home / "runs" / "quickstart", home, Path(name), ports, said)


@pytest.mark.timeout(240)
def test_a_run_opens_no_port_to_the_network_and_no_secret_to_others(first_run: FirstRun) -> None:
    # gcs_server, raylet, its agents, the driver, the controller, the workers, torch's store and gloo
    assert len(first_run.ports) >= 12, first_run.ports
    assert all(is_loopback(host) for host, _ in first_run.ports), first_run.ports
    assert (first_run.home / ".ray" / "auth_token").stat().st_mode & 0o777 == 0o600
    (sessions,) = (path for path in first_run.rays.iterdir() if path.name != "ray")
    assert list(sessions.glob("ray/session_*/logs"))
    assert sessions.stat().st_mode & 0o777 == 0o700
    # What is for others has one mode.
    assert {path.stat().st_mode & 0o777 for path in (first_run.folder / "final").iterdir()} == {0o644}


@pytest.mark.timeout(400)
def test_train_then_evaluate(ray_cluster: None, first_run: FirstRun, tmp_path: Path) -> None:
    run_dir = first_run.folder
    assert str(run_dir) in first_run.err
    kept = {name: pq.read_table(run_dir / f"{name}.parquet") for name in ("eval_pairs", "eval_pairs_start")}
    assert {table.num_rows for table in kept.values()} == {24}
    page = (run_dir / "report.html").read_text()
    assert "the model before training" in page
    assert page.count('<article class="pair"') == 12
    assert page.count('<p class="text tokens"') == 24
    assert page.count('<article class="exchange">') == 2
    said = [json.loads(line) for line in (run_dir / "generations.jsonl").open()]
    assert [line["step"] for line in said] == [0, 0, 8, 8]
    assert "eval/grounding_gap" in first_run.err
    keys = {
        "eval/rewards/accuracies", "eval/rewards/margins", "eval/nll_loss", "eval/grounding_gap",
        "eval/rewards/accuracies_exchanged", "eval/samples_per_second", "eval/steps_per_second", "eval/pairs",
    }  # fmt: skip
    results = []
    for target in (run_dir, run_dir / "final"):
        data = ["data.eval=easy-vqa:test", "data.shuffle_window=64"] if target.name == "final" else []
        options = [*data, "eval.max_pairs=24", "eval.max_new_tokens=4", "--generate", "2", "--json"]
        evaluated = orpo_ray_here("evaluate", str(target), *options, cwd=tmp_path)
        assert evaluated.returncode == 0, evaluated.stderr
        results.append(json.loads(evaluated.stdout))
        assert keys <= set(results[-1])
        assert results[-1]["eval/pairs"] == 24
        answers = [(each["greedy"], each["sampled"]) for each in results[-1]["answers"]]
        assert answers == [(each["greedy"], each["sampled"]) for each in said[2:]]
    logged = [line for line in map(json.loads, (run_dir / "metrics.jsonl").open()) if "eval/loss" in line][-1]
    for name in ("eval/rewards/accuracies", "eval/nll_loss", "eval/grounding_gap"):
        assert results[0][name] == pytest.approx(logged[name], abs=1e-5)
        low, high = results[0]["intervals"][name]
        assert low <= results[0][name] <= high
    mean_nll = sum(kept["eval_pairs"]["nll_loss"].to_pylist()) / 24
    assert mean_nll == pytest.approx(logged["eval/nll_loss"], abs=1e-5)
    assert kept["eval_pairs_start"]["id"].to_pylist() == kept["eval_pairs"]["id"].to_pylist()
    assert results[1]["eval/nll_loss"] == pytest.approx(results[0]["eval/nll_loss"], abs=1e-6)


def test_train_adapters_then_export_them(ray_cluster: None, tmp_path: Path) -> None:
    """Train on a 4-bit base, then score the run, the merged export and the adapter export."""
    options = [*TINY_OVERRIDES, "model.lora.r=4", "model.quantization={}", "optim.learning_rate=1e-2"]
    trained = orpo_ray_here("train", QUICKSTART, *options, cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    run_dir = tmp_path / "runs" / "quickstart"
    assert f"orpo-ray export {run_dir}" in trained.stderr
    results = {}
    for target, flags in (("merged", []), ("adapter", ["--adapter"])):
        arguments = ["export", "runs/quickstart", *flags, "--output", target, "--json"]
        exported = orpo_ray_here(*arguments, cwd=tmp_path)
        assert exported.returncode == 0, exported.stderr
        assert json.loads(exported.stdout)["uri"] == str(tmp_path / target)
    data = ["data.eval=easy-vqa:test", "data.shuffle_window=64", "data.max_length=128", "orpo.beta=0.5"]
    for target, extra in (
        (str(run_dir), []), ("merged", data), ("adapter", [*data, "model.quantization={}"])
    ):  # fmt: skip
        evaluated = orpo_ray_here("evaluate", target, *extra, "eval.max_pairs=24", "--json", cwd=tmp_path)
        assert evaluated.returncode == 0, evaluated.stderr
        results[target] = json.loads(evaluated.stdout)
    logged = [line for line in map(json.loads, (run_dir / "metrics.jsonl").open()) if "eval/loss" in line][-1]
    for name in ("eval/rewards/accuracies", "eval/nll_loss", "eval/rewards/margins", "eval/grounding_gap"):
        for scores in results.values():
            assert scores[name] == pytest.approx(logged[name], abs=1e-4)


def small_sweep(folder: Path, num_trials: int) -> Path:
    """Write the recipe of a sweep with trials of 8 steps. Returns its path."""
    recipe = tiny_recipe(
        folder / "runs", "sweep", data={"eval": "easy-vqa:test"}, eval={"max_pairs": 16, "every_steps": 2},
        optim={"max_steps": 8}, tune={"num_trials": num_trials, "max_concurrent": 2},
    )  # fmt: skip
    path = folder / "sweep.yaml"
    path.write_text(recipe.to_yaml())
    return path


def check_sweep(folder: Path, err: str, num_trials: int) -> None:
    rows = re.findall(r"(?:finished|stopped early)", err.partition(f"{num_trials} trials by eval")[2])
    assert len(rows) == num_trials, err
    best = yaml.safe_load((folder / "best_recipe.yaml").read_text())
    assert best["name"] == "sweep-best"
    assert best["orpo"]["beta"] != 0.5
    trials = list((folder / "trials").iterdir())
    assert len(trials) == num_trials
    assert all(losses(trial) for trial in trials)


@pytest.mark.timeout(300)
def test_a_sweep_has_two_trials_and_a_best_one(ray_cluster: None, tmp_path: Path) -> None:
    result = orpo_ray_here("tune", str(small_sweep(tmp_path, 2)), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    check_sweep(tmp_path / "runs" / "sweep", result.stderr, 2)


@pytest.mark.nightly
@pytest.mark.timeout(600)
def test_a_sweep_leaves_nothing_behind(tmp_path: Path, short_folder: Path) -> None:
    """Runs in a new process with its own Ray cluster, so that all processes can be counted afterwards.

    Trials that are stopped early must hand back their CPUs, whatever clusters there are or were on the machine.
    """
    session = tmp_path / "session"
    marker = {"ORPO_RAY_TEST_MARKER": str(session)}
    variables = marker | with_dead_cluster(short_folder)
    result = orpo_ray("tune", str(small_sweep(tmp_path, 4)), "checkpoint.storage=runs", cwd=tmp_path, env=variables)
    assert result.returncode == 0, result.stderr
    check_sweep(tmp_path / "runs" / "sweep", result.stderr, 4)
    deadline = time.monotonic() + 30  # Ray's processes end some time after the driver
    while left := processes_with(str(session)):
        assert time.monotonic() < deadline, left
        time.sleep(0.2)


def processes_with(marker: str) -> list[str]:
    """Return the command lines of running processes whose environment contains `marker`."""
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdigit() and int(process.name) != os.getpid():
            try:
                if marker.encode() in (process / "environ").read_bytes():
                    found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode())
            except OSError:  # it ended, or belongs to another user
                continue
    return found
