"""A real Slurm on this machine: a controller, and a daemon for each of some nodes with names of their own."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil
import pytest

from orpo_ray.ray_cluster.new_ray import unused_ports
from support.runs import wait_until

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scancel", "squeue", "sinfo")
CPUS = 3  # of each node, more than a machine may have
# As clusters bind tasks to the CPUs of their step. Slurm does not bind where a node claims more CPUs than there are.
BOUND = "TaskPlugin=task/affinity\nTaskPluginParam=autobind=threads"
KILL_WAIT = 30  # seconds from SIGTERM to SIGKILL of a cancelled job
ADMINISTRATORS = "/usr/sbin:/sbin"
CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
SlurmUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
{tasks}
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
MpiDefault=none
KillWait={kill_wait}
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class Slurm:
    """Commands of a Slurm."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = os.environ | {
            "SLURM_CONF": str(folder / "slurm.conf"), "PATH": f"{os.environ['PATH']}:{ADMINISTRATORS}"
        }  # fmt: skip

    def run(self, *command: str, cwd: Path | None = None, **variables: str) -> str:
        """Run a command; return what it printed."""
        done = subprocess.run(
            command, env=self.environment | variables, cwd=cwd, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
        return done.stdout.strip()

    def state(self, job: str) -> str:
        """Return the state of a job, such as RUNNING, which Slurm knows for five minutes after its end."""
        return self.run("squeue", "--noheader", "--states=all", "--format=%T", f"--jobs={job}")

    def wait_for_end(self, job: str, seconds: float) -> str:
        """Wait for the end of a job; return its state."""
        wait_until(lambda: self.state(job) not in ("PENDING", "RUNNING", "COMPLETING"), f"the end of {job}", seconds)
        return self.state(job)


@contextmanager
def slurm(nodes: list[str], cpus: int = CPUS, tasks: str = "TaskPlugin=task/none") -> Iterator[Slurm]:
    """Start a Slurm with these nodes, and end it. Skips where Slurm is not installed, or its daemons may not run.

    Args:
        nodes: their names.
        cpus: CPUs of each node.
        tasks: how a step's tasks are bound to CPUs.
    """
    missing = [name for name in PROGRAMS if shutil.which(name, path=f"{os.environ['PATH']}:{ADMINISTRATORS}") is None]
    if missing or os.geteuid() != 0:
        pytest.skip(f"needs Slurm and root: apt-get install slurm-wlm (not found: {', '.join(missing) or 'root'})")
    with tempfile.TemporaryDirectory(prefix="slurm-", ignore_cleanup_errors=True) as name, ExitStack() as ended:
        folder = Path(name)
        ports = unused_ports(1 + len(nodes))
        lines = [
            f"NodeName={node} NodeHostname={socket.gethostname()} NodeAddr=127.0.0.1 Port={port} CPUs={cpus}"
            for node, port in zip(nodes, ports[1:], strict=True)
        ]
        conf = CONF.format(
            host=socket.gethostname(), port=ports[0], folder=folder, kill_wait=KILL_WAIT, nodes="\n".join(lines),
            tasks=tasks,
        )  # fmt: skip
        (folder / "slurm.conf").write_text(conf)
        (folder / "state").mkdir()
        (folder / "munge.key").write_bytes(secrets.token_bytes(128))
        (folder / "munge.key").chmod(0o600)
        found = Slurm(folder)
        files = {f"--{kind}-file": folder / f"munge.{kind}" for kind in ("key", "pid", "log", "seed")}
        munge = ["--foreground", "--force", f"--socket={folder}/munge.socket"]
        _start(ended, found, "munged", *munge, *(f"{option}={path}" for option, path in files.items()))
        wait_until((folder / "munge.socket").exists, "munged")
        _start(ended, found, "slurmctld", "-D", "-i")
        for node in nodes:
            _start(ended, found, "slurmd", "-D", "-N", node)
        idle = ["sinfo", "--noheader", "--states=idle", "--format=%D"]
        try:
            wait_until(lambda: found.run(*idle) == str(len(nodes)), "the nodes", 60)
        except AssertionError:
            print(_logs(folder))
            raise
        try:
            yield found
        finally:
            found.run("scancel", "--state=RUNNING", "--state=PENDING", "--user=root")
            wait_until(lambda: not found.run("squeue", "--noheader"), "the end of all jobs", KILL_WAIT + 60)


def _start(ended: ExitStack, slurm: Slurm, program: str, *arguments: str) -> None:
    log = ended.enter_context((slurm.folder / f"{program}.out").open("a"))
    path = shutil.which(program, path=slurm.environment["PATH"])
    ended.callback(_end, psutil.Popen([str(path), *arguments], env=slurm.environment, stdout=log, stderr=log))


def _end(process: psutil.Popen) -> None:
    process.terminate()
    if psutil.wait_procs([process], timeout=10)[1]:
        process.kill()


def _logs(folder: Path) -> str:
    return "\n".join(f"{path.name}: {path.read_text()[-2000:]}" for path in folder.glob("*.out"))
