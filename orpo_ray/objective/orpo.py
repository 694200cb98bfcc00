"""Per-token log-probs -> ORPO's loss and metrics. Pure functions of tensors, in float32.

ORPO: https://arxiv.org/abs/2403.07691, equations 4 to 7. With mean_logp(y) the mean log-probability per token of y:

    log odds(y) = mean_logp(y) - log(1 - exp(mean_logp(y)))
    loss = NLL(chosen) + beta * -log sigmoid(log odds(chosen) - log odds(rejected))

Legend: B pairs, M target tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F

# Below this distance from 0 a mean log-prob is treated as this far: 1 - exp(x) would round to 0 and its gradient,
# 1 / (1 - exp(x)), overflow. A probability of 0.999999 is as good as 1 for training.
_CLOSEST_TO_ZERO = -1e-6

# Names of the per-pair sums that metrics are made of, in the order in which they travel between workers.
SUM_NAMES = (
    "pairs",
    "loss",
    "nll",
    "logps/chosen",
    "logps/rejected",
    "accuracies",
    "log_odds_chosen",
    "log_odds_ratio",
)


@dataclass(frozen=True)
class Normaliser:
    """What a step's sums are divided by, over all workers and micro-batches.

    pairs: real pairs in the step. nll_tokens: tokens that the NLL covers, if it is averaged over tokens
    (`prompt+response`, as TRL does), else None: averaged per pair, then over pairs.
    """

    pairs: float
    nll_tokens: float | None = None


@dataclass(frozen=True)
class PairLogps:
    """Sums of log-probs per pair, each [B], float32, and their token counts.

    nll: over the tokens that the NLL term covers (a part of `prompt + chosen`).
    """

    chosen: torch.Tensor
    rejected: torch.Tensor
    nll: torch.Tensor
    chosen_tokens: torch.Tensor
    rejected_tokens: torch.Tensor
    nll_tokens: torch.Tensor


def log1mexp(x: torch.Tensor) -> torch.Tensor:
    """log(1 - exp(x)) for x <= 0, exact near 0 and far from it, its gradient finite at 0.

    https://cran.r-project.org/web/packages/Rmpfr/vignettes/log1mexp-note.pdf
    """
    x = x.clamp(max=_CLOSEST_TO_ZERO)
    near = x > -0.6931472
    # Each branch gets inputs on which its own gradient is finite: torch.where multiplies the other's by zero, and
    # zero times infinity is NaN.
    return torch.where(
        near, torch.log(-torch.expm1(torch.where(near, x, -1.0))), torch.log1p(-torch.exp(torch.where(near, -1.0, x)))
    )


def log_odds(mean_logps: torch.Tensor) -> torch.Tensor:
    """log(p / (1 - p)) of p = exp(mean_logps), [B]."""
    return mean_logps - log1mexp(mean_logps)


def sum_by_pair(
    logps: torch.Tensor, target_answer: torch.Tensor, target_in_response: torch.Tensor, num_pairs: int
) -> PairLogps:
    """Per-token log-probs [M] -> sums per pair. Answers 0..B-1 are chosen, B..2B-1 rejected."""
    logps, response = logps.float(), target_in_response.float()

    def by_answer(values: torch.Tensor) -> torch.Tensor:
        return values.new_zeros(2 * num_pairs).index_add(0, target_answer, values)

    chosen, rejected = by_answer(logps * response).chunk(2)
    chosen_tokens, rejected_tokens = by_answer(response).chunk(2)
    nll, _ = by_answer(logps).chunk(2)
    nll_tokens, _ = by_answer(torch.ones_like(logps)).chunk(2)
    return PairLogps(chosen, rejected, -nll, chosen_tokens, rejected_tokens, nll_tokens)


def orpo_loss(
    logps: PairLogps, weights: torch.Tensor, beta: float, normaliser: Normaliser
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """This micro-batch's part of the step's loss (parts add up), and the sums that metrics are made of.

    weights [B]: 1 for a pair, 0 for a dummy pair. The loss is a scalar; the sums are detached scalars by `SUM_NAMES`.
    """
    chosen = logps.chosen / logps.chosen_tokens
    rejected = logps.rejected / logps.rejected_tokens
    log_odds_chosen = log_odds(chosen) - log_odds(rejected)
    log_odds_ratio = F.logsigmoid(log_odds_chosen)
    if normaliser.nll_tokens is None:
        nll = logps.nll / logps.nll_tokens / normaliser.pairs
    else:
        nll = logps.nll / normaliser.nll_tokens
    per_pair = nll - beta * log_odds_ratio / normaliser.pairs
    loss = (weights * per_pair).sum()
    values = {
        "pairs": torch.ones_like(chosen),
        "loss": per_pair * normaliser.pairs,
        "nll": nll * normaliser.pairs,
        "logps/chosen": chosen,
        "logps/rejected": rejected,
        "accuracies": (chosen > rejected).float(),
        "log_odds_chosen": log_odds_chosen,
        "log_odds_ratio": log_odds_ratio,
    }
    return loss, {name: (weights * values[name].detach()).sum() for name in SUM_NAMES}


def metrics_from_sums(sums: Mapping[str, float], beta: float) -> dict[str, float]:
    """Sums over a step or an evaluation -> TRL's metrics (`logits/*` are left out: costly and of little use)."""
    pairs = max(sums["pairs"], 1.0)
    mean = {name: sums[name] / pairs for name in SUM_NAMES}
    chosen, rejected = mean["logps/chosen"], mean["logps/rejected"]
    return {
        "loss": mean["loss"],
        "nll_loss": mean["nll"],
        "rewards/chosen": beta * chosen,
        "rewards/rejected": beta * rejected,
        "rewards/accuracies": mean["accuracies"],
        "rewards/margins": beta * (chosen - rejected),
        "logps/chosen": chosen,
        "logps/rejected": rejected,
        "log_odds_chosen": mean["log_odds_chosen"],
        "log_odds_ratio": mean["log_odds_ratio"],
    }
