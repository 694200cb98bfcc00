"""Processes that a fork server makes are what a new Python would be, and end when they should."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.runs import wait_until

CONTROL = """
import sys
from orpo_ray.fork_server import control
control._MODULES = ("xml.dom.pulldom",)  # what every run needs takes ten seconds
control.start_fork_server()
print(control._python, flush=True)
sys.stdin.read()
"""
# Replaces Ray's program of that name.
WORKER = """
import json, os, random, signal, sys, time
import numpy
if "--sleep" in sys.argv:
    print(os.getpid(), flush=True)
    time.sleep(600)
print(json.dumps({
    "argv": sys.argv, "name": __name__, "folder": os.getcwd(), "pid": os.getpid(), "group": os.getpgrp(),
    "parent": os.getppid(),
    "environment": dict(os.environ), "random": [random.random(), numpy.random.rand()], "path": sys.path[0],
    "forked": "xml.dom.pulldom" in sys.modules, "torch": sys.modules["torch"].get_num_threads() if "torch" in sys.modules else 0,
    "blocked": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])), "files": len(os.listdir("/proc/self/fd")),
}))
print("an error", file=sys.stderr)
sys.exit(7)
"""  # noqa: E501


class Driver:
    """A process with a fork server."""

    def __init__(self, folder: Path) -> None:
        self.worker = folder / "default_worker.py"
        self.worker.write_text(WORKER)
        self.process = subprocess.Popen(
            [sys.executable, "-c", CONTROL], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        self.python = Path(self.process.stdout.readline().strip())

    def start(self, *arguments: str, language: str = "PYTHON", context: Any = None, **options: Any) -> Any:
        """Start what Ray starts for a worker."""
        setup = "/ray/setup_worker.py"  # does not exist, so that only a fork can run the worker
        command = [str(self.python), setup, str(self.worker), *arguments, f"--language={language}"]
        command.append(f"--serialized-runtime-env-context={json.dumps(context or {})}")
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, **pipes, **options)

    def run(self, *arguments: str, **options: Any) -> dict[str, Any]:
        started = self.start(*arguments, **options)
        out, err = started.communicate(timeout=60)
        assert (started.returncode, err) == (7, "an error\n")
        found: dict[str, Any] = json.loads(out)
        return found


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Driver]:
    driver = Driver(tmp_path_factory.mktemp("fork-server"))
    yield driver
    driver.process.communicate()


def test_a_fork_is_what_a_new_python_would_be(driver: Driver, tmp_path: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "3", "ONE": "1", "PWD": str(tmp_path)}
    context = {"env_vars": {"TWO": "2"}, "py_executable": sys.executable}
    found = driver.run("--a=b", env=environment, context=context, cwd=tmp_path)
    assert found["forked"]
    assert found["argv"] == [str(driver.worker), "--a=b"]
    assert (found["name"], found["path"], found["folder"]) == ("__main__", str(driver.worker.parent), str(tmp_path))
    # Ray's own import adds some.
    assert found["environment"].items() >= (environment | {"TWO": "2"}).items()
    assert found["group"] == found["pid"]
    assert found["torch"] == 3
    assert found["blocked"] == [signal.SIGINT]
    assert found["files"] < 8
    assert found["random"] != driver.run()["random"]


def test_each_job_has_forks_of_its_own_process(driver: Driver) -> None:
    jobs = [{}, {"RAY_JOB_ID": "02000000"}] * 2
    found = [driver.run(env=os.environ | job) for job in jobs]
    assert all(each["forked"] for each in found)
    parents = [each["parent"] for each in found]
    assert parents[0] != parents[1]
    assert parents[:2] == parents[2:]
    assert all(each["environment"].items() >= job.items() for each, job in zip(found, jobs, strict=True))


def test_the_process_of_a_job_is_replaced_and_takes_requests_while_it_imports(driver: Driver) -> None:
    parent = driver.run()["parent"]
    os.kill(parent, signal.SIGKILL)
    wait_until(lambda: not Path(f"/proc/{parent}").exists(), "its end")
    started = [driver.start() for _ in range(3)]  # the first of them lets Ray be imported
    found = [json.loads(each.communicate(timeout=60)[0]) for each in started]
    assert [each.returncode for each in started] == [7, 7, 7]
    assert len({each["parent"] for each in found}) == 1
    assert found[0]["parent"] != parent
    assert all(each["forked"] for each in found)


@pytest.mark.parametrize(
    "options",
    [
        {"language": "JAVA"},
        {"context": {"py_executable": "/other/python"}},
        {"context": {"command_prefix": ["nice"]}},
        {"env": os.environ | {"PYTHONPATH": "/elsewhere"}},
        {"context": {"env_vars": {"HF_HOME": "/elsewhere"}}},
    ],
    ids=["language", "python", "prefix", "path", "library"],
)
def test_what_a_fork_is_not_good_for_becomes_an_ordinary_python(driver: Driver, options: dict[str, Any]) -> None:
    started = driver.start(**options)
    assert "can't open file '/ray/setup_worker.py'" in started.communicate(timeout=60)[1]


def test_other_programs_are_run_by_an_ordinary_python(driver: Driver) -> None:
    command = [str(driver.python), "-c", "import sys; print(sys.executable, 'xml.dom.pulldom' in sys.modules)"]
    assert subprocess.check_output(command, text=True).split() == [sys.executable, "False"]


def test_a_killed_launcher_ends_its_process(driver: Driver) -> None:
    launcher = driver.start("--sleep")
    pid = int(launcher.stdout.readline())
    assert pid != launcher.pid
    launcher.kill()
    launcher.wait()
    wait_until(lambda: not Path(f"/proc/{pid}").exists(), "the end of the process")


def test_a_killed_process_is_told_to_its_launcher(driver: Driver) -> None:
    launcher = driver.start("--sleep")
    os.kill(int(launcher.stdout.readline()), signal.SIGKILL)
    assert launcher.wait(60) == 128 + signal.SIGKILL


def test_a_process_that_ray_has_forgotten_ends_with_its_driver(tmp_path: Path) -> None:
    driver = Driver(tmp_path)
    launcher = driver.start("--sleep")
    pid = int(launcher.stdout.readline())
    os.kill(launcher.pid, signal.SIGSTOP)  # an end of the launcher would end the process too
    driver.process.kill()
    driver.process.wait()
    wait_until(lambda: not Path(f"/proc/{pid}").exists(), "the end of the process")
    launcher.kill()
    launcher.wait()


def test_the_server_ends_with_its_driver_and_launchers_go_on_without_a_server(tmp_path: Path) -> None:
    driver = Driver(tmp_path)
    server = Path(f"/proc/{driver.process.pid}/task/{driver.process.pid}/children").read_text().split()
    assert driver.python.parent.stat().st_mode & 0o777 == 0o700
    command = driver.python.read_text().split("exec ")[1].replace("$@", "/no/setup_worker.py")
    driver.process.kill()
    driver.process.wait()
    wait_until(lambda: not driver.python.parent.exists(), "the end of the server's folder")
    wait_until(lambda: not Path(f"/proc/{server[0]}").exists(), "the end of the server")
    orphan = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert "can't open file '/no/setup_worker.py'" in orphan.stderr


def test_a_driver_that_ends_at_once_does_not_wait_for_the_imports(tmp_path: Path) -> None:
    (tmp_path / "slow_to_import.py").write_text("import time; time.sleep(600)")
    code = CONTROL.replace("xml.dom.pulldom", "slow_to_import").replace("sys.stdin.read()", "")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True, timeout=60
    )
    assert not Path(done.stdout.strip()).parent.exists()


DRAWS_IDENTIFIERS = """
import os, threading
from orpo_ray.fork_server.preload import preload_ray

preload_ray()
from ray import ObjectRef

def draw():
    print(ObjectRef.from_random().hex(), flush=True)

for _ in range(2):
    if os.fork() == 0:
        draw()
        thread = threading.Thread(target=draw)
        thread.start()
        thread.join()
        os._exit(0)
    os.wait()
"""


def test_forks_draw_different_identifiers() -> None:
    done = subprocess.run([sys.executable, "-c", DRAWS_IDENTIFIERS], capture_output=True, text=True, check=True)
    drawn = done.stdout.split()
    assert len(drawn) == 4
    assert len(set(drawn)) == 4
