"""What workers exchange in a step of the training program."""

from __future__ import annotations

from collections import Counter as Counts
from pathlib import Path

import torch

from support.counting import Counter
from support.engines_by_hand import two_pairs
from support.tiny_runs import tiny_recipe
from support.worker_alone import make_step, make_worker
from support.worker_group import worker_group


def collectives_of_a_step(rank: int, num_workers: int, storage: str) -> dict[str, int]:
    """Collectives of the second step by name; the first one finds out about tensors that are not there yet."""
    worker = make_worker(tiny_recipe(Path(storage), "run"), torch.device("cpu"), rank, num_workers)
    make_step(worker, two_pairs(), 0)
    with Counter() as counter:
        make_step(worker, two_pairs(), 1)
    return dict(Counts(call.name for call in counter.collectives))


def test_a_step_has_one_collective_beside_those_of_the_gradient(tmp_path: Path) -> None:
    """Metrics, figures of each worker, the gradient's norm and requests travel together."""
    for found in worker_group(2).run(collectives_of_a_step, str(tmp_path)):
        assert found.pop("allgather_") == 1
        assert found.keys() == {"allreduce_"}
