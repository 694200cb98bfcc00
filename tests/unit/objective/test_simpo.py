"""SimPO: the loss worked by hand, and equal to TRL's CPOTrainer with loss_type="simpo"."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from orpo_ray.objective.base import Normaliser
from orpo_ray.objective.logps import PairLogps
from orpo_ray.objective.simpo import SimPO
from support.trl_reference import assert_equals_trl, concatenated_model, trl_trainer


def pairs(*values: tuple[float, float]) -> PairLogps:
    """Make pairs with these mean log-probs; chosen answers have 2 tokens, rejected ones 4."""
    chosen, rejected = (torch.tensor(column) for column in zip(*values, strict=True))
    two, four = torch.full_like(chosen, 2.0), torch.full_like(chosen, 4.0)
    return PairLogps(2 * chosen, 4 * rejected, -2 * chosen, two, four, two)


def test_by_hand() -> None:
    """Means -1 and -1 - ln 3; beta 2 makes the margin 2 ln 3, and gamma ln 3 leaves ln 3, whose sigmoid is 3/4.

    The loss is -ln(3/4) = 0.287682. Rewards are beta times the means; gamma is in none of them.
    """
    objective = SimPO(beta=2.0, gamma=math.log(3))
    loss, sums = objective.loss(pairs((-1.0, -1.0 - math.log(3))), torch.ones(1), Normaliser(1.0))
    assert loss.item() == pytest.approx(0.2876821, abs=1e-6)
    assert objective.metrics({name: value.item() for name, value in sums.items()}) == pytest.approx(
        {
            "loss": 0.2876821,
            "rewards/chosen": -2.0,
            "rewards/rejected": -2.0 - 2.1972246,
            "rewards/accuracies": 1.0,
            "rewards/margins": 2.1972246,
            "logps/chosen": -1.0,
            "logps/rejected": -2.0986123,
        },
        abs=1e-6,
    )


def test_label_smoothing_by_hand() -> None:
    """The same margin ln 3; 0.9 * -ln(3/4) + 0.1 * -ln(1/4) = 0.258914 + 0.138629."""
    objective = SimPO(beta=2.0, gamma=math.log(3), label_smoothing=0.1)
    loss, _ = objective.loss(pairs((-1.0, -1.0 - math.log(3))), torch.ones(1), Normaliser(1.0))
    assert loss.item() == pytest.approx(0.2589139 + 0.1386294, abs=1e-6)


def test_micro_batches_add_up_and_dummy_pairs_count_for_nothing() -> None:
    """Means apart by 1 and -1; beta 2, gamma 1: (-ln sigmoid(1) - ln sigmoid(-3)) / 2 = (0.313262 + 3.048587) / 2."""
    alone, padded = pairs((-1.0, -2.0)), pairs((-2.0, -1.0), (-9.0, -1.0))
    first, _ = SimPO().loss(alone, torch.ones(1), Normaliser(2.0))
    second, _ = SimPO().loss(padded, torch.tensor([1.0, 0.0]), Normaliser(2.0))
    assert (first + second).item() == pytest.approx((0.3132617 + 3.0485874) / 2, abs=1e-6)


@pytest.mark.parametrize("logp", [0.0, -1e-6, -90.0, -1e4])
def test_values_and_gradients_are_finite(logp: float) -> None:
    values = torch.tensor([logp, -3.0], requires_grad=True)
    one = torch.ones(1)
    loss, _ = SimPO().loss(PairLogps(values[:1], values[1:], -values[:1], one, one, one), one, Normaliser(1.0))
    loss.backward()
    assert torch.isfinite(loss)
    assert values.grad is not None
    assert torch.isfinite(values.grad).all()


@pytest.mark.parametrize("objective", [SimPO(), SimPO(2.5, 0.5, 0.1)], ids=["defaults", "smoothed"])
def test_equals_trl(objective: SimPO, tmp_path: Path) -> None:
    """TRL reports an nll_loss of 0, since its trainer has the term and SimPO does not use it."""
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    model = concatenated_model()
    trainer = trl_trainer(
        CPOTrainer, CPOConfig, model, tmp_path, loss_type="simpo", cpo_alpha=0.0,
        beta=objective.beta, simpo_gamma=objective.gamma, label_smoothing=objective.label_smoothing,
    )  # fmt: skip
    assert_equals_trl(objective, trainer, model, [0, 1, 2], absent={"nll_loss"})
