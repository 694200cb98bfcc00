"""The workers of a run become one torch.distributed process group.

Ray Train's TorchTrainer does this before the training function starts, for which the driver, the controller and the
workers import torch one after the other. Here a worker does it itself, when its data is being read already.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import ray
import ray.train
from ray.train.backend import Backend, BackendConfig
from ray.train.collective import broadcast_from_rank_zero

from orpo_ray.ray_cluster.network import connect_by_address_of_node

if TYPE_CHECKING:
    import torch


@dataclass
class SharedDevices(BackendConfig):
    """Ray Train's configuration of workers that form a process group by themselves."""

    @property
    def backend_cls(self) -> type[Backend]:
        """Answers Ray Train's questions about the workers' devices."""
        return _SharedDevicesBackend


class _SharedDevicesBackend(Backend):
    # A worker sees the GPUs of all workers of its node, so that its local rank is the index of its own.
    share_cuda_visible_devices = True


def join_process_group(timeout_s: float) -> None:
    """Join the process group of all workers: NCCL between GPUs, gloo between CPUs. A collective.

    Args:
        timeout_s: how long a collective waits for a worker that lags behind.
    """
    import ray.train.torch

    context = ray.train.get_context()
    rank, num_workers = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    # Bound to one address, where torch itself would listen on every interface of the machine.
    listener = listen() if rank == 0 else None
    found: Any = listener.getsockname()[:2] if listener is not None else None
    address, port = broadcast_from_rank_zero(found) if num_workers > 1 else found
    os.environ |= {
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "WORLD_SIZE": str(num_workers),
        "LOCAL_RANK": str(context.get_local_rank()),
        "LOCAL_WORLD_SIZE": str(context.get_local_world_size()),
        "NODE_RANK": str(context.get_node_rank()),
        "ACCELERATE_TORCH_DEVICE": str(device),
    }
    form_process_group(device, rank, num_workers, (address, port), listener, timeout_s)


def form_process_group(
    device: torch.device,
    rank: int,
    num_workers: int,
    meeting: tuple[str, int],
    listener: socket.socket | None,
    timeout_s: float,
) -> None:
    """Form a process group of workers that agree about where to meet. A collective.

    Args:
        device: of this worker.
        rank: of this worker.
        num_workers: how many there are.
        meeting: address and port of rank 0.
        listener: what `listen` returned on rank 0, with that address and port; None on all others.
        timeout_s: how long a collective waits for a worker that lags behind.
    """
    import torch
    from torch._C._distributed_c10d import TCPStore

    address, port = meeting
    if device.type == "cuda":
        torch.cuda.set_device(device)
    connect_by_address_of_node()
    backend = "nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=timeout_s)
    store = TCPStore(
        address, port, num_workers, rank == 0, timeout,
        master_listen_fd=listener.detach() if listener is not None else None,
    )  # fmt: skip
    torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=num_workers, timeout=timeout)


def leave_process_group() -> None:
    """Leave the group at the end of a run; after an error Ray Train ends the processes instead."""
    import torch

    torch.distributed.destroy_process_group()


def listen() -> socket.socket:
    """Listen on a free port of this node's address, and on no other one."""
    address = ray.util.get_node_ip_address()
    return socket.create_server((address, 0), family=socket.AF_INET6 if ":" in address else socket.AF_INET)
