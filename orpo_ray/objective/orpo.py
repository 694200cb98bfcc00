"""ORPO, https://arxiv.org/abs/2403.07691, equations 4 to 7. Pure functions of float32 tensors.

With mean_logp(y) the mean log-prob per token of an answer y:

    log odds(y) = mean_logp(y) - log(1 - exp(mean_logp(y)))
    loss = NLL(chosen) - beta * log sigmoid(log odds(chosen) - log odds(rejected))

Legend: B pairs in a micro-batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F

from orpo_ray.objective.base import (
    NllAverage,
    NllSpan,
    Normaliser,
    Sums,
    averages,
    mean_logps,
    nll_terms,
    reward_metrics,
    weighted_sums,
)
from orpo_ray.objective.logps import PairLogps

# Mean log-probs are clamped to this distance from 0. Closer to 0, 1 - exp(x) rounds to 0 and its gradient,
# 1 / (1 - exp(x)), overflows. Training cannot tell a probability of 0.999999 from 1.
_CLOSEST_TO_ZERO = -1e-6


@dataclass(frozen=True)
class ORPO:
    """NLL of the chosen answer plus beta times the odds-ratio loss; needs no reference model."""

    beta: float = 0.1
    """Weight of the odds-ratio term."""
    nll: Literal["response", "prompt+response"] = "response"
    """Tokens under the NLL term."""

    further_forwards: ClassVar[tuple[str, ...]] = ()

    @property
    def nll_span(self) -> NllSpan:
        """Scope of the NLL term, from the option `nll`."""
        return self.nll

    @property
    def nll_average(self) -> NllAverage:
        """Per token where prompts count, as TRL does; else per pair, as LLaMA-Factory does."""
        return "token" if self.nll == "prompt+response" else "pair"

    def answer_logps(self, logps: PairLogps) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean log-probs per token."""
        return mean_logps(logps)

    def loss(self, logps: PairLogps, weights: torch.Tensor, normaliser: Normaliser) -> tuple[torch.Tensor, Sums]:
        """See `Objective.loss`."""
        chosen, rejected = mean_logps(logps)
        log_odds_chosen = log_odds(chosen) - log_odds(rejected)
        log_odds_ratio = F.logsigmoid(log_odds_chosen)
        nll = nll_terms(logps, normaliser)
        per_pair = nll - self.beta * log_odds_ratio / normaliser.pairs
        values = {
            "loss": per_pair * normaliser.pairs,
            "nll": nll * normaliser.pairs,
            "logps/chosen": chosen,
            "logps/rejected": rejected,
            "accuracies": (chosen > rejected).float(),
            "log_odds_chosen": log_odds_chosen,
            "log_odds_ratio": log_odds_ratio,
        }
        return (weights * per_pair).sum(), weighted_sums(weights, values)

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        """The metrics of TRL's ORPOTrainer, except `logits/*`, which would need whole logits."""
        mean = averages(sums)
        return {
            "loss": mean["loss"],
            "nll_loss": mean["nll"],
            **reward_metrics(mean, self.beta),
            "log_odds_chosen": mean["log_odds_chosen"],
            "log_odds_ratio": mean["log_odds_ratio"],
        }


def log_odds(mean_logps: torch.Tensor) -> torch.Tensor:
    """log(p / (1 - p)) of p = exp(mean_logps), [B]."""
    return mean_logps - log1mexp(mean_logps)


def log1mexp(x: torch.Tensor) -> torch.Tensor:
    """log(1 - exp(x)) for x <= 0, accurate near 0 and far from 0, with a finite gradient at 0.

    https://cran.r-project.org/web/packages/Rmpfr/vignettes/log1mexp-note.pdf
    """
    x = x.clamp(max=_CLOSEST_TO_ZERO)
    near = x > -0.6931472
    # Each branch gets inputs on which its own gradient is finite: torch.where multiplies the gradient of the branch
    # not taken by zero, and zero times infinity is NaN.
    return torch.where(
        near, torch.log(-torch.expm1(torch.where(near, x, -1.0))), torch.log1p(-torch.exp(torch.where(near, -1.0, x)))
    )
