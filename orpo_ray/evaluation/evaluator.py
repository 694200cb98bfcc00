"""Score held-out pairs: the objective's metrics with TRL's names, and the drop in accuracy with exchanged images.

Used by training, on every worker, and by `orpo-ray evaluate`, in one process.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist

from orpo_ray.data.bad_rows import BadRow
from orpo_ray.data.balance import Packing, StepShare
from orpo_ray.data.encoding import EncoderSpec
from orpo_ray.data.packing import PairBatch
from orpo_ray.data.reading import ReadSpec
from orpo_ray.errors import UserError
from orpo_ray.objective.base import Normaliser, Objective
from orpo_ray.objective.collectives import add_sums, gather_rows, reduce_sums
from orpo_ray.objective.logps import PairLogps
from orpo_ray.objective.pair_model import PairModel
from orpo_ray.objective.step_planner import StepPlanner
from orpo_ray.streaming.steps import iter_shares, open_feed

Forward = Callable[[PairBatch], PairLogps]


@dataclass(frozen=True)
class HeldOut:
    """The held-out pairs of all workers, and which worker this is."""

    read: ReadSpec
    encoder: EncoderSpec
    max_encoders: int
    """Encoding tasks at a time, for all workers together."""
    rank: int = 0
    num_workers: int = 1

    def shares(self, exchange_images: bool, packing: Packing) -> Iterable[StepShare]:
        """All of this worker's shares; with `exchange_images`, each pair gets the images of another pair."""
        steps = -(-self.read.end_sample // self.read.pairs_per_step)
        read = replace(self.read, exchange_images=exchange_images)
        feed = open_feed(read, self.encoder, self.max_encoders, self.rank, self.num_workers)
        return iter_shares(feed, packing, 0, steps)


@dataclass(frozen=True)
class Scores:
    """The result of one evaluation."""

    metrics: dict[str, float]
    """Averages over all workers, under TRL's names without a prefix."""
    correct: dict[int, bool]
    """Sample index -> whether the model prefers the chosen answer; this worker's pairs only."""
    bad: list[BadRow] = field(default_factory=list)
    """Bad rows of all workers."""


class Evaluator:
    """Scores the held-out pairs with the model as it is at the time of a call. Each call is a collective."""

    def __init__(
        self,
        model: PairModel,
        held_out: HeldOut,
        planner: StepPlanner,
        forward: Forward | None = None,
        on_pass: Callable[[str], None] = lambda phase: None,
    ) -> None:
        """Keep what evaluations share.

        Args:
            model: The model, put into evaluation mode while it scores.
            held_out: The pairs.
            planner: Plans the steps, and knows the objective.
            forward: How to run the model, by default directly. Under ZeRO-3 the engine's forward gathers parameters.
            on_pass: Called with a few words for the user when a pass over the pairs begins.
        """
        self.model, self.held_out, self.planner, self.on_pass = model, held_out, planner, on_pass
        self.forward: Forward = forward or model

    def evaluate(self, grounding: bool) -> Scores:
        """Score all pairs; with `grounding` once more with exchanged images. Raises UserError if no row is usable."""
        was_training = self.model.training
        self.model.eval()
        try:
            self.on_pass("evaluating")
            scores = score(self.forward, self._shares(exchange_images=False), self.planner)
            if grounding:
                self.on_pass("evaluating with exchanged images")
                # A pair without a partner to exchange images with is not a bad row, so `bad` does not change.
                exchanged = score(self.forward, self._shares(exchange_images=True), self.planner)
                gap = grounding_metrics(scores, exchanged, self.planner.device)
                scores = replace(scores, metrics=scores.metrics | gap)
        finally:
            self.model.train(was_training)
        return scores

    def _shares(self, exchange_images: bool) -> Iterable[StepShare]:
        return self.held_out.shares(exchange_images, self.planner.packing)


@torch.no_grad()
def score(forward: Forward, shares: Iterable[StepShare], planner: StepPlanner) -> Scores:
    """Run one pass over shares of steps; every worker must pass equally many.

    Metrics are the objective's, and `runtime` in seconds, `samples_per_second`, `steps_per_second`, `pairs`,
    `bad_rows`. Raises UserError if no row is usable.
    """
    started, steps = time.perf_counter(), 0
    objective: Objective = planner.objective
    sums: dict[str, torch.Tensor] = {}
    correct: dict[int, bool] = {}
    bad: list[BadRow] = []
    for share in shares:
        steps += 1
        bad += share.bad
        for batch in planner.plan(share).batches:
            logps = forward(batch.to(planner.device))
            # Averages within each pair, then over pairs: a token average over a step would depend on the step's size.
            _, more = objective.loss(logps, batch.weights.to(planner.device), Normaliser(1.0))
            sums = add_sums(sums, more)
            chosen, rejected = objective.answer_logps(logps)
            preferred = zip(batch.sample_indices, (chosen > rejected).tolist(), strict=True)
            correct |= {sample_index: is_chosen for sample_index, is_chosen in preferred if sample_index >= 0}
    totals = reduce_sums(sums, planner.device)
    if not totals.get("pairs"):
        raise UserError(
            f"none of the {len(bad)} held-out rows can be used",
            field="data.eval",
            fix="run orpo-ray data check to see why",
        )
    runtime = time.perf_counter() - started
    metrics = objective.metrics(totals) | {
        "runtime": runtime,
        "samples_per_second": totals["pairs"] / runtime,
        "steps_per_second": steps / runtime,
        "pairs": totals["pairs"],
        "bad_rows": float(len(bad)),
    }
    return Scores(metrics, correct, bad)


def grounding_metrics(seen: Scores, exchanged: Scores, device: torch.device) -> dict[str, float]:
    """Compare accuracy with the right images and with exchanged ones, over the pairs scored with both.

    `grounding_gap` is the accuracy that the exchange costs; near 0, the model ignores its images. A collective.
    """
    last = max([*seen.correct, *exchanged.correct], default=-1)
    size = int(gather_rows([last], device).max()) + 1
    # Whether a pair was scored, and rightly. With exchanged images it has another length, and maybe another worker.
    scored, right = (torch.zeros(2, size, dtype=torch.int32, device=device) for _ in range(2))
    for row, scores in enumerate((seen, exchanged)):
        sample_indices = torch.tensor(list(scores.correct), dtype=torch.long, device=device)
        scored[row, sample_indices] = 1
        right[row, sample_indices] = torch.tensor(list(scores.correct.values()), dtype=torch.int32, device=device)
    if dist.is_initialized():
        dist.all_reduce(scored)
        dist.all_reduce(right)
    both = scored.amin(0)
    total, (right_seen, right_exchanged) = int(both.sum()), (right * both).sum(1).tolist()
    if not total:
        return {}
    return {
        "rewards/accuracies_exchanged": right_exchanged / total,
        "grounding_gap": (right_seen - right_exchanged) / total,
        "grounding_pairs": float(total),
    }


def with_prefix(metrics: Mapping[str, float], prefix: str) -> dict[str, float]:
    """`loss` -> `eval/loss`, and so on."""
    return {f"{prefix}/{name}": value for name, value in metrics.items()}
