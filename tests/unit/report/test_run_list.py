"""`orpo-ray runs`: every run of a folder with its state, and nothing that is no run."""

from __future__ import annotations

import io
import json
import os
import re
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from orpo_ray.errors import UserError
from orpo_ray.report.run_list import ListedRun, list_runs, print_runs
from support.commands import orpo_ray_here
from support.planted_runs import planted_run


def lease(run: Path, pid: int, started: float) -> None:
    import socket

    holder = {"id": "x", "host": socket.gethostname(), "pid": pid, "started": started, "renewals": 1}
    (run / "lease.json").write_text(json.dumps(holder))


def test_states_and_figures(tmp_path: Path) -> None:
    finished = planted_run(tmp_path / "a", "group/finished")
    stopped = planted_run(tmp_path / "a", "stopped", finished=False)
    running = planted_run(tmp_path / "a", "running", finished=False)
    lease(running, os.getpid(), psutil.Process().create_time())
    lease(stopped, os.getpid(), 12.0)  # the process that has this id now is another one
    new = planted_run(tmp_path / "a", "new", finished=False)
    (new / "metrics.jsonl").unlink()
    trial = planted_run(new / "trials", "trial-0", finished=False)
    (tmp_path / "a" / "broken").mkdir()
    (tmp_path / "a" / "broken" / "recipe.yaml").write_text("name: [")
    (tmp_path / "a" / "no-run").mkdir()
    os.utime(finished / "metrics.jsonl", (1, 1))
    os.utime(finished / "recipe.yaml", (1, 1))
    runs = list_runs(str(tmp_path / "a"))
    found = {run.path: run.state for run in runs}
    assert found == {
        str(finished): "finished", str(stopped): "stopped", str(running): "running",
        str(new): "not started", str(trial): "stopped",
    }  # fmt: skip
    assert runs[-1].path == str(finished)  # written to longest ago
    assert runs[-1].step == 120
    assert runs[-1].figures["eval/rewards/accuracies"] == pytest.approx(0.886, abs=0.01)
    out = io.StringIO()
    print_runs(runs, str(tmp_path / "a"), Console(file=out, width=200))
    assert len(out.getvalue().splitlines()) == 6


@pytest.mark.parametrize("is_terminal", [True, False])
def test_names_and_states_are_whole_at_any_width(tmp_path: Path, is_terminal: bool) -> None:
    names = [f"a-search-over-learning-rates-and-beta/trial-{n}" for n in range(2)]
    runs = [
        ListedRun(f"{tmp_path}/{name}", "not started", "HuggingFaceTB/SmolVLM-256M-Instruct", 12, {"train/loss": 1.5})
        for name in names
    ]
    out = io.StringIO()
    print_runs(runs, str(tmp_path), Console(file=out, width=80, force_terminal=is_terminal, no_color=True))
    lines = [re.sub(r"\x1b\[[\d;]*m", "", line) for line in out.getvalue().splitlines()]
    assert len(lines) == 3
    assert [line.split()[:3] for line in lines[1:]] == [[name, "not", "started"] for name in names]
    assert all(("SmolVLM-256M-Instruct" in line) != is_terminal and "1.5000" in line for line in lines[1:])
    assert len(lines[1]) < 200


def test_a_folder_without_runs_is_said_to_have_none(tmp_path: Path) -> None:
    assert f"there are no runs in {tmp_path}" in orpo_ray_here("runs", str(tmp_path)).stderr


def test_the_command_lists_and_refuses_what_is_no_folder(tmp_path: Path) -> None:
    planted_run(tmp_path / "runs", "one")
    found = orpo_ray_here("runs", "--json", cwd=tmp_path)
    assert [run["state"] for run in json.loads(found.stdout)["runs"]] == ["finished"]
    with pytest.raises(UserError, match="no such folder"):
        list_runs(str(tmp_path / "none"))
    assert orpo_ray_here("runs", "none", cwd=tmp_path).returncode == 2
