"""How long each worker takes for its part of a step, and which worker holds up the others."""

from __future__ import annotations

import contextlib
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from statistics import median

import psutil
import torch

SLOW_FACTOR = 1.5
"""A worker is slow in a step that takes it over this many times as long as the others' median, also for each token."""
WINDOW_STEPS = 20
SLOW_STEPS = 15
"""A worker is named once it was slow in this many of the last WINDOW_STEPS steps."""


class OwnTime:
    """Measures what a worker does by itself, apart from waits for others: on a GPU by events, without a wait for it.

    Args:
        device: what the work runs on.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._seconds = 0.0

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Measure the work in this context."""
        if self._on_gpu:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            yield
            end.record()
            self._events.append((start, end))
        else:
            started = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - started

    def seconds(self) -> float:
        """Return the seconds so far. A GPU should be done with the work, or this waits for it."""
        for _, end in self._events[-1:]:
            end.synchronize()
        return self._seconds + sum(start.elapsed_time(end) / 1000 for start, end in self._events)


def memory_gb(device: torch.device) -> float:
    """Return the most memory that this process has allocated on its GPU, or has now on a CPU, in units of 1e9 bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return float(psutil.Process().memory_info().rss) / 1e9


class SlowWorkers:
    """Finds workers that are slower than the others for long.

    Args:
        hosts: the machine of every worker, by rank.
    """

    def __init__(self, hosts: Sequence[str]) -> None:
        self._hosts = hosts
        self._recent: deque[list[int]] = deque(maxlen=WINDOW_STEPS)
        self._slow_steps: Counter[int] = Counter()
        self._named: set[int] = set()

    def observe(self, step: int, seconds: Sequence[float], tokens: Sequence[float]) -> list[str]:
        """Judge a step by what every worker did by itself in it.

        Args:
            step: number of the step, from 1.
            seconds: of every worker.
            tokens: of every worker. A worker that has more than the others is not slow for that.

        Returns:
            A warning about every worker that is now found to be slow.
        """
        if len(seconds) < 2:
            return []
        by_token = [own / max(1.0, count) for own, count in zip(seconds, tokens, strict=True)]
        slow = [
            rank for rank in range(len(seconds)) if min(_ratio(seconds, rank), _ratio(by_token, rank)) > SLOW_FACTOR
        ]
        self._recent.append(slow)
        self._slow_steps.update(slow)
        found = [
            rank
            for rank in slow
            if rank not in self._named and sum(rank in each for each in self._recent) >= SLOW_STEPS
        ]
        self._named.update(found)
        return [
            f"worker {rank} on {self._hosts[rank]} is slower than the others, which wait for it: step {step:,} took it "
            f"{seconds[rank]:.3g} s, {_ratio(seconds, rank):.1f} times as long as them"
            for rank in found
        ]

    def figures(self) -> dict[str, float]:
        """Return the rank that was slow in most steps, and in how many, as metrics; nothing while none is slow."""
        if not self._named:
            return {}
        rank = max(self._named, key=self._slow_steps.__getitem__)
        return {"slow_worker": rank, "slow_worker_steps": self._slow_steps[rank]}


def by_worker(figures: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Return every worker's own figures as metrics `worker_<figure>/<rank>`."""
    return {f"worker_{name}/{rank}": own for name, all_own in figures.items() for rank, own in enumerate(all_own)}


def _ratio(values: Sequence[float], rank: int) -> float:
    """Return how many times the median of all others a worker's value is."""
    others = median(value for other, value in enumerate(values) if other != rank)
    return values[rank] / others if others > 0 else 1.0
