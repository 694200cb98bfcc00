"""Steps of the training program on the GPU: how often the host waits for it, and how long it waits for the host."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from orpo_ray.data.encoding import EncodedPair
from orpo_ray.tiny_models.families import TINY_FAMILIES
from orpo_ray.training.worker import Worker
from support.device_idle import idle_fraction
from support.gpu_training import counted_syncs
from support.pairs_by_hand import make_pair
from support.sharded_loading import write_model
from support.tiny_runs import tiny_recipe
from support.worker_alone import make_step, make_worker, plan_step, train_step

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("process_group")]
FAMILY = "smolvlm"
# Waits of the host in a step: for the end of the backward pass, which is timed, and for the gradient's norm together
# with what is logged; with paged moments also for the end of the update.
MOST_SYNCS = {"adamw": 2, "adamw_8bit": 2, "paged_adamw_8bit": 3}
MOST_IDLE = 0.02
STEPS = 4  # that are profiled


def random_pairs(count: int, answer: int) -> list[EncodedPair]:
    rng = np.random.default_rng(0)
    return [make_pair(FAMILY, rng, 1, 2 * answer, answer, answer, number) for number in range(count)]


def worker_on(device: torch.device, folder: Path, model_id: str, **optim: Any) -> Worker:
    dtype = "bfloat16" if device.type == "cuda" else "float32"
    model = {"id": model_id, "dtype": dtype}
    return make_worker(tiny_recipe(folder, "alone", model=model, optim=optim), device)


@pytest.mark.parametrize(("optimizer", "most"), MOST_SYNCS.items())
def test_a_step_makes_the_host_wait_at_most_twice_and_once_for_paged_moments(
    optimizer: str, most: int, device: torch.device, tmp_path: Path
) -> None:
    """Forward, backward, update, metrics and logging, after two steps that fill caches."""
    worker = worker_on(device, tmp_path, f"orpo-ray/tiny-{FAMILY}", optimizer=optimizer)
    pairs = random_pairs(4, 10)
    for step in range(2):
        make_step(worker, pairs, step)
    plan = plan_step(worker, pairs, 2)
    with counted_syncs(device) as found:
        train_step(worker, plan)
    assert len(found) <= most, found


def test_the_gpu_is_idle_for_less_than_2_percent(device: torch.device, tmp_path: Path) -> None:
    """A model of 250 million parameters, 16 pairs in two micro-batches. The steps are planned before.

    On a CPU, this only tests that there are times of operations.
    """
    on_gpu = device.type == "cuda"
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 16, "vocab_size": 4096}
    heads = {"num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 64}
    folder = tmp_path / "model"
    model_id = write_model(folder, FAMILY, **(sizes | heads if on_gpu else {}))
    TINY_FAMILIES[FAMILY]().processor().save_pretrained(folder)
    answer = 250 if on_gpu else 10
    worker = worker_on(device, tmp_path, model_id, tokens_per_microbatch=8 * (5 * answer))
    pairs = random_pairs(16, answer)
    for step in range(2):
        make_step(worker, pairs, step)
    plans = [plan_step(worker, pairs, step) for step in range(2, 2 + STEPS)]
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiled:
        for plan in plans:
            train_step(worker, plan)
    kind = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
    # A range that a program marks, such as a step of an optimizer, covers time in which the GPU is idle.
    ran = [each for each in profiled.events() if each.device_type == kind and not each.is_user_annotation]
    assert ran
    if on_gpu:
        assert idle_fraction((each.time_range.start, each.time_range.end) for each in ran) < MOST_IDLE
