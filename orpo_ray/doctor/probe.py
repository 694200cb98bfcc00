"""What runs on each node. It is sent to the nodes by value, so it needs nothing there but Python and Ray.

Only the standard library is imported at the top, as a node may lack everything else.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

PACKAGES = ("ray", "torch", "transformers", "peft", "deepspeed", "numpy", "pyarrow")
SHARED_MEMORY = "/dev/shm"
ANY_ADDRESS = ("0.0.0.0", "::")


class NodeProbe:
    """Looks at its node. An actor of this class runs on each one."""

    def facts(self, gcs_port: int) -> dict[str, Any]:
        """Return versions, GPUs, memory, addresses and surroundings of this node, as plain values.

        Args:
            gcs_port: port of the cluster, by which its autoscaler is known from those of other clusters.
        """
        total, _, free = shutil.disk_usage(SHARED_MEMORY) if os.path.isdir(SHARED_MEMORY) else (0, 0, 0)
        return {
            "host": socket.gethostname(),
            "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
            "orpo_ray": _own_version(),
            "gpus": _gpus(),
            "torch_cuda": _torch_cuda(),
            "shared_memory": total,
            "shared_memory_free": free,
            "listening": _listening(),
            "autoscaler": _autoscaler(gcs_port),
            "kubernetes": "KUBERNETES_SERVICE_HOST" in os.environ,
        }

    def clock(self) -> float:
        """Return the time here."""
        return time.time()

    def write(self, uri: str, name: str, text: str) -> str | None:
        """Write a small file into a folder, which is made if it does not exist. Return what went wrong."""
        try:
            filesystem, folder = _locate(uri)
            if filesystem is None:
                Path(folder).mkdir(parents=True, exist_ok=True)
                Path(folder, name).write_text(text)
                return None
            filesystem.create_dir(folder, recursive=True)
            with filesystem.open_output_stream(f"{folder}/{name}") as file:
                file.write(text.encode())
        except (OSError, ImportError) as error:
            return " ".join(str(error).split())[:200]
        return None

    def read(self, uri: str, names: list[str]) -> dict[str, str]:
        """Return the text of each of the files that can be read here."""
        found = {}
        for name in names:
            with contextlib.suppress(OSError, ImportError):
                filesystem, folder = _locate(uri)
                if filesystem is None:
                    found[name] = Path(folder, name).read_text()
                else:
                    with filesystem.open_input_stream(f"{folder}/{name}") as file:
                        found[name] = file.read().decode()
        return found

    def remove(self, uri: str, folders: list[str]) -> None:
        """Remove what was written to a folder, and those of these folders that are empty then."""
        with contextlib.suppress(OSError, ImportError):
            filesystem, folder = _locate(uri)
            if filesystem is not None:
                filesystem.delete_dir(folder)
                return
            shutil.rmtree(folder, ignore_errors=True)
            for each in folders:
                os.rmdir(each)

    def free_bytes(self, path: str) -> int | None:
        """Return the free bytes of the disk that holds a path, or would hold it."""
        for folder in (Path(path), *Path(path).parents):
            with contextlib.suppress(OSError):
                return shutil.disk_usage(folder).free
        return None

    def free_port(self) -> int:
        """Return a port that is free now."""
        with socket.socket() as free:
            free.bind(("", 0))
            port: int = free.getsockname()[1]
            return port

    def import_torch(self) -> None:
        """Import what `meet` needs, which may take minutes."""
        importlib.import_module("torch.distributed")

    def meet(self, backend: str, address: str, port: int, rank: int, size: int, seconds: float) -> str | None:
        """Add up one number with other nodes over `gloo`, or over `nccl` with a GPU. Return what went wrong."""
        import torch
        import torch.distributed as dist

        with contextlib.suppress(ImportError):  # a node without the package, which another check names
            from orpo_ray.ray_cluster.network import connect_by_address_of_node

            connect_by_address_of_node()
        limit = datetime.timedelta(seconds=seconds)
        try:
            dist.init_process_group(backend, f"tcp://{address}:{port}", timeout=limit, world_size=size, rank=rank)
            total = torch.ones(1, device="cuda" if backend == "nccl" else "cpu")
            dist.all_reduce(total)
        except (RuntimeError, ValueError, OSError) as error:
            return " ".join(str(error).split())[:200]
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
        return None if int(total.item()) == size else f"the sum over {size} nodes was {total.item()}"


def _version(name: str) -> str | None:
    """Return the version of an installed package, without importing it."""
    try:
        return importlib.metadata.version(name) if importlib.util.find_spec(name) is not None else None
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return None


def _own_version() -> str | None:
    """Return the version of orpo-ray that a worker on this node would import."""
    spec = importlib.util.find_spec("orpo_ray")
    if spec is None or spec.origin is None:  # nowhere, or a folder of that name without the package
        return None
    return str(getattr(importlib.import_module("orpo_ray"), "__version__", "unknown"))


def _gpus() -> list[dict[str, str]] | None:
    """Return name, driver and memory of each GPU, or None if nvidia-smi does not run."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    keys = ("name", "driver", "memory")
    return [dict(zip(keys, line.split(", "), strict=False)) for line in done.stdout.splitlines()]


def _torch_cuda() -> str | None:
    """Return the CUDA version that torch is built for, without importing it; None without CUDA or without torch."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    with contextlib.suppress(OSError):
        text = Path(spec.origin).with_name("version.py").read_text()
        found = re.search(r"^cuda\b.*=\s*['\"]([\d.]+)['\"]", text, re.MULTILINE)
        return found[1] if found else None
    return None


def _autoscaler(gcs_port: int) -> str | None:
    """Return the path of the configuration by which Ray's monitor here starts nodes for the cluster of a port.

    Every head has a monitor: "" if it starts no nodes, and None if there is no monitor here.
    """
    for each in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            command = each.read_bytes().decode(errors="replace").split("\0")
            if not any(word.endswith("/monitor.py") and "/ray/autoscaler/" in word for word in command[:4]):
                continue
            options = dict(word.split("=", 1) for word in command if word.startswith("--") and "=" in word)
            if options.get("--gcs-address", "").endswith(f":{gcs_port}"):
                return options.get("--autoscaling-config", "")
    return None


def _listening() -> dict[int, list[str]]:
    """Return port -> addresses that something on this node listens on, from Linux's tables."""
    found: dict[int, set[str]] = {}
    for table, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        with contextlib.suppress(OSError):
            for line in Path("/proc/net", table).read_text().splitlines()[1:]:
                local, state = line.split()[1], line.split()[3]
                if state == "0A":
                    address, port = local.split(":")
                    found.setdefault(int(port, 16), set()).add(_address(address, family))
    return {port: sorted(addresses) for port, addresses in found.items()}


def _address(text: str, family: socket.AddressFamily) -> str:
    """Return the address that Linux writes as words of 32 bits, each with its bytes in the order of the machine."""
    words = bytes.fromhex(text)
    packed = b"".join(words[start : start + 4][::-1] for start in range(0, len(words), 4))
    return socket.inet_ntop(family, packed).removeprefix("::ffff:")


def _locate(uri: str) -> tuple[Any, str]:
    """Return the filesystem of a URI and the path on it; no filesystem for a local path."""
    if "://" not in uri:
        return None, uri
    from orpo_ray.storage.files import locate

    return locate(uri)
