"""The learning-rate schedules are transformers', to the bit."""

from __future__ import annotations

import pytest
import torch
from transformers import get_scheduler

from orpo_ray.config.schema import OptimConfig
from orpo_ray.training.optimizer import adamw, follow_recipe, schedule

NUM_STEPS = 23
NAMES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}


@pytest.mark.parametrize("warmup", [0, 0.1, 5, 23])
@pytest.mark.parametrize("name", NAMES)
def test_schedule_is_that_of_transformers(name: str, warmup: float) -> None:
    ours, theirs = (torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-4) for _ in range(2))
    mine = schedule(ours, OptimConfig(schedule=name, warmup=warmup), NUM_STEPS)
    steps = 3 if warmup == 0.1 else int(warmup)  # ceil(0.1 * 23)
    reference = get_scheduler(NAMES[name], theirs, num_warmup_steps=steps, num_training_steps=NUM_STEPS)
    rates = []
    for _ in range(NUM_STEPS + 2):
        assert ours.param_groups[0]["lr"] == theirs.param_groups[0]["lr"]
        rates.append(ours.param_groups[0]["lr"])
        for optimizer, each in ((ours, mine), (theirs, reference)):
            optimizer.step()
            each.step()
    assert max(rates) > 2.8e-4


def test_an_optimizer_follows_the_recipe_and_not_the_state_that_it_loads() -> None:
    """As in population-based training, where a run begins with a checkpoint of another one."""
    weights = [torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(2))]
    theirs = OptimConfig(learning_rate=1e-3, weight_decay=0.1, schedule="linear", warmup=0)
    ours = OptimConfig(learning_rate=3e-4, weight_decay=0.02, adam_beta2=0.9, schedule="linear", warmup=0)
    donor = adamw(weights, theirs)
    rates = schedule(donor, theirs, 10)
    for _ in range(4):
        for weight in weights:
            weight.grad = torch.ones_like(weight)
        donor.step()
        rates.step()
    for optim, peak, decay, beta in ((theirs, 1e-3, 0.1, 0.999), (ours, 3e-4, 0.02, 0.9)):
        optimizer = adamw(weights, optim)
        own = schedule(optimizer, optim, 10)
        optimizer.load_state_dict(donor.state_dict())
        own.load_state_dict(rates.state_dict())
        follow_recipe(optimizer, own, optim)
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.6 * peak] * 2)
        assert [group["weight_decay"] for group in optimizer.param_groups] == [decay, 0.0]
        assert {group["betas"][1] for group in optimizer.param_groups} == {beta}
        assert optimizer.state[weights[0]]["exp_avg"].abs().sum() > 0
        optimizer.step()
        own.step()
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.5 * peak)
