"""Score held-out pairs with any forward function: TRL's metrics, and what is lost when images are exchanged."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch

from orpo_ray.data.encoding import EncodedPair
from orpo_ray.data.packing import PairBatch
from orpo_ray.errors import UserError
from orpo_ray.objective.orpo import SUM_NAMES, Normaliser, PairLogps, metrics_from_sums, orpo_loss
from orpo_ray.objective.step_planner import StepPlanner, gather_rows, reduce_sums

Forward = Callable[[PairBatch], PairLogps]


@dataclass(frozen=True)
class Scores:
    """The result of one pass. correct: by sample index, whether this worker's chosen answer was the likelier one."""

    metrics: dict[str, float]
    correct: dict[int, bool]


@torch.no_grad()
def score(
    forward: Forward, shares: Iterable[tuple[list[EncodedPair], int]], planner: StepPlanner, beta: float
) -> Scores:
    """One pass over shares (pairs, number of bad rows); every worker must come with as many of them.

    Metrics are TRL's, with `runtime` in seconds and `samples_per_second`, `steps_per_second`.
    """
    started, steps, bad = time.perf_counter(), 0, 0
    sums: dict[str, torch.Tensor | float] = dict.fromkeys(SUM_NAMES, 0.0)
    correct: dict[int, bool] = {}
    for pairs, num_bad in shares:
        plan = planner.plan(pairs, num_bad)
        steps, bad = steps + 1, bad + plan.bad
        for batch in plan.batches:
            logps = forward(batch.to(planner.device))
            # Per pair here, per-pair averages later: a token average over a whole set has no step to be taken over.
            unit = Normaliser(1.0)
            _, part = orpo_loss(logps, batch.weights.to(planner.device), beta, unit)
            sums = {name: sums[name] + part[name].double() for name in SUM_NAMES}
            likelier = logps.chosen / logps.chosen_tokens > logps.rejected / logps.rejected_tokens
            answers = zip(batch.sample_indices, likelier.tolist(), strict=True)
            correct.update({sample_index: is_correct for sample_index, is_correct in answers if sample_index >= 0})
    totals = reduce_sums(sums, planner.device)
    if not totals["pairs"]:
        raise UserError(f"none of the {bad} held-out rows can be used", field="data.eval")
    runtime = time.perf_counter() - started
    metrics = metrics_from_sums(totals, beta) | {
        "runtime": runtime,
        "samples_per_second": totals["pairs"] / runtime,
        "steps_per_second": steps / runtime,
        "pairs": totals["pairs"],
        "bad_rows": float(bad),
    }
    return Scores(metrics, correct)


def grounding(seen: Scores, exchanged: Scores, device: torch.device) -> dict[str, float]:
    """Accuracy with the right images against accuracy with exchanged ones, over the pairs that have both.

    `grounding_gap` is what the exchange costs: near 0, the model answers without looking.
    """
    both = seen.correct.keys() & exchanged.correct.keys()
    counts = [
        len(both),
        sum(seen.correct[sample_index] for sample_index in both),
        sum(exchanged.correct[sample_index] for sample_index in both),
    ]
    total, right, right_exchanged = gather_rows(counts, device).sum(0).tolist()
    if not total:
        return {}
    return {
        "rewards/accuracies_exchanged": right_exchanged / total,
        "grounding_gap": (right - right_exchanged) / total,
        "grounding_pairs": total,
    }


def with_prefix(metrics: Mapping[str, float], prefix: str) -> dict[str, float]:
    """`loss` -> `eval/loss`, and so on."""
    return {f"{prefix}/{name}": value for name, value in metrics.items()}
