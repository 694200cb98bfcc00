"""A worker's share of a step -> micro-batches that all workers run in lock-step, and the step's normalizer.

Under ZeRO every forward and backward is a collective: all workers must run equally many, through the same modules of
the model. A worker with too few pairs, or with no images, adds dummy pairs of weight 0. Every share holds the totals of
its step, so that planning needs no communication and can be done ahead, in a thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from orpo_ray.data.bad_rows import BadRow
from orpo_ray.data.balance import Packing, PairSize, StepShare, StepTotals, distribute
from orpo_ray.data.collate_images import Collate, concatenate_images
from orpo_ray.data.encoding import EncodedPair, PairEncoder
from orpo_ray.data.packing import PairBatch, build_batch
from orpo_ray.model.sequence_group import SequenceGroup
from orpo_ray.objective.base import Normaliser, Objective
from orpo_ray.objective.pair_model import PairModel


@dataclass(frozen=True)
class StepPlan:
    """Micro-batches of a worker in a step. Holds none of its `StepShare`'s pairs, so that their memory is freed."""

    step: int
    batches: list[PairBatch]
    """Equally many on every worker."""
    normaliser: Normaliser
    """Equal on every worker."""
    pairs: int
    """Pairs in the step, over all workers."""
    bad: list[BadRow]
    """Bad rows of the step, over all workers."""
    ids: list[list[str]]
    """Ids of the pairs in each micro-batch of this worker."""


class StepPlanner:
    """Plans steps so that all workers, each with its own share of the same step, arrive at matching plans."""

    group: SequenceGroup | None = None
    """The workers that compute each batch together with this one; None if there are none."""

    def __init__(
        self,
        objective: Objective,
        packing: Packing,
        text_dummy: EncodedPair,
        image_dummy: EncodedPair,
        device: torch.device,
        collate: Collate = concatenate_images,
    ) -> None:
        """Keep what all steps share.

        Args:
            objective: Decides which tokens are targets, and whether the step's NLL tokens are counted.
            packing: How pairs become micro-batches, in the layout that the model's attention was loaded for.
            text_dummy: Dummy pair without an image.
            image_dummy: Dummy pair with an image.
            device: Where the model runs.
            collate: Joins the vision inputs of a batch's images, as the model's family takes them.
        """
        self.objective, self.packing, self.device = objective, packing, device
        self.collate = collate
        self.text_dummy, self.image_dummy = text_dummy, image_dummy

    @classmethod
    def of(
        cls, objective: Objective, token_budget: int, encoder: PairEncoder, model: PairModel, device: torch.device
    ) -> StepPlanner:
        """Make the planner for a model, with dummy pairs from its encoder."""
        dummy_pairs = (encoder.dummy_pair(with_image=False), encoder.dummy_pair(with_image=True))
        packing = Packing(token_budget, model.layout, model.tokens_per_image_value, model.family.shares)
        planner = cls(objective, packing, *dummy_pairs, device, model.collate)
        planner.group = model.group
        return planner

    @property
    def counts(self) -> bool:
        """False where another worker computes the same pairs, and counts them."""
        return self.group is None or self.group.member == 0

    def share(
        self, pairs: Sequence[EncodedPair], bad: Sequence[BadRow] = (), step: int = 0, rank: int = 0, workers: int = 1
    ) -> StepShare:
        """Return a worker's share of a step, all of whose pairs are at hand."""
        sizes = [PairSize.of(pair) for pair in pairs]
        own = distribute(sizes, workers, self.packing)[rank]
        return StepShare(step, StepTotals.of(sizes), [[pairs[index] for index in each] for each in own], list(bad))

    def plan(self, share: StepShare) -> StepPlan:
        """Build the tensors of this worker's micro-batches."""
        totals = share.totals
        batches = [self._build(pairs, totals.with_images > 0) for pairs in share.microbatches]
        nll_tokens = float(totals.nll_tokens(self.objective.nll_span))
        normaliser = Normaliser(float(totals.pairs), nll_tokens if self.objective.nll_average == "token" else None)
        ids = [[pair.id for pair in pairs] for pairs in share.microbatches]
        return StepPlan(share.step, batches, normaliser, totals.pairs, share.bad, ids)

    def _build(self, batch: list[EncodedPair], any_images: bool) -> PairBatch:
        dummy_pairs: list[EncodedPair] = []
        if any_images and not any(pair.images for pair in batch):
            dummy_pairs = [self.image_dummy]
        elif not batch:
            dummy_pairs = [self.text_dummy]
        packing = self.packing
        built = build_batch(batch, self.objective.nll_span, packing.layout, dummy_pairs, self.collate, packing.shares)
        return built if self.group is None else self.group.with_own_targets(built)
