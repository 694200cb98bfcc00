"""Sums over micro-batches and workers, and what each worker has, on all of them.

All functions but `add_sums` are collectives, also in a process without a process group, which is one worker.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from orpo_ray.data.transfer import to_device

K = TypeVar("K")


def gather_rows(values: Sequence[float], device: torch.device) -> torch.Tensor:
    """Collect one row of numbers from every worker: float64 [num_workers, n] on the CPU."""
    return _gather(torch.tensor(values, dtype=torch.float64), device)


def _gather(mine: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The same for a row [n] that is a tensor, on any device. The host waits once, where a device is involved."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return mine.cpu().unsqueeze(0)
    mine = to_device(mine, device)
    rows = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, mine)
    return torch.stack(rows).cpu()


def gather_objects(mine: Any) -> list[Any]:
    """Collect a picklable object from every worker, on all of them."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [mine]
    everyones: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, mine)
    return everyones


def add_sums(total: Mapping[str, torch.Tensor], more: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Add an objective's sums of another micro-batch, in float64. An empty `total` starts at zero."""
    return {name: total.get(name, 0.0) + value.double() for name, value in more.items()}


def reduce_sums(sums: Mapping[K, torch.Tensor], device: torch.device, counts: bool = True) -> dict[K, float]:
    """Add up an objective's sums over all workers. All of them ran equally many micro-batches, so have equal names.

    Args:
        sums: of this worker.
        device: where they are.
        counts: whether this worker's sums count (`StepPlanner.counts`).
    """
    if not sums:
        return {}
    total = _gather(_counted(sums, counts), device).sum(0)
    return dict(zip(sums, total.tolist(), strict=True))


def gather_step(
    sums: Mapping[str, torch.Tensor],
    own: Mapping[str, float],
    device: torch.device,
    counts: bool = True,
    measured: Mapping[str, torch.Tensor] = MappingProxyType({}),
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Add up an objective's sums over all workers, and collect every worker's own figures, in one all-gather.

    Args:
        sums: of this worker, as in `reduce_sums`; not empty.
        own: figures of this worker, with the same names on all workers.
        device: of the sums.
        counts: whether this worker's sums count (`StepPlanner.counts`). Its figures do in any case.
        measured: more figures, which are numbers on the device. They are read together with the rest.

    Returns:
        The totals, and for each figure the numbers of all workers by rank.
    """
    figures = to_device(torch.tensor(list(own.values()), dtype=torch.float64), device)
    on_device = [value.double().reshape(1) for value in measured.values()]
    rows = _gather(torch.cat([_counted(sums, counts), figures, *on_device]), device)
    totals = dict(zip(sums, rows[:, : len(sums)].sum(0).tolist(), strict=True))
    return totals, dict(zip([*own, *measured], rows[:, len(sums) :].T.tolist(), strict=True))


def _counted(sums: Mapping[Any, torch.Tensor], counts: bool) -> torch.Tensor:
    own = torch.stack([value.double() for value in sums.values()])
    return own if counts else torch.zeros_like(own)
