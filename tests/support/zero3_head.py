"""A worker for the test of the chunked output head under ZeRO-3."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from orpo_ray.config.load import parse_recipe
from orpo_ray.config.schema import ModelConfig
from orpo_ray.data.encoding import EncodedPair
from orpo_ray.model.loading import load_model
from orpo_ray.objective import logps
from orpo_ray.objective.orpo import ORPO
from orpo_ray.objective.pair_model import PairModel
from orpo_ray.objective.step_planner import StepPlanner, reduce_sums
from orpo_ray.training.deepspeed_engine import DeepSpeedEngine
from support.pairs_by_hand import NORM, make_pair

STEPS = 3


def share_of(family: str, rank: int, num_workers: int) -> list[EncodedPair]:
    """Rank 0 of two gets the long answers."""
    rng = np.random.default_rng(0)
    pairs = [
        make_pair(family, rng, 1, 6, *lengths, sample_index) for sample_index, lengths in enumerate([(30, 25), (2, 3)])
    ]
    return pairs[rank::num_workers]


def train(rank: int, num_workers: int, family: str, stage: int) -> list[list[float]]:
    """Run a few steps on a worker; returns losses, gradient norms, and numbers of chunks of the head."""
    with pytest.MonkeyPatch.context() as patch:
        return _train(rank, num_workers, family, stage, patch)


def _train(rank: int, num_workers: int, family: str, stage: int, patch: pytest.MonkeyPatch) -> list[list[float]]:
    model_id = f"orpo-ray/tiny-{family}"
    recipe = parse_recipe(
        {"name": "x", "model": {"id": model_id}, "data": {"train": "none"}, "deepspeed": {"zero_stage": stage},
         "optim": {"learning_rate": 1e-3, "warmup": 0, "pairs_per_step": 2}}
    )  # fmt: skip
    device = torch.device("cpu")
    model = PairModel(load_model(ModelConfig(id=model_id), device, seed=0), NORM)
    vocabulary = model.model.config.get_text_config().vocab_size
    patch.setattr(logps, "CHUNK_BYTES", 16 * vocabulary * 4)  # 16 targets per chunk
    dummy_pairs = share_of(family, 0, 2) * 2
    planner = StepPlanner(ORPO(), 8192, "shared_prefix", vocabulary, dummy_pairs[0], dummy_pairs[1], device)
    engine = DeepSpeedEngine(model, recipe, STEPS, num_workers)
    lines = []
    for _ in range(STEPS):
        plan = planner.plan(share_of(family, rank, num_workers), 0)
        (batch,) = plan.batches
        loss, sums = ORPO(0.1).loss(engine.forward(batch), batch.weights, plan.normaliser)
        engine.backward(loss)
        norm = engine.step()
        lines.append([reduce_sums(sums, device)["loss"], norm, batch.head_chunks])
    engine.deepspeed.destroy()
    return lines
