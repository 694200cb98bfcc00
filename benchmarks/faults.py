"""Plant faults in short runs, and say what each one cost.

    python benchmarks/faults.py [--faults NAME ...] [--json]

Every fault is real: processes are killed, files damaged, a disk filled, a store made to refuse. Each run is that of a
tiny model with two workers and its own Ray: 60 steps of 4 pairs, with a checkpoint every 5 steps. It is compared with a
run without faults. A run that a fault ends is gone on with by the same command. Columns:

- `seconds`: from the fault, or from that command, to the first step that had not been made before;
- `repeated`: steps that were made again;
- `lost`, `twice`: pairs that the final weights have not seen, or have seen twice, by the position of the last
  checkpoint and the steps in `metrics.jsonl`;
- `off`: the largest difference to a loss of the run without faults.

The full disk needs the right to mount one, and the store needs `moto`; without, their rows say so.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
from machine import ROOT, provenance

sys.path.insert(0, str(ROOT / "tests"))  # the small disk and the store, which tests use too

from orpo_ray.storage.run_folder import FINAL, RunFolder
from orpo_ray.tracking.jsonl import read_jsonl
from orpo_ray.training.checkpoint import newest_position
from orpo_ray.training.checkpoint_choice import checkpoint_names
from support.s3_server import BUCKET, s3_server
from support.small_disk import small_disk
from support.tiny_runs import tiny_recipe

STEPS, PAIRS, SAVE_EVERY, FAULT_AFTER = 60, 4, 5, 13
LIMIT_S = 150.0
POLL_S, REMOTE_POLL_S = 0.02, 0.5
TOLERANCE = 1e-4  # of a loss, as in the tests of resumed runs


@dataclass
class Run:
    """A run as a user starts it."""

    storage: str
    scratch: Path
    """Folder for the recipe and for Ray."""
    process: subprocess.Popen[str] | None = None
    said: list[str] = field(default_factory=list)
    """What each of its commands printed."""

    @property
    def folder(self) -> RunFolder:
        """The run folder."""
        return RunFolder(f"{self.storage}/run")

    def start(self) -> None:
        """Give the command."""
        recipe = tiny_recipe(
            self.scratch, "run", optim={"max_steps": STEPS, "pairs_per_step": PAIRS}, scaling={"num_workers": 2},
            checkpoint={"every_steps": SAVE_EVERY, "keep": 2},
        )  # fmt: skip
        path = self.scratch / "recipe.yaml"
        path.write_text(recipe.to_yaml())
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        environment |= {"PYTHONPATH": str(ROOT), "RAY_TMPDIR": str(self.scratch), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "orpo_ray", "train", str(path), f"checkpoint.storage={self.storage}"]
        with (self.scratch / "log").open("w") as log:
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, text=True)

    def wait(self) -> int:
        """Wait for the end of the command; return its exit code."""
        assert self.process is not None
        code = self.process.wait(LIMIT_S)
        self.said.append((self.scratch / "log").read_text())
        return code

    def lines(self) -> list[dict[str, Any]]:
        """Read the metrics."""
        folder = self.folder
        folder.pull("metrics.jsonl")
        return read_jsonl(folder.path / "metrics.jsonl")

    def last_step(self) -> int:
        """Return the last step that was made, as far as the run folder tells."""
        return max((line["step"] for line in self.lines()), default=0)

    def wait_for(self, step: int) -> None:
        """Wait until a step is made."""
        assert self.process is not None
        deadline = time.monotonic() + LIMIT_S
        while self.last_step() < step:
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"no step {step}:\n{(self.scratch / 'log').read_text()[-4000:]}")
            time.sleep(REMOTE_POLL_S if self.folder.is_remote else POLL_S)

    def kill(self, role: str) -> None:
        """Kill the first process of the run with this name."""
        assert self.process is not None
        for child in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if role in child.name():
                    child.kill()
                    return
        raise SystemExit(f"no process {role}")

    def newest_file(self) -> Path:
        """Return the state in the newest checkpoint."""
        return self.folder.path / checkpoint_names(self.folder)[0] / "engine" / "replicated.pt"


@dataclass(frozen=True)
class Fault:
    """A fault, and how it is planted after step FAULT_AFTER."""

    name: str
    plant: Callable[[Run], None]
    ends_run: bool
    exit_code: int | None = None
    """Of the command that the fault ends."""
    repair: Callable[[Run], None] = lambda run: None
    place: Callable[[Path], contextlib.AbstractContextManager[str]] = lambda scratch: contextlib.nullcontext(
        f"{scratch}/runs"
    )
    """Makes the storage."""


def kill_driver(run: Run) -> None:
    """Kill the command. Its Ray ends with it."""
    assert run.process is not None
    run.process.kill()


def tear_checkpoint(run: Run) -> None:
    """Kill the command, and cut off half of its newest checkpoint's state."""
    kill_driver(run)
    run.wait()
    os.truncate(run.newest_file(), run.newest_file().stat().st_size // 2)


def flip_byte(run: Run) -> None:
    """Kill the command, and change one byte in its newest checkpoint's state."""
    kill_driver(run)
    run.wait()
    with run.newest_file().open("r+b") as file:
        file.seek(1000)
        byte = file.read(1)[0]
        file.seek(1000)
        file.write(bytes([byte ^ 1]))


def terminate(run: Run) -> None:
    """Send SIGTERM, as a scheduler does."""
    assert run.process is not None
    run.process.send_signal(signal.SIGTERM)


@contextlib.contextmanager
def full_disk(scratch: Path) -> Iterator[str]:
    """A disk that is made smaller than what a third checkpoint needs, once there are two."""
    with small_disk(scratch / "disk", 1 << 30) as disk:
        yield str(disk.path)


def remount(run: Run, num_bytes: int) -> None:
    """Change the size of the disk."""
    subprocess.run(["mount", "-o", f"remount,size={num_bytes}", run.storage], check=True)


def fill_disk(run: Run) -> None:
    """Leave room for half a checkpoint."""
    used = sum(path.stat().st_size for path in Path(run.storage).rglob("*") if path.is_file())
    remount(run, used + run.newest_file().stat().st_size // 2)


STORE: dict[str, Any] = {}


@contextlib.contextmanager
def store(scratch: Path) -> Iterator[str]:
    """An S3 server."""
    with pytest.MonkeyPatch.context() as environment, s3_server(environment) as STORE["faults"]:
        yield f"s3://{BUCKET}/{scratch.name}"


def refuse(run: Run) -> None:
    """Let the store refuse every write."""
    STORE["faults"].refuses_writes = True


def accept(run: Run) -> None:
    """Let the store take writes again."""
    STORE["faults"].refuses_writes = False


FAULTS = {
    "none": Fault("none", lambda run: None, ends_run=False),
    "worker": Fault("a worker is killed", lambda run: run.kill("RayTrainWorker"), ends_run=False),
    "status": Fault("the status actor is killed", lambda run: run.kill("RunStatus"), ends_run=False),
    "driver": Fault("the driver is killed", kill_driver, ends_run=True, exit_code=-signal.SIGKILL),
    "sigterm": Fault("SIGTERM", terminate, ends_run=True, exit_code=128 + signal.SIGTERM),
    "torn": Fault("the newest checkpoint is torn", tear_checkpoint, ends_run=True, exit_code=-signal.SIGKILL),
    "byte": Fault("one byte of it is flipped", flip_byte, ends_run=True, exit_code=-signal.SIGKILL),
    "disk": Fault("the disk is full", fill_disk, True, 1, lambda run: remount(run, 1 << 30), full_disk),
    "store": Fault("the store refuses writes", refuse, True, 1, accept, store),
}


def measure(fault: Fault, reference: dict[int, float]) -> dict[str, Any]:
    """Run with a fault, and return its row. The first call, without a fault, fills the losses to compare with."""
    # Short, since the paths of Ray's sockets are limited.
    with (
        tempfile.TemporaryDirectory(prefix="f-", ignore_cleanup_errors=True) as folder,
        fault.place(Path(folder)) as storage,
    ):
        run = Run(storage, Path(folder))
        try:
            return _measured(fault, run, reference)
        finally:
            if run.process is not None and run.process.poll() is None:
                run.process.kill()


def _measured(fault: Fault, run: Run, reference: dict[int, float]) -> dict[str, Any]:
    run.start()
    run.wait_for(FAULT_AFTER)
    fault.plant(run)
    began = time.perf_counter()
    if fault.ends_run:
        code = run.wait()
        if code != fault.exit_code:
            raise SystemExit(f"exit code {code} instead of {fault.exit_code}:\n{run.said[-1][-4000:]}")
        made = max(run.last_step(), *map(int, re.findall(r"checkpoint of step (\d+)", run.said[-1])), 0)
        fault.repair(run)
        began = time.perf_counter()
        run.start()
    else:
        made = run.last_step()
    run.wait_for(made + 1)
    seconds = time.perf_counter() - began
    if run.wait() != 0:
        raise SystemExit(run.said[-1][-4000:])
    lines = run.lines()
    losses = {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}
    counts = [line["step"] for line in lines if "train/loss" in line]
    resumed = [line["step"] for line in lines if "train/restarts" in line]
    position = newest_position(run.folder, print)
    assert position is not None
    if not reference:
        reference.update(losses)
    off = max(abs(losses.get(step, float("inf")) - loss) for step, loss in reference.items())
    return {
        "fault": fault.name,
        "survived": run.folder.has_model(FINAL),
        "by": "the same command" if fault.ends_run else "itself",
        "seconds": round(seconds, 1),
        "repeated": max(0, made - resumed[0]) if resumed else 0,
        "lost": max(STEPS * PAIRS - position.seen, (STEPS - len(losses)) * PAIRS),
        "twice": max(position.seen - STEPS * PAIRS, (len(counts) - len(losses)) * PAIRS),
        "off": off,
        "equal": off <= TOLERANCE,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a table in Markdown."""
    lines = [
        "| Fault | Survived | Seconds to recover | Steps repeated | Pairs lost | Pairs twice | Losses equal |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if "skipped" in row:
            lines.append(f"| {row['fault']} | not tried: {row['skipped']} | | | | | |")
            continue
        survived = f"yes, by {row['by']}" if row["survived"] else "no"
        equal = f"{'yes' if row['equal'] else 'no'} ({row['off']:.0e})"
        figures = (row["seconds"], row["repeated"], row["lost"], row["twice"], equal)
        lines.append(f"| {row['fault']} | {survived} | {' | '.join(map(str, figures))} |")
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    faults = [name for name in FAULTS if name != "none"]
    parser.add_argument("--faults", nargs="+", choices=faults, default=faults, help="which to plant (default: all)")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    arguments = parser.parse_args()
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # every request of the store
    reference: dict[int, float] = {}
    rows = []
    for name in ("none", *arguments.faults):
        try:
            row = measure(FAULTS[name], reference)
        except pytest.skip.Exception as skipped:
            row = {"fault": FAULTS[name].name, "skipped": str(skipped)}
        print(row, file=sys.stderr)
        if name != "none":
            rows.append(row)
    print(json.dumps(provenance() | {"rows": rows}) if arguments.json else f"{provenance()}\n\n{table(rows)}")


if __name__ == "__main__":
    main()
