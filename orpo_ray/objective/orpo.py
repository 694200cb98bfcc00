"""ORPO, https://arxiv.org/abs/2403.07691, equations 4 to 7. Pure functions of float32 tensors.

With mean_logp(y) the mean log-prob per token of an answer y:

    log odds(y) = mean_logp(y) - log(1 - exp(mean_logp(y)))
    loss = NLL(chosen) - beta * log sigmoid(log odds(chosen) - log odds(rejected))

With an image preference, for the chosen answer under its own image and under another one:

    loss += image_beta * -log sigmoid(log odds(chosen | image) - log odds(chosen | other image))
    loss += image_beta * -log sigmoid(log odds(chosen | image) - anchor), if there is an anchor

The first of these is mDPO's (2406.11839), with odds in place of ratios to a reference model. sigmoid(log odds(y)) is
exp(mean_logp(y)), so an anchor of 0 is the NLL of the response.

Legend: B pairs in a micro-batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F

from orpo_ray.config.field_types import OtherImage
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
_IMAGE_VALUES = ("image_margins", "image_accuracies", "image_log_odds_ratio")


@dataclass(frozen=True)
class ORPO:
    """NLL of the chosen answer plus beta times the odds-ratio loss; needs no reference model."""

    beta: float = 0.1
    """Weight of the odds-ratio term."""
    nll: Literal["response", "prompt+response"] = "response"
    """Tokens under the NLL term."""
    image_beta: float = 0.0
    """Weight of the image preference; 0 leaves it out."""
    other_image: OtherImage = "exchange"
    """Which other image the data holds for each pair; the loss does not depend on it."""
    anchor: float | None = None
    """Log odds that the chosen answer's own ones are to exceed; None leaves the term out."""

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
        if self.image_beta:
            image = self._image_preference(logps, chosen)
            per_pair = per_pair + self.image_beta * image.pop("loss") / normaliser.pairs
            values |= image | {"loss": per_pair * normaliser.pairs}
        return (weights * per_pair).sum(), weighted_sums(weights, values)

    def _image_preference(self, logps: PairLogps, chosen: torch.Tensor) -> dict[str, torch.Tensor]:
        """The image terms of each pair, and what its metrics need, all [B] and 0 for pairs without other images.

        The names do not depend on the batch, so that workers can add up their sums.

        Args:
            logps: of the pairs.
            chosen: mean log-probs of the chosen answers.
        """
        if logps.other is None or logps.other_tokens is None:
            zeros = torch.zeros_like(chosen)
            return dict.fromkeys(("loss", "image_pairs", *_IMAGE_VALUES), zeros)
        has_other = logps.other_tokens > 0
        other = logps.other / logps.other_tokens.clamp(min=1)
        odds_ratio = F.logsigmoid(log_odds(chosen) - log_odds(other))
        loss = -odds_ratio
        if self.anchor is not None:
            loss = loss - F.logsigmoid(log_odds(chosen) - self.anchor)
        values = (chosen - other, (chosen > other).float(), odds_ratio)
        named = {"loss": loss, "image_pairs": torch.ones_like(chosen), **dict(zip(_IMAGE_VALUES, values, strict=True))}
        return {name: torch.where(has_other, value, 0.0) for name, value in named.items()}

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        """The metrics of TRL's ORPOTrainer, except `logits/*`, which would need whole logits."""
        mean = averages(sums)
        return {
            "loss": mean["loss"],
            "nll_loss": mean["nll"],
            **reward_metrics(mean, self.beta),
            "log_odds_chosen": mean["log_odds_chosen"],
            "log_odds_ratio": mean["log_odds_ratio"],
            **(self._image_metrics(sums) if self.image_beta else {}),
        }

    def _image_metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Averages over the pairs with other images; only the fraction of such pairs where there are none."""
        pairs = sums["image_pairs"]
        fraction = {"image_pairs_fraction": pairs / max(sums["pairs"], 1.0)}
        if not pairs:
            return fraction
        margin, accuracy, odds_ratio = (sums[name] / pairs for name in _IMAGE_VALUES)
        return {
            "rewards/image_margins": self.beta * margin,
            "rewards/image_accuracies": accuracy,
            "image_log_odds_ratio": odds_ratio,
            **fraction,
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
