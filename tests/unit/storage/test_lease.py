"""One run writes to a run folder; a successor takes the lease of a dead one."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from orpo_ray.errors import UserError
from orpo_ray.storage import lease as lease_module
from orpo_ray.storage.lease import LEASE_FILE, Holder, Lease, LeaseLost
from orpo_ray.storage.run_folder import RunFolder

HOLD = """
import sys, time
from orpo_ray.storage.lease import Lease
from orpo_ray.storage.run_folder import RunFolder
with Lease(RunFolder(sys.argv[1]), on_lost=print):
    print("holds", flush=True)
    time.sleep(600)
"""


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "RENEW_SECONDS", 0.05)
    monkeypatch.setattr(lease_module, "DEAD_SECONDS", 2.0)


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(str(tmp_path))


def held_elsewhere(folder: RunFolder) -> Callable[[int], None]:
    """Write the lease of a run on another machine; the returned function renews it."""
    holder = replace(Holder.this_process(), host="another")

    def renew(renewals: int) -> None:
        (folder.path / LEASE_FILE).write_text(json.dumps(asdict(replace(holder, renewals=renewals))))

    renew(1)
    return renew


def test_a_second_run_is_refused_until_the_first_ends(folder: RunFolder) -> None:
    first = subprocess.Popen([sys.executable, "-c", HOLD, folder.uri], stdout=subprocess.PIPE, text=True)
    assert first.stdout is not None
    assert first.stdout.readline() == "holds\n"
    with pytest.raises(UserError, match=f"process {first.pid} on .*\n.*fix: wait until"), Lease(folder, print):
        pass
    first.kill()
    first.wait()
    assert (folder.path / LEASE_FILE).exists()
    with Lease(folder, print) as lease:
        assert lease.dead is not None
        assert lease.dead.pid == first.pid
    assert not (folder.path / LEASE_FILE).exists()


def test_a_process_with_the_number_of_a_dead_one_is_not_its_holder(folder: RunFolder) -> None:
    holder = replace(Holder.this_process(), started=1000.0)
    (folder.path / LEASE_FILE).write_text(json.dumps(asdict(holder)))
    with Lease(folder, print):
        pass


def test_the_lease_of_another_machine_is_taken_when_it_is_no_longer_renewed(folder: RunFolder) -> None:
    held_elsewhere(folder)
    told: list[str] = []
    started = time.monotonic()
    with Lease(folder, print, wait=told.append):
        assert time.monotonic() - started >= 2.0
    assert told == ["waiting for up to 2 s: a run on another may still write to this run folder"]


def test_a_run_on_another_machine_that_renews_its_lease_keeps_it(folder: RunFolder) -> None:
    renew = held_elsewhere(folder)
    timer = threading.Timer(0.5, renew, [2])
    timer.start()
    with pytest.raises(UserError, match="on another"), Lease(folder, print):
        pass
    timer.join()


def test_a_run_whose_lease_was_taken_hears_of_it_and_leaves_it(folder: RunFolder) -> None:
    lost: list[LeaseLost] = []
    with Lease(folder, lost.append):
        held_elsewhere(folder)
        deadline = time.monotonic() + 10
        while not lost and time.monotonic() < deadline:
            time.sleep(0.02)
    assert "a run on another took over" in str(lost[0])
    assert (folder.path / LEASE_FILE).exists()


def test_a_lease_is_renewed(folder: RunFolder) -> None:
    with Lease(folder, print):
        time.sleep(0.5)
        assert json.loads((folder.path / LEASE_FILE).read_text())["renewals"] > 2


@pytest.mark.parametrize("text", ["", "{", "[]", '{"id": 1}'])
def test_a_damaged_lease_is_none(folder: RunFolder, text: str) -> None:
    (folder.path / LEASE_FILE).write_text(text)
    with Lease(folder, print):
        pass
