"""Collectives of an optimizer step, with their bytes, by ZeRO stage.

The formulas follow DeepSpeed 0.19.8 with the config of `training/deepspeed_engine.py`. `benchmarks/collectives.py`
counts the collectives of real engines and compares.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from orpo_ray.planning.states import MAX_LIVE, Stage, Weights


@dataclass(frozen=True)
class Collective:
    """Collectives of one kind in a step, taken together."""

    kind: Literal["all-reduce", "all-gather", "reduce-scatter"]
    payload: int
    """Bytes of the whole tensors: what is reduced, or what has been gathered."""

    def wire_bytes(self, workers: int) -> float:
        """Bytes that each worker sends in a ring, where an all-reduce is a reduce-scatter and an all-gather."""
        rounds = 2 if self.kind == "all-reduce" else 1
        return rounds * (workers - 1) / workers * self.payload


def collectives(weights: Weights, stage: Stage, microbatches: int) -> tuple[Collective, ...]:
    """Return the collectives of an optimizer step of a worker, without those of a few bytes.

    Args:
        weights: sizes of the parameters.
        stage: ZeRO stage.
        microbatches: micro-batches of each worker.
    """
    gradients, trained = weights.trained * 4, weights.trained * weights.element  # gradients travel in float32
    if stage == 0:
        return (Collective("all-reduce", gradients),)
    if stage == 1:
        return (Collective("all-reduce", gradients), Collective("all-gather", trained))
    if stage == 2:
        # Each worker needs the sums of its shard only, but DeepSpeed reduces whole buckets for everybody
        # (stage_1_and_2.py: use_multi_rank_bucket_allreduce), after every backward.
        return (Collective("all-reduce", gradients * microbatches), Collective("all-gather", trained))
    # Weights are gathered for forward and again for backward, unless all of them may stay gathered in between
    # (stage3.py: max_live_parameters). Small ones are gathered after the step only.
    times = 1 if weights.total <= MAX_LIVE else 2
    small = [weight for weight in weights.each if weight.elements <= 10 * weights.hidden]
    large = weights.bytes - sum(weight.bytes for weight in small)
    updated = sum(weight.bytes for weight in small if weight.trained)
    return (
        Collective("all-gather", times * large * microbatches + updated),
        Collective("reduce-scatter", gradients * microbatches),
    )
