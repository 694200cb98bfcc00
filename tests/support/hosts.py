"""Hosts with addresses of their own: network namespaces of this machine, with links that can be cut.

A bridge connects them with each other and with this process. Addresses are those that RFC 2544 reserves for such tests.
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from support.clusters import NODE, has_role
from support.runs import wait_until

NETWORK = "198.18.77"
HERE = f"{NETWORK}.254"
GCS_PORT = 6379
STARTED = 120  # seconds for a raylet


class Host:
    """A host in a network namespace.

    Attributes:
        address: its IP address.
    """

    def __init__(self, number: int, bridge: str) -> None:
        self.address = f"{NETWORK}.{number}"
        self.namespace = f"{bridge}-{number}"
        self.link = f"{bridge}v{number}"

    def command(self, *command: str) -> list[str]:
        """Return what runs a command on this host."""
        return ["ip", "netns", "exec", self.namespace, *command]

    def cut(self) -> None:
        """Cut its link, as a pulled cable does: no connection is closed, and no packet arrives."""
        _ip("link", "set", self.link, "down")

    def connect(self) -> None:
        """Connect it again."""
        _ip("link", "set", self.link, "up")

    def processes(self) -> list[psutil.Process]:
        """Return the processes that run on it."""
        pids = _ip("netns", "pids", self.namespace).split()
        found = []
        for pid in pids:
            with suppress(psutil.Error):
                found.append(psutil.Process(int(pid)))
        return found

    def has(self, role: str) -> bool:
        """Say whether an actor of this role runs on it, such as `RayTrainWorker`."""
        for process in self.processes():
            with suppress(psutil.Error):
                if has_role(process, role):
                    return True
        return False


@contextmanager
def hosts(count: int) -> Iterator[list[Host]]:
    """Make hosts that reach each other, and this process at `HERE`. Skips where namespaces cannot be made."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("needs root and the program ip: apt-get install iproute2")
    bridge = f"orpo{os.getpid()}"  # names of links have 15 characters at most
    with ExitStack() as ended:
        try:
            _ip("link", "add", bridge, "type", "bridge")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces on this machine: {error.stderr.strip()}")
        ended.callback(_ip, "link", "delete", bridge)
        _ip("address", "add", f"{HERE}/24", "dev", bridge)
        _ip("link", "set", bridge, "up")
        made = [Host(number, bridge) for number in range(1, count + 1)]
        for host in made:
            _ip("netns", "add", host.namespace)
            ended.callback(_ip, "netns", "delete", host.namespace)
            ended.callback(_end, host)
            _ip("link", "add", host.link, "type", "veth", "peer", "name", "eth0", "netns", host.namespace)
            _ip("link", "set", host.link, "master", bridge, "up")
            _ip("-n", host.namespace, "address", "add", f"{host.address}/24", "dev", "eth0")
            for link in ("lo", "eth0"):
                _ip("-n", host.namespace, "link", "set", link, "up")
        yield made


@contextmanager
def ray_on(all_hosts: list[Host]) -> Iterator[dict[str, str]]:
    """Start a Ray with its head on the first host, and a node on each other one.

    Yields:
        The environment of commands that join it.
    """
    own = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    own |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    head = all_hosts[0]
    # Short, since the paths of Ray's sockets are limited; one for each host, as hosts have disks of their own.
    with tempfile.TemporaryDirectory(prefix="o-", ignore_cleanup_errors=True) as folder:
        for number, host in enumerate(all_hosts):
            where = (
                ["--head", f"--port={GCS_PORT}", "--include-dashboard=false", f"--temp-dir={folder}/{number}"]
                if host is head
                else [f"--address={head.address}:{GCS_PORT}", f"--temp-dir={folder}/{number}"]
            )
            cpus = 1 if host is head else NODE["num_cpus"]
            start = host.command(
                str(Path(sys.executable).with_name("ray")), "start", "--block", *where, f"--num-cpus={cpus}",
                f"--node-ip-address={host.address}", f"--object-store-memory={NODE['object_store_memory']}",
            )  # fmt: skip
            _wait_for_node(start, own, Path(folder) / f"{number}.out")
        yield own | {"RAY_ADDRESS": f"{head.address}:{GCS_PORT}"}
        for host in all_hosts:
            _end(host)


def _wait_for_node(start: list[str], environment: dict[str, str], said: Path) -> None:
    """Start a Ray node, and wait until it runs."""
    with said.open("w") as out:
        process = subprocess.Popen(start, env=environment, stdout=out, stderr=out)
    wait_until(lambda: "Ray runtime started" in said.read_text() or process.poll() is not None, said.stem, STARTED)
    assert process.poll() is None, said.read_text()


def _end(host: Host) -> None:
    """End all processes of a host."""
    family = host.processes()
    for process in family:
        with suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(family, timeout=20)


def _ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout
