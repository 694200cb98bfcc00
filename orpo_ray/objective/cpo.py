"""CPO, https://arxiv.org/abs/2401.08417, equations 3 to 5, as TRL's CPOTrainer computes it (loss_type="sigmoid").

With logp(y) the log-prob of an answer y, summed over its tokens, and s the label smoothing:

    margin = beta * (logp(chosen) - logp(rejected))
    loss = -(1 - s) * log sigmoid(margin) - s * log sigmoid(-margin) + cpo_alpha * NLL(chosen)

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
    nll_terms,
    reward_metrics,
    smoothed_sigmoid_loss,
    weighted_sums,
)
from orpo_ray.objective.logps import PairLogps


@dataclass(frozen=True)
class CPO:
    """Sigmoid loss on summed log-probs plus the NLL of the chosen answer; needs no reference model."""

    beta: float = 0.1
    """Scale of the difference between log-probs."""
    cpo_alpha: float = 1.0
    """Weight of the NLL term."""
    label_smoothing: float = 0.0
    """Probability that a pair's labels are the wrong way round."""

    nll_average: ClassVar[NllAverage] = "token"
    further_forwards: ClassVar[tuple[str, ...]] = ()

    @property
    def nll_span(self) -> NllSpan:
        """The chosen answer, unless the NLL has no weight."""
        return "response" if self.cpo_alpha else "none"

    def answer_logps(self, logps: PairLogps) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probs summed over tokens: longer answers are less likely ones."""
        return logps.chosen, logps.rejected

    def loss(self, logps: PairLogps, weights: torch.Tensor, normaliser: Normaliser) -> tuple[torch.Tensor, Sums]:
        """See `Objective.loss`."""
        chosen, rejected = self.answer_logps(logps)
        margin = self.beta * (chosen - rejected)
        preference = smoothed_sigmoid_loss(margin, self.label_smoothing)
        nll = nll_terms(logps, normaliser) if self.cpo_alpha else torch.zeros_like(chosen)
        per_pair = preference / normaliser.pairs + self.cpo_alpha * nll
        values = {
            "loss": per_pair * normaliser.pairs,
            "nll": nll * normaliser.pairs,
            "logps/chosen": chosen,
            "logps/rejected": rejected,
            "accuracies": (chosen > rejected).float(),
        }
        return (weights * per_pair).sum(), weighted_sums(weights, values)

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        """The metrics of TRL's CPOTrainer, except `logits/*`, which would need whole logits."""
        mean = averages(sums)
        return {"loss": mean["loss"], "nll_loss": mean["nll"], **reward_metrics(mean, self.beta)}
