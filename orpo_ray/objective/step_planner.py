"""A worker's share of a step -> the micro-batches that all workers run in lock-step, and the step's normaliser.

Under ZeRO every forward and backward is a collective: workers must run equally many, and through the same parts of
the model. Where a worker has too few pairs, or none with an image, dummy pairs of weight 0 stand in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from orpo_ray.config.recipe import Recipe
from orpo_ray.data.collate import Collate, concatenate_images
from orpo_ray.data.encoding import EncodedPair, PairEncoder
from orpo_ray.data.packing import Layout, PairBatch, build_batch, nll_token_count, plan_microbatches, spread
from orpo_ray.model.loading import vocabulary_size
from orpo_ray.objective.forward import PairModel
from orpo_ray.objective.logps import count_chunks
from orpo_ray.objective.orpo import SUM_NAMES, Normaliser


@dataclass(frozen=True)
class StepPlan:
    """What this worker runs in one step. pairs and bad are counts over all workers."""

    batches: list[PairBatch]
    normaliser: Normaliser
    pairs: int
    bad: int


class StepPlanner:
    """Agrees with the other workers on each step; a collective, to be called by all of them for every step."""

    def __init__(
        self,
        nll: str,
        token_budget: int,
        layout: Layout,
        vocab_size: int,
        text_dummy: EncodedPair,
        image_dummy: EncodedPair,
        device: torch.device,
        collate: Collate = concatenate_images,
    ) -> None:
        self.nll, self.token_budget, self.layout, self.device = nll, token_budget, layout, device
        self.vocab_size, self.collate = vocab_size, collate
        self.text_dummy, self.image_dummy = text_dummy, image_dummy

    @classmethod
    def of(cls, recipe: Recipe, encoder: PairEncoder, model: PairModel, device: torch.device) -> StepPlanner:
        """The planner of a recipe's steps for a model."""
        dummy_pairs = (encoder.dummy_pair(with_image=False), encoder.dummy_pair(with_image=True))
        budget, vocab_size = recipe.optim.tokens_per_microbatch, vocabulary_size(model.model)
        return cls(recipe.orpo.nll, budget, model.layout, vocab_size, *dummy_pairs, device, model.family.collate)

    def plan(self, pairs: Sequence[EncodedPair], num_bad: int) -> StepPlan:
        """Cut this worker's pairs of a step into as many micro-batches as the other workers run."""
        microbatches = plan_microbatches(pairs, self.token_budget, self.layout)
        has_images = any(pair.images for pair in pairs)
        tokens = sum(nll_token_count(pair, self.nll) for pair in pairs)
        mine = [len(pairs), tokens, num_bad, len(microbatches), float(has_images)]
        everyone = gather_rows(mine, self.device)
        total_pairs, total_tokens, total_bad = (int(column) for column in everyone[:, :3].sum(0))
        count, any_images = int(everyone[:, 3].max()), bool(everyone[:, 4].max())
        batches = [self._build(batch, any_images) for batch in spread(microbatches, count, self.layout)]
        batches = self._agree_on_chunks(batches)
        nll_tokens = float(total_tokens) if self.nll == "prompt+response" else None
        return StepPlan(batches, Normaliser(float(total_pairs), nll_tokens), total_pairs, total_bad)

    def _build(self, batch: list[EncodedPair], any_images: bool) -> PairBatch:
        dummy_pairs: list[EncodedPair] = []
        if any_images and not any(pair.images for pair in batch):
            dummy_pairs = [self.image_dummy]
        elif not batch:
            dummy_pairs = [self.text_dummy]
        return build_batch(batch, self.nll, self.layout, dummy_pairs, self.collate)

    def _agree_on_chunks(self, batches: list[PairBatch]) -> list[PairBatch]:
        """Every part of a micro-batch's targets is a collective: equally many of them on every worker."""
        mine = [float(count_chunks(len(batch.target_ids), self.vocab_size)) for batch in batches]
        most = gather_rows(mine, self.device).amax(0).tolist() if mine else []
        return [replace(batch, head_chunks=int(chunks)) for batch, chunks in zip(batches, most, strict=True)]


def gather_rows(values: Sequence[float], device: torch.device) -> torch.Tensor:
    """One row of numbers from every worker: float64 [num_workers, n] on the CPU."""
    mine = torch.tensor(values, dtype=torch.float64, device=device)
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return mine.cpu().unsqueeze(0)
    rows = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, mine)
    return torch.stack(rows).cpu()


def reduce_sums(sums: Mapping[str, torch.Tensor | float], device: torch.device) -> dict[str, float]:
    """Add up the sums of `SUM_NAMES` over all workers."""
    total = gather_rows([float(sums.get(name, 0.0)) for name in SUM_NAMES], device).sum(0)
    return dict(zip(SUM_NAMES, total.tolist(), strict=True))
