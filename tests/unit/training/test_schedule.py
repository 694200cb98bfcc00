"""The learning-rate schedules are transformers', to the bit."""

from __future__ import annotations

import pytest
import torch
from transformers import get_scheduler

from orpo_ray.config.schema import OptimConfig
from orpo_ray.training.optimizer import schedule

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
