"""Score held-out pairs: the objective's metrics with TRL's names, the scores of each pair, and the drop in accuracy
with other images.

Used by training, on every worker, and by `orpo-ray evaluate`, in its process or on workers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import torch

from orpo_ray.data.bad_rows import BadRow
from orpo_ray.data.balance import Packing, StepShare
from orpo_ray.data.collate_images import PIXELS
from orpo_ray.data.encoding import EncodedPair, EncoderSpec
from orpo_ray.data.packing import PairBatch
from orpo_ray.data.reading import ReadSpec
from orpo_ray.errors import UserError
from orpo_ray.evaluation.group_metrics import group_metrics
from orpo_ray.evaluation.pair_scores import BLANK, CORRECT, EXCHANGED, KEYS, join_pass, join_workers
from orpo_ray.model.vision_cache import KEYS as CACHE_KEYS
from orpo_ray.objective.base import Normaliser, Objective
from orpo_ray.objective.collectives import add_sums, gather_objects, reduce_sums
from orpo_ray.objective.logps import PairLogps
from orpo_ray.objective.pair_model import PairModel
from orpo_ray.objective.step_planner import StepPlanner
from orpo_ray.streaming.steps import from_rank_zero_of_ray_train, iter_shares, open_feed

Forward = Callable[[PairBatch], PairLogps]
GRAY = 127
"""The value of every pixel of a blank image, of 255."""


@dataclass(frozen=True)
class HeldOut:
    """The held-out pairs of all workers, and which worker this is."""

    read: ReadSpec
    encoder: EncoderSpec
    max_encoders: int
    """Encoding tasks at a time, for all workers together."""
    rank: int = 0
    num_workers: int = 1
    together: int = 1
    """Workers, of consecutive ranks, that score the same pairs."""
    from_rank_zero: Callable[[Any], Any] = from_rank_zero_of_ray_train
    """Gives every worker what rank 0 has. A collective."""

    def shares(self, exchange_images: bool, packing: Packing) -> Iterable[StepShare]:
        """All of this worker's shares; with `exchange_images`, each pair gets the images of another pair."""
        steps = -(-self.read.end_sample // self.read.pairs_per_step)
        read = replace(self.read, exchange_images=exchange_images)
        feed = open_feed(
            read, self.encoder, self.max_encoders, self.rank, self.num_workers, self.together,
            in_process=True, from_rank_zero=self.from_rank_zero,
        )  # fmt: skip
        return iter_shares(feed, packing, 0, steps)


@dataclass(frozen=True)
class Scores:
    """The result of one evaluation."""

    metrics: dict[str, float]
    """Averages over all pairs, under TRL's names without a prefix."""
    pairs: pa.Table
    """Each pair's scores (`evaluation/pair_scores.py`), of all workers."""
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

    def evaluate(self, grounding: bool, blank: bool = False) -> Scores:
        """Score all pairs.

        Args:
            grounding: score them again with exchanged images.
            blank: score them again with gray images.

        Raises:
            UserError: no row is usable.
        """
        was_training = self.model.training
        self.model.eval()
        try:
            self.on_pass("evaluating")
            scores = self._pass()
            # A pair without a partner to exchange images with is not a bad row, so `bad` does not change.
            if grounding:
                self.on_pass("evaluating with exchanged images")
                scores = with_pass(scores, self._pass(exchange_images=True), EXCHANGED)
            if blank:
                self.on_pass("evaluating with blank images")
                scores = with_pass(scores, self._pass(change=blanked), BLANK)
        finally:
            self.model.train(was_training)
        return scores

    def _pass(self, exchange_images: bool = False, change: Callable[[PairBatch], PairBatch] | None = None) -> Scores:
        shares = self.held_out.shares(exchange_images, self.planner.packing)
        forward = self.forward
        return score(forward if change is None else lambda batch: forward(change(batch)), shares, self.planner)


def score(forward: Forward, shares: Iterable[StepShare], planner: StepPlanner) -> Scores:
    """Run one pass over shares of steps; every worker must pass equally many.

    Metrics are the objective's, and `runtime` in seconds, `samples_per_second`, `steps_per_second`, `pairs`,
    `bad_rows`. Raises UserError if no row is usable.
    """
    return score_each(lambda batch: {"": forward(batch)}, {"": planner.objective}, shares, planner)[""]


@torch.no_grad()
def score_each(
    forward: Callable[[PairBatch], Mapping[str, PairLogps]],
    objectives: Mapping[str, Objective],
    shares: Iterable[StepShare],
    planner: StepPlanner,
) -> dict[str, Scores]:
    """The same for several models that score the same pairs.

    Args:
        forward: micro-batch -> the log-probs of every model, by name.
        objectives: of every model, by name.
        shares: of steps.
        planner: plans the steps.
    """
    started, steps = time.perf_counter(), 0
    tallies = {name: _Tally(objective, planner) for name, objective in objectives.items()}
    bad: list[BadRow] = []
    for share in shares:
        steps += 1
        bad += share.bad
        for batch, pairs in zip(planner.plan(share).batches, share.microbatches, strict=True):
            for name, logps in forward(batch.to(planner.device)).items():
                tallies[name].add(logps.cpu(), batch, pairs)
    return {name: tally.scores(steps, time.perf_counter() - started, bad) for name, tally in tallies.items()}


class _Tally:
    """Adds up what one model makes of the pairs."""

    def __init__(self, objective: Objective, planner: StepPlanner) -> None:
        self._objective, self._planner = objective, planner
        self._sums: dict[str, torch.Tensor] = {}
        self._rows: list[dict[str, Any]] = []

    def add(self, logps: PairLogps, batch: PairBatch, pairs: Sequence[EncodedPair]) -> None:
        """Add a micro-batch, all in main memory."""
        # Averages within each pair, then over pairs: a token average over a step would depend on the step's size.
        _, more = self._objective.loss(logps, batch.weights, Normaliser(1.0))
        self._sums = add_sums(self._sums, more)
        if self._planner.counts:
            self._rows += iter_pair_scores(self._objective, logps, pairs)

    def scores(self, steps: int, runtime: float, bad: list[BadRow]) -> Scores:
        """Add up over all workers. A collective. Raises UserError if no row is usable."""
        totals = reduce_sums(self._sums, self._planner.device, self._planner.counts)
        if not totals.get("pairs"):
            raise UserError(
                f"none of the {len(bad)} held-out rows can be used",
                field="data.eval",
                fix="run orpo-ray data check to see why",
            )
        metrics = self._objective.metrics(totals) | {
            "runtime": runtime,
            "samples_per_second": totals["pairs"] / runtime,
            "steps_per_second": steps / runtime,
            "pairs": totals["pairs"],
            "bad_rows": float(len(bad)),
        }
        pairs = join_workers(gather_objects(self._rows))
        return Scores(metrics | group_metrics(pairs), pairs, bad)


def iter_pair_scores(objective: Objective, logps: PairLogps, pairs: Sequence[EncodedPair]) -> Iterator[dict[str, Any]]:
    """Yield a row for each pair of a micro-batch. The figures of a pair are the metrics of an evaluation of it alone.

    Args:
        objective: the loss.
        logps: of the micro-batch, on the CPU; dummy pairs come last and are left out.
        pairs: the pairs, without dummy pairs.
    """
    if not pairs:
        return
    chosen, rejected = objective.answer_logps(logps)
    preferred = (chosen > rejected).tolist()
    tensors = [values[: len(pairs)] for values in vars(logps).values() if values is not None]
    one = torch.ones(1)

    def sums_of_one(*values: torch.Tensor) -> dict[str, torch.Tensor]:
        _, sums = objective.loss(PairLogps(*(value.view(1) for value in values)), one, Normaliser(1.0))
        return {name: torch.as_tensor(value) for name, value in sums.items()}

    try:
        sums = torch.func.vmap(sums_of_one)(*tensors)
    except RuntimeError:  # an objective that branches on its values
        alone = [sums_of_one(*values) for values in zip(*tensors, strict=True)]
        sums = {name: torch.stack([each[name] for each in alone]) for name in alone[0]}
    columns = [value.tolist() for value in sums.values()]
    for place, (pair, values) in enumerate(zip(pairs, zip(*columns, strict=True), strict=True)):
        lengths = (len(pair.prompt_ids), len(pair.chosen_ids), len(pair.rejected_ids))
        keys = (pair.sample_index, pair.id, *lengths, pair.language, pair.domain)
        figures = objective.metrics(dict(zip(sums, values, strict=True)))
        yield dict(zip(KEYS, keys, strict=True)) | {CORRECT: preferred[place]} | figures


def blanked(batch: PairBatch) -> PairBatch:
    """Return the batch with every image in gray, of the same size and so with as many tokens."""
    images = {name: tensor for name, tensor in batch.images.items() if name != CACHE_KEYS}
    if PIXELS in images:
        images[PIXELS] = torch.full_like(images[PIXELS], GRAY)
    return replace(batch, images=images)


def with_pass(scores: Scores, other: Scores, name: str) -> Scores:
    """Add a pass with other images: each pair's scores, and the accuracy that the other images cost.

    `grounding_gap` is the accuracy lost by exchanged images, over the pairs scored with both; near 0, the model ignores
    its images.
    """
    pairs = join_pass(scores.pairs, other.pairs, name)
    both = pairs.filter(pc.is_valid(pairs[f"{name}/{CORRECT}"]))
    if not both.num_rows:
        return replace(scores, pairs=pairs)
    seen, unseen = (pc.mean(both[column]).as_py() for column in (CORRECT, f"{name}/{CORRECT}"))
    prefix = "grounding" if name == EXCHANGED else f"grounding_{name}"
    found = {f"rewards/accuracies_{name}": unseen, f"{prefix}_gap": seen - unseen, f"{prefix}_pairs": both.num_rows}
    metrics = scores.metrics | {key: float(value) for key, value in found.items()} | group_metrics(pairs)
    return replace(scores, pairs=pairs, metrics=metrics)


def with_prefix(metrics: Mapping[str, float], prefix: str) -> dict[str, float]:
    """`loss` -> `eval/loss`, and so on."""
    return {f"{prefix}/{name}": value for name, value in metrics.items()}
