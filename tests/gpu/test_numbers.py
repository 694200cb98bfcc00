"""Loss and gradient in bfloat16 on the GPU, against float32 on the CPU; and how often a step makes the host wait."""

from __future__ import annotations

import os

import pytest
import torch

from orpo_ray.objective.base import Normaliser
from orpo_ray.objective.orpo import ORPO
from orpo_ray.objective.pair_model import PairModel
from support.gpu_training import ROW, Training, counted_syncs, recipe_on, row_on
from support.pairs_by_hand import run_as, tiny_pair_model

pytestmark = pytest.mark.gpu
# Waits of the host in a step that may remain: the norm of the gradient, and what is logged.
MOST_SYNCS = 2


def loss_and_norm(model: PairModel, family: str, device: torch.device) -> tuple[float, float]:
    run_as(model, "shared_prefix")
    batch = row_on(device, model, family)
    loss, _ = ORPO(0.1).loss(model(batch), batch.weights, Normaliser(float(len(ROW))))
    loss.backward()
    norms = [p.grad.float().norm() for p in model.parameters() if p.grad is not None]
    return float(loss), float(torch.stack(norms).norm())


@pytest.mark.parametrize("family", ["smolvlm", "llava_next", "qwen2_5_vl", "gemma3"])
def test_loss_and_gradient_norm_equal_those_of_float32(family: str, device: torch.device, dtype: torch.dtype) -> None:
    expected = loss_and_norm(tiny_pair_model(family), family, torch.device("cpu"))
    found = loss_and_norm(tiny_pair_model(family).to(device, dtype), family, device)
    assert found == pytest.approx(expected, rel=2e-2 if device.type == "cuda" else 1e-5)


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("stage", [0, 2])
def test_a_step_makes_the_host_wait_at_most_twice(stage: int, device: torch.device) -> None:
    """A step of forward, backward and optimizer, on a batch that is on the device, after a first one for the caches.

    Waits within DeepSpeed do not count: its stage 2 reads the norm more than once.
    """
    training = Training(recipe_on(device, deepspeed={"zero_stage": stage}), device)
    training.step()
    with counted_syncs(device) as found:
        training.step()
    training.close()
    if device.type == "cuda":
        assert len([where for where in found if f"{os.sep}deepspeed{os.sep}" not in where]) <= MOST_SYNCS, found
    else:
        assert found  # at least the norm is read; DeepSpeed reads more on a CPU
