"""How often a training step reads from the device: the gradient's norm, and what is logged, in one piece."""

from __future__ import annotations

import torch

from orpo_ray.objective.collectives import gather_rows, reduce_sums
from support.device_waits import META
from support.gpu_training import Training, counted_syncs, recipe_on

CPU = torch.device("cpu")


def test_a_step_reads_the_norm_and_nothing_else() -> None:
    """Without sharding. On a CPU, reads of a number stand for waits."""
    training = Training(recipe_on(CPU), CPU)
    training.step()
    with counted_syncs(CPU) as found:
        training.step()
    assert found == ["_local_scalar_dense"]


def test_sums_are_read_at_once() -> None:
    sums = {"pairs": torch.tensor(2.0), "loss": torch.tensor(0.25, dtype=torch.float64), "nll": torch.tensor(3.0)}
    with counted_syncs(CPU) as found:
        assert reduce_sums(sums, CPU) == {"pairs": 2.0, "loss": 0.25, "nll": 3.0}
    assert found == []


def test_one_worker_gathers_numbers_without_the_device() -> None:
    """Nothing could be read back from `meta`."""
    assert gather_rows([1.0, 2.0], META).tolist() == [[1.0, 2.0]]
