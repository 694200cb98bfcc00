"""SimPO, https://arxiv.org/abs/2405.14734, equation 6, as TRL's CPOTrainer computes it (loss_type="simpo").

With mean_logp(y) the mean log-prob per token of an answer y, and s the label smoothing:

    margin = beta * (mean_logp(chosen) - mean_logp(rejected)) - gamma
    loss = -(1 - s) * log sigmoid(margin) - s * log sigmoid(-margin)

Legend: B pairs in a micro-batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from orpo_ray.objective.base import (
    NllAverage,
    NllSpan,
    Normaliser,
    Sums,
    averages,
    mean_logps,
    reward_metrics,
    smoothed_sigmoid_loss,
    weighted_sums,
)
from orpo_ray.objective.logps import PairLogps


@dataclass(frozen=True)
class SimPO:
    """Sigmoid loss on mean log-probs with a target margin; needs neither a reference model nor an NLL term."""

    beta: float = 2.0
    """Scale of the difference between log-probs."""
    gamma: float = 1.0
    """Target margin between the answers' rewards."""
    label_smoothing: float = 0.0
    """Probability that a pair's labels are the wrong way round."""

    nll_span: ClassVar[NllSpan] = "none"
    nll_average: ClassVar[NllAverage] = "pair"
    further_forwards: ClassVar[tuple[str, ...]] = ()

    def answer_logps(self, logps: PairLogps) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean log-probs per token, so that the length of an answer does not count."""
        return mean_logps(logps)

    def loss(self, logps: PairLogps, weights: torch.Tensor, normaliser: Normaliser) -> tuple[torch.Tensor, Sums]:
        """See `Objective.loss`."""
        chosen, rejected = self.answer_logps(logps)
        margin = self.beta * (chosen - rejected) - self.gamma
        per_pair = smoothed_sigmoid_loss(margin, self.label_smoothing)
        values = {
            "loss": per_pair,
            "logps/chosen": chosen,
            "logps/rejected": rejected,
            "accuracies": (chosen > rejected).float(),
        }
        return (weights * per_pair).sum() / normaliser.pairs, weighted_sums(weights, values)

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        """The metrics of TRL's CPOTrainer, except `logits/*`, which would need whole logits, and `nll_loss`."""
        mean = averages(sums)
        return {"loss": mean["loss"], **reward_metrics(mean, self.beta)}
