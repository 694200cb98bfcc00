"""A worker for the test of the chunked output head under ZeRO-3."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from orpo_ray.config.load import parse_recipe
from orpo_ray.data.balance import Packing
from orpo_ray.data.encoding import EncodedPair
from orpo_ray.model.loading import vocabulary_size, without_adapters
from orpo_ray.objective import logps
from orpo_ray.objective.collectives import reduce_sums
from orpo_ray.objective.orpo import ORPO
from orpo_ray.objective.pair_model import PairModel
from orpo_ray.objective.step_planner import StepPlanner
from orpo_ray.training import deepspeed_engine
from orpo_ray.training.engine import make_engine
from orpo_ray.training.sharded_loading import load_for_training
from support.engine_memory import end_engine
from support.engines_by_hand import keeping_nothing
from support.pairs_by_hand import NORM, make_pair

# Tokens of both answers of both pairs, by step. Rank 0 of two gets the long pair.
LENGTHS = [[(30, 25), (2, 3)], [(60, 50), (4, 6)], [(9, 20), (2, 2)], [(40, 41), (20, 3)]]


def pairs_of(family: str, step: int) -> list[EncodedPair]:
    """Return the pairs of a step."""
    rng = np.random.default_rng(step)
    return [make_pair(family, rng, 1, 6, *both, sample_index) for sample_index, both in enumerate(LENGTHS[step])]


class Gathers:
    """Counts how often ZeRO-3 gathers a weight, and how often its trace of modules turns out wrong."""

    def __init__(self, engine: Any, weight: Any) -> None:
        self.count = self.invalidated = 0
        self.coordinator = engine.optimizer.parameter_offload.get_param_coordinator()
        for parameter in engine.module.parameters():
            parameter.all_gather_coalesced = self._counting(parameter.all_gather_coalesced, weight.ds_id)
        invalidate = self.coordinator._invalidate_trace

        def counting() -> None:
            self.invalidated += 1
            invalidate()

        self.coordinator._invalidate_trace = counting

    def of_step(self) -> list[Any]:
        """Return the gathers of the weight since the last call, invalidated traces, and whether the trace is whole."""
        count, self.count = self.count, 0
        return [count, self.invalidated, self.coordinator.is_complete_trace()]

    def _counting(self, gather: Callable[..., Any], ds_id: int) -> Callable[..., Any]:
        def counted(parameters: list[Any], *args: Any, **kwargs: Any) -> Any:
            self.count += sum(parameter.ds_id == ds_id for parameter in parameters)
            return gather(parameters, *args, **kwargs)

        return counted


def train(rank: int, num_workers: int, family: str, lora: bool, stage: int) -> list[list[Any]]:
    """Run a few steps on a worker; returns the loss, the gradient norm and what `Gathers` saw of each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deepspeed_engine, "deepspeed_config", keeping_nothing(deepspeed_engine.deepspeed_config))
        return _train(rank, num_workers, family, lora, stage, patch)


def _train(
    rank: int, num_workers: int, family: str, lora: bool, stage: int, patch: pytest.MonkeyPatch
) -> list[list[Any]]:
    section = {"id": f"orpo-ray/tiny-{family}"}
    section |= {"lora": {"r": 4, "target_modules": ["q_proj", "lm_head"]}} if lora else {}
    recipe = parse_recipe(
        {"name": "x", "model": section, "data": {"train": "none"}, "deepspeed": {"zero_stage": stage},
         "optim": {"learning_rate": 1e-3, "warmup": 0, "pairs_per_step": 2}}
    )  # fmt: skip
    device = torch.device("cpu")
    model = PairModel(load_for_training(recipe, device), NORM)
    patch.setitem(logps.CHUNK_BYTES, "cpu", 16 * vocabulary_size(model.model) * 4)  # 16 targets per chunk
    dummy_pair = pairs_of(family, 0)[0]
    planner = StepPlanner(ORPO(), Packing(8192, "shared_prefix"), dummy_pair, dummy_pair, device)
    engine: Any = make_engine(model, recipe, len(LENGTHS), num_workers)
    head = without_adapters(model.model).get_output_embeddings()
    gathers = Gathers(engine.deepspeed, getattr(head, "base_layer", head).weight) if stage == 3 else None
    lines = []
    for step in range(len(LENGTHS)):
        plan = planner.plan(planner.share(pairs_of(family, step), rank=rank, workers=num_workers))
        (batch,) = plan.batches
        loss, sums = ORPO(0.1).loss(engine.forward(batch), batch.weights, plan.normaliser)
        engine.backward(loss)
        norm = engine.step()
        seen = gathers.of_step() if gathers is not None else []
        lines.append([reduce_sums(sums, device)["loss"], norm, *seen])
    end_engine(engine)
    return lines
