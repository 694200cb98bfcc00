"""A worker's shard of a step -> micro-batches that all workers run in lock-step, and the step's normaliser.

Under ZeRO every forward and backward is a collective: all workers must run equally many, through the same modules of
the model. A worker with too few pairs, or with no images, adds dummy pairs of weight 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from orpo_ray.data.collate_images import Collate, concatenate_images
from orpo_ray.data.encoding import EncodedPair, PairEncoder
from orpo_ray.data.packing import Layout, PairBatch, build_batch, nll_token_count, plan_microbatches, spread
from orpo_ray.data.transfer import to_device
from orpo_ray.objective.base import Normaliser, Objective
from orpo_ray.objective.pair_model import PairModel


@dataclass(frozen=True)
class StepPlan:
    """Micro-batches of a worker in a step."""

    batches: list[PairBatch]
    """Equally many on every worker."""
    normaliser: Normaliser
    """Equal on every worker."""
    pairs: int
    """Pairs in the step, over all workers."""
    bad: int
    """Bad rows in the step, over all workers."""


class StepPlanner:
    """Plans each step together with the other workers. A collective: every worker must call `plan` for every step."""

    def __init__(
        self,
        objective: Objective,
        token_budget: int,
        layout: Layout,
        text_dummy: EncodedPair,
        image_dummy: EncodedPair,
        device: torch.device,
        collate: Collate = concatenate_images,
    ) -> None:
        """Keep what all steps share.

        Args:
            objective: Decides which tokens are targets, and whether the step's NLL tokens are counted.
            token_budget: Most tokens in one micro-batch.
            layout: Layout of the batches, the one that the model's attention was loaded for.
            text_dummy: Dummy pair without an image.
            image_dummy: Dummy pair with an image.
            device: Where collectives run.
            collate: Joins the vision inputs of a batch's images, as the model's family takes them.
        """
        self.objective, self.token_budget, self.layout, self.device = objective, token_budget, layout, device
        self.collate = collate
        self.text_dummy, self.image_dummy = text_dummy, image_dummy

    @classmethod
    def of(
        cls, objective: Objective, token_budget: int, encoder: PairEncoder, model: PairModel, device: torch.device
    ) -> StepPlanner:
        """Make the planner for a model, with dummy pairs from its encoder."""
        dummy_pairs = (encoder.dummy_pair(with_image=False), encoder.dummy_pair(with_image=True))
        return cls(objective, token_budget, model.layout, *dummy_pairs, device, model.family.collate)

    def plan(self, pairs: Sequence[EncodedPair], num_bad: int) -> StepPlan:
        """Cut this worker's pairs of a step into as many micro-batches as the other workers run."""
        microbatches = plan_microbatches(pairs, self.token_budget, self.layout)
        has_images = any(pair.images for pair in pairs)
        tokens = sum(nll_token_count(pair, self.objective.nll_span) for pair in pairs)
        mine = [len(pairs), tokens, num_bad, len(microbatches), float(has_images)]
        everyone = gather_rows(mine, self.device)
        total_pairs, total_tokens, total_bad = (int(column) for column in everyone[:, :3].sum(0))
        count, any_images = int(everyone[:, 3].max()), bool(everyone[:, 4].max())
        batches = [self._build(batch, any_images) for batch in spread(microbatches, count, self.layout)]
        nll_tokens = float(total_tokens) if self.objective.nll_average == "token" else None
        return StepPlan(batches, Normaliser(float(total_pairs), nll_tokens), total_pairs, total_bad)

    def _build(self, batch: list[EncodedPair], any_images: bool) -> PairBatch:
        dummy_pairs: list[EncodedPair] = []
        if any_images and not any(pair.images for pair in batch):
            dummy_pairs = [self.image_dummy]
        elif not batch:
            dummy_pairs = [self.text_dummy]
        return build_batch(batch, self.objective.nll_span, self.layout, dummy_pairs, self.collate)


def gather_rows(values: Sequence[float], device: torch.device) -> torch.Tensor:
    """Collect one row of numbers from every worker: float64 [num_workers, n] on the CPU."""
    return _gather(torch.tensor(values, dtype=torch.float64), device)


def _gather(mine: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The same for a row [n] that is a tensor, on any device. The host waits once, where a device is involved."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return mine.cpu().unsqueeze(0)
    mine = to_device(mine, device)
    rows = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, mine)
    return torch.stack(rows).cpu()


def add_sums(total: Mapping[str, torch.Tensor], more: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Add an objective's sums of another micro-batch, in float64. An empty `total` starts at zero."""
    return {name: total.get(name, 0.0) + value.double() for name, value in more.items()}


def reduce_sums(sums: Mapping[str, torch.Tensor], device: torch.device) -> dict[str, float]:
    """Add up an objective's sums over all workers. All of them ran equally many micro-batches, so have equal names."""
    if not sums:
        return {}
    total = _gather(torch.stack([value.double() for value in sums.values()]), device).sum(0)
    return dict(zip(sums, total.tolist(), strict=True))
