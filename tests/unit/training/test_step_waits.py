"""How often a training step reads from the device: once, the gradient's norm and what is logged in one piece."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from orpo_ray.objective.collectives import gather_rows, gather_step, reduce_sums
from support.device_waits import META, reads_of_values
from support.engines_by_hand import Training, recipe_of, two_pairs
from support.tiny_runs import tiny_recipe
from support.worker_alone import make_step, make_worker, plan_step, train_step

CPU = torch.device("cpu")


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    """A process group of this process."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_a_step_of_the_training_program_reads_once(tmp_path: Path) -> None:
    """Forward, backward, update, metrics and logging, after a first step, which also checks that images are used."""
    worker = make_worker(tiny_recipe(tmp_path, "run"), CPU)
    make_step(worker, two_pairs(), 0)
    plan = plan_step(worker, two_pairs(), 1)
    with reads_of_values() as found:
        metrics = train_step(worker, plan)
    assert len(found) == 1, found
    assert found[0].startswith("cpu ")
    assert metrics["grad_norm"] > 0


@pytest.mark.usefixtures("process_group")
def test_the_norm_that_is_read_with_the_sums_is_the_one_of_a_step() -> None:
    apart, whole = (Training(recipe_of(), 0, 1) for _ in range(2))
    for _ in range(3):
        for training in (apart, whole):
            plan = training.planner.plan(training.share)
            for batch in plan.batches:
                loss, sums = training.objective.loss(training.engine.forward(batch), batch.weights, plan.normaliser)
                training.engine.backward(loss)
        _, own = gather_step(sums, {}, CPU, measured={"norm": apart.engine.reduce_gradient()})
        apart.engine.update_weights(own["norm"][0])
        assert own["norm"] == [whole.engine.step()]
    states = [each.engine.consolidated_weights(trained_only=True) for each in (apart, whole)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_sums_are_read_at_once() -> None:
    sums = {"pairs": torch.tensor(2.0), "loss": torch.tensor(0.25, dtype=torch.float64), "nll": torch.tensor(3.0)}
    with reads_of_values() as found:
        assert reduce_sums(sums, CPU) == {"pairs": 2.0, "loss": 0.25, "nll": 3.0}
    assert len(found) == 1


@pytest.mark.parametrize(
    "read",
    [
        torch.Tensor.tolist,
        lambda tensor: tensor[tensor > 1],
        lambda tensor: tensor[0, tensor[0] > 1],
        lambda tensor: torch.equal(tensor, tensor),
        lambda tensor: torch.where(tensor > 1),
        lambda tensor: tensor.to("cpu"),
        lambda tensor: tensor.to(torch.float64).sum().cpu().unsqueeze(0).tolist(),
        lambda tensor: bool(tensor.cpu().sum() > 1),
    ],
)
def test_every_read_counts_once(read: Callable[[torch.Tensor], object]) -> None:
    """What was copied before is not read from the device again."""
    with reads_of_values() as found:
        read(torch.tensor([[1.0, 2.0]]))
    assert len(found) == 1, found


def test_a_tensor_whose_copy_was_read_still_counts() -> None:
    tensor = torch.tensor([[1.0, 2.0]])
    with reads_of_values() as found:
        tensor.cpu().tolist()
        tensor.tolist()
    assert len(found) == 2, found


def test_calls_that_read_nothing_do_not_count() -> None:
    tensor = torch.tensor([[1.0, 2.0]])
    with reads_of_values() as found:
        tensor[0, torch.tensor([1])].to(torch.float64)
        torch.where(tensor > 1, tensor, 0.0)
        tensor.to(CPU)
    assert found == []


def test_one_worker_gathers_numbers_without_the_device() -> None:
    """Nothing could be read back from `meta`."""
    assert gather_rows([1.0, 2.0], META).tolist() == [[1.0, 2.0]]
