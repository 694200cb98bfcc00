"""The `Objective` protocol, which every loss implements, and functions that several losses use.

Legend: B pairs in a micro-batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Literal, Protocol

import torch
import torch.nn.functional as F

from orpo_ray.config.recipe import Recipe
from orpo_ray.errors import UserError
from orpo_ray.objective.logps import PairLogps

NllSpan = Literal["none", "response", "prompt+response"]
NllAverage = Literal["pair", "token"]
Sums = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Normaliser:
    """Divisors of the sums of a step, counted over all workers and micro-batches."""

    pairs: float
    """Pairs in the step, without dummy pairs."""
    nll_tokens: float | None = None
    """Tokens under the NLL term, if the objective averages it per token; None averages within each pair, then over
    pairs."""


class Objective(Protocol):
    """A preference loss. Implementations are frozen dataclasses whose fields are the loss's options.

    `orpo_ray.config.objectives` lists the objectives that a recipe can name.
    """

    @property
    def nll_span(self) -> NllSpan:
        """Tokens of the chosen sequence under the NLL term."""

    @property
    def nll_average(self) -> NllAverage:
        """How the NLL is averaged over a training step. Evaluation always averages it per pair."""

    @property
    def further_forwards(self) -> tuple[str, ...]:
        """Names of forward passes that the loss needs in addition to the policy's, such as a reference model's."""

    def answer_logps(self, logps: PairLogps) -> tuple[torch.Tensor, torch.Tensor]:
        """The log-probs by which the loss compares the chosen and the rejected answers, two float32 [B]."""

    def loss(self, logps: PairLogps, weights: torch.Tensor, normaliser: Normaliser) -> tuple[torch.Tensor, Sums]:
        """Compute the loss of one micro-batch.

        Args:
            logps: Sums of log-probs per pair, dummy pairs included.
            weights: [B], 1 for a pair and 0 for a dummy pair.
            normaliser: Totals of the whole step, so that the losses of its micro-batches add up to the step's loss.

        Returns:
            The loss, a scalar, and the sums over pairs that `metrics` needs: detached scalars by name, always the
            same names, `pairs` among them.
        """

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Turn sums over a step or an evaluation into averages, under TRL's names without a prefix."""


def load_objective(recipe: Recipe) -> Objective:
    """Build the objective that a recipe names, with the recipe's options.

    Raises:
        UserError: The objective needs forwards besides the policy's, which training does not run.
    """
    module, _, name = recipe.objective.implementation.partition(":")
    objective: Objective = getattr(import_module(module), name)(**recipe.objective_options)
    if objective.further_forwards:
        raise UserError(
            f"{name} needs further forwards ({', '.join(objective.further_forwards)}), which training does not run",
            field="objective",
            value=recipe.objective.name,
            fix="choose an objective without a reference model",
        )
    return objective


def mean_logps(logps: PairLogps) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs per token of the chosen and the rejected answers, two [B]."""
    return logps.chosen / logps.chosen_tokens, logps.rejected / logps.rejected_tokens


def smoothed_sigmoid_loss(margin: torch.Tensor, label_smoothing: float) -> torch.Tensor:
    """Negative log-probability, [B], that the labels are right, if each is wrong with this probability.

    Conservative DPO, https://ericmitchell.ai/cdpo.pdf, equation 3, on any margin [B].
    """
    return -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)


def nll_terms(logps: PairLogps, normaliser: Normaliser) -> torch.Tensor:
    """Each pair's term of the step's average NLL, [B]."""
    if normaliser.nll_tokens is None:
        return logps.nll / logps.nll_tokens / normaliser.pairs
    return logps.nll / normaliser.nll_tokens


def weighted_sums(weights: torch.Tensor, values: Mapping[str, torch.Tensor]) -> Sums:
    """Detached sums over pairs of per-pair values [B], and the number of pairs."""
    counted = {"pairs": torch.ones_like(weights), **values}
    return {name: (weights * value.detach()).sum() for name, value in counted.items()}


def averages(sums: Mapping[str, float]) -> dict[str, float]:
    """Sums over pairs -> averages over pairs."""
    pairs = max(sums["pairs"], 1.0)
    return {name: value / pairs for name, value in sums.items() if name != "pairs"}


def reward_metrics(mean: Mapping[str, float], beta: float) -> dict[str, float]:
    """TRL's metrics of the implicit rewards, beta * log-prob, from averages over pairs."""
    chosen, rejected = mean["logps/chosen"], mean["logps/rejected"]
    return {
        "rewards/chosen": beta * chosen,
        "rewards/rejected": beta * rejected,
        "rewards/accuracies": mean["accuracies"],
        "rewards/margins": beta * (chosen - rejected),
        "logps/chosen": chosen,
        "logps/rejected": rejected,
    }
