"""Measure how long a new user waits: for `orpo-ray --help`, the first optimizer step, and the quickstart's final model.

    python benchmarks/first_run.py [--json] [--quickstart]
    python benchmarks/first_run.py --first-step [--against CHECKOUT] [--rounds N] [--recipe FILE] [--json]

Prints one row: medians in seconds with commit, command, hardware and date. `help_to_python_ratio` is against starting a
bare Python on the same machine in the same minutes, since seconds differ from machine to machine.

`--first-step` measures from the command to the first line of `metrics.jsonl`, which a run writes when its first
optimizer step is done, and says when the processes on the way appeared and how much CPU time each kind had used by
then. Every run is ended after that line. `--against` runs another checkout of this repository in the same environment,
in turn (A B, B A, ...); `first_step_ratio` is the median over rounds of this checkout's seconds to the other's.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from machine import ROOT, provenance

QUICKSTART = ROOT / "recipes/quickstart.yaml"
FIRST_STEP_LIMIT = 300.0
POLL_SECONDS = 0.05
OTHER_WORKERS = "Ray's other workers"
# What a process is for, by a part of its command line; the first match counts.
ROLES = (
    ("gcs_server", "Ray's own processes"),
    ("raylet/raylet", "Ray's own processes"),
    ("dashboard", "Ray's own processes"),
    ("log_monitor", "Ray's own processes"),
    ("monitor.py", "Ray's own processes"),
    ("runtime_env/agent", "Ray's own processes"),
    ("ray::DashboardAgent", "Ray's own processes"),
    ("ray::RuntimeEnvAgent", "Ray's own processes"),
    ("forkserver", "Ray's own processes"),
    ("ray::TrainController", "Train controller"),
    ("ray::RayTrainWorker", "training worker"),
    ("ray::Read", "reading and encoding"),
    ("ray::MapBatches", "reading and encoding"),
    ("ray::", OTHER_WORKERS),
    ("_worker.py", OTHER_WORKERS),
    ("orpo_ray", "driver"),
)


def seconds(command: list[str], **options: object) -> float:
    """Wall time of a command that must succeed."""
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **options)  # type: ignore[call-overload]
    return time.perf_counter() - started


def quickstart() -> dict[str, float]:
    """The quickstart in an empty folder: seconds from command to final model, and what it reached."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "orpo_ray", "train", str(QUICKSTART)]
        wall = seconds(command, cwd=folder)
        lines = [json.loads(line) for line in (Path(folder) / "runs/quickstart/metrics.jsonl").open()]
    training = sum(32 / line["train/pairs_per_second"] for line in lines if "train/loss" in line)
    kept = ("eval/rewards/accuracies", "eval/rewards/accuracies_exchanged", "eval/grounding_gap")
    return {"quickstart_s": wall, "quickstart_steps_s": training} | {name: lines[-1][name] for name in kept}


@dataclass
class FirstStep:
    """One start of a run.

    seconds: from the command to the first line of metrics.
    appeared: seconds after the command at which the first process of each role was seen.
    cpu_seconds: CPU time that the processes of each role had used when the first step was done.
    """

    seconds: float
    appeared: dict[str, float] = field(default_factory=dict)
    cpu_seconds: Counter[str] = field(default_factory=Counter)


def first_step(checkout: Path, recipe: Path) -> FirstStep:
    """Start a run of the recipe with this checkout's package, and end it after its first step."""
    # Short, since the paths of Ray's sockets are limited, and away from other Rays of this machine.
    with tempfile.TemporaryDirectory(prefix="first-") as folder:
        environment = os.environ | {"PYTHONPATH": str(checkout), "RAY_TMPDIR": folder}
        environment.pop("RAY_ADDRESS", None)
        log = Path(folder) / "log"
        command = [sys.executable, "-m", "orpo_ray", "train", str(recipe), f"checkpoint.storage={folder}/runs"]
        started = time.perf_counter()
        with log.open("wb") as output:
            driver = psutil.Popen(command, cwd=folder, env=environment, stdout=output, stderr=output)
        seen: dict[psutil.Process, str] = {}
        found = FirstStep(0.0)
        try:
            while not any(file.stat().st_size for file in Path(folder).glob("runs/*/metrics.jsonl")):
                now = time.perf_counter() - started
                if driver.poll() is not None or now > FIRST_STEP_LIMIT:
                    raise SystemExit(f"no first step after {now:.0f} s:\n{log.read_text()[-4000:]}")
                for process in _family(driver):
                    with contextlib.suppress(psutil.Error):
                        role = _role(process)
                        found.appeared.setdefault(role, round(now, 2))
                        if role != OTHER_WORKERS or process not in seen:  # an idle one keeps the role that it had
                            seen[process] = role
                time.sleep(POLL_SECONDS)
            found.seconds = time.perf_counter() - started
            for process, role in seen.items():
                with contextlib.suppress(psutil.Error):
                    times = process.cpu_times()
                    found.cpu_seconds[role] += times.user + times.system
        finally:
            _end(driver)
        return found


def _family(driver: psutil.Popen) -> list[psutil.Process]:
    try:
        return [driver, *driver.children(recursive=True)]
    except psutil.Error:
        return []


def _role(process: psutil.Process) -> str:
    line = " ".join(process.cmdline())
    return next((role for mark, role in ROLES if re.search(re.escape(mark), line)), "other")


def _end(driver: psutil.Popen) -> None:
    """End the run and all that it started."""
    processes = _family(driver)
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(processes, timeout=20)
    driver.wait(20)


def first_steps(against: Path | None, recipe: Path, rounds: int) -> dict[str, object]:
    """Medians over rounds, with the ratio to another checkout where one is given."""
    checkouts = [ROOT] if against is None else [ROOT, against]
    runs: dict[Path, list[FirstStep]] = {checkout: [] for checkout in checkouts}
    for checkout in checkouts:  # files that a first start writes or brings into memory
        first_step(checkout, recipe)
    for number in range(rounds):
        for checkout in checkouts if number % 2 == 0 else reversed(checkouts):
            runs[checkout].append(first_step(checkout, recipe))
            print(f"{checkout}: {runs[checkout][-1].seconds:.2f} s", file=sys.stderr)
    row = _medians(runs[ROOT], "")
    if against is not None:
        pairs = zip(runs[ROOT], runs[against], strict=True)
        row |= _medians(runs[against], "against_")
        row["first_step_ratio"] = round(statistics.median(here.seconds / there.seconds for here, there in pairs), 3)
        here, there = (sum(run.cpu_seconds.total() for run in runs[checkout]) for checkout in (ROOT, against))
        row["first_step_cpu_ratio"] = round(here / there, 3)
        git = ["git", "-C", str(against), "rev-parse", "--short", "HEAD"]
        row["against_commit"] = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    return row


def _medians(runs: list[FirstStep], prefix: str) -> dict[str, object]:
    roles = dict.fromkeys(role for run in runs for role in run.appeared)
    return {
        f"{prefix}first_step_s": round(statistics.median(run.seconds for run in runs), 2),
        f"{prefix}appeared_after_s": {
            role: round(statistics.median(run.appeared[role] for run in runs if role in run.appeared), 2)
            for role in roles
        },
        f"{prefix}cpu_s": {role: round(statistics.median(run.cpu_seconds[role] for run in runs), 2) for role in roles},
    }


def help_times() -> dict[str, object]:
    """Seconds of `orpo-ray --help`, and their ratio to a bare Python's."""
    bare, helps = [], []
    for _ in range(7):  # in turn, so that a drift of the machine's speed meets both
        bare.append(seconds([sys.executable, "-c", "pass"]))
        helps.append(seconds([sys.executable, "-m", "orpo_ray", "--help"]))
    return {
        "help_s": round(statistics.median(helps), 3),
        "help_to_python_ratio": round(statistics.median(h / b for h, b in zip(helps, bare, strict=True)), 2),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--quickstart", action="store_true", help="also run the quickstart (about 3 minutes)")
    parser.add_argument("--first-step", action="store_true", help="measure the time to the first optimizer step")
    parser.add_argument("--against", type=Path, help="another checkout, to run in turn with this one")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each checkout")
    parser.add_argument("--recipe", type=Path, default=QUICKSTART, help="what --first-step starts")
    arguments = parser.parse_args()
    row: dict[str, object] = {**provenance()}
    if arguments.first_step:
        against = arguments.against and arguments.against.resolve()
        row |= first_steps(against, arguments.recipe.resolve(), arguments.rounds)
    else:
        row |= help_times()
    if arguments.quickstart:
        row |= {name: round(value, 4) for name, value in quickstart().items()}
    print(json.dumps(row) if arguments.json else "\n".join(f"{name:36} {value}" for name, value in row.items()))


if __name__ == "__main__":
    main()
