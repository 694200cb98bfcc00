"""CPO: the loss worked by hand, and equal to TRL's CPOTrainer."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from orpo_ray.objective.base import Normaliser
from orpo_ray.objective.cpo import CPO
from orpo_ray.objective.logps import PairLogps
from support.trl_reference import assert_equals_trl, concatenated_model, trl_trainer


def pairs(*values: tuple[float, float]) -> PairLogps:
    """Make pairs with these summed log-probs; chosen answers have 2 tokens, rejected ones 4."""
    chosen, rejected = (torch.tensor(column) for column in zip(*values, strict=True))
    two, four = torch.full_like(chosen, 2.0), torch.full_like(chosen, 4.0)
    return PairLogps(chosen, rejected, -chosen, two, four, two)


def test_by_hand() -> None:
    """logp(chosen) = -1, logp(rejected) = -1 - 2 ln 3; beta 0.5 makes the margin ln 3, whose sigmoid is 3/4.

    The preference loss is -ln(3/4) = 0.287682. The NLL is 1 nat over 2 tokens, 0.5, and cpo_alpha 2 doubles it.
    """
    objective = CPO(beta=0.5, cpo_alpha=2.0)
    loss, sums = objective.loss(pairs((-1.0, -1.0 - 2 * math.log(3))), torch.ones(1), Normaliser(1.0, 2.0))
    assert loss.item() == pytest.approx(0.2876821 + 2 * 0.5, abs=1e-6)
    assert objective.metrics({name: value.item() for name, value in sums.items()}) == pytest.approx(
        {
            "loss": 1.2876821,
            "nll_loss": 0.5,
            "rewards/chosen": -0.5,
            "rewards/rejected": -0.5 - 1.0986123,
            "rewards/accuracies": 1.0,
            "rewards/margins": 1.0986123,
            "logps/chosen": -1.0,
            "logps/rejected": -3.1972246,
        },
        abs=1e-6,
    )


def test_label_smoothing_by_hand() -> None:
    """The same margin; 0.9 * -ln(3/4) + 0.1 * -ln(1/4) = 0.258914 + 0.138629. Without the NLL nothing else is left."""
    objective = CPO(beta=0.5, cpo_alpha=0.0, label_smoothing=0.1)
    loss, _ = objective.loss(pairs((-1.0, -1.0 - 2 * math.log(3))), torch.ones(1), Normaliser(1.0, 2.0))
    assert loss.item() == pytest.approx(0.2589139 + 0.1386294, abs=1e-6)
    assert objective.nll_span == "none"


def test_micro_batches_add_up_and_dummy_pairs_count_for_nothing() -> None:
    """Two pairs, 4 NLL tokens: (-ln sigmoid(0.1) - ln sigmoid(-0.3)) / 2 + (1 + 4) / 4 = 0.749376 + 1.25."""
    whole, alone, padded = pairs((-1.0, -2.0), (-4.0, -1.0)), pairs((-1.0, -2.0)), pairs((-4.0, -1.0), (-9.0, -1.0))
    step = Normaliser(2.0, 4.0)
    expected, _ = CPO().loss(whole, torch.ones(2), step)
    assert expected.item() == pytest.approx(0.7493765 + 1.25, abs=1e-6)
    first, _ = CPO().loss(alone, torch.ones(1), step)
    second, _ = CPO().loss(padded, torch.tensor([1.0, 0.0]), step)
    torch.testing.assert_close(first + second, expected)


@pytest.mark.parametrize("logp", [0.0, -1e-6, -90.0, -1e4])
def test_values_and_gradients_are_finite(logp: float) -> None:
    values = torch.tensor([logp, -3.0], requires_grad=True)
    one = torch.ones(1)
    loss, _ = CPO().loss(PairLogps(values[:1], values[1:], -values[:1], one, one, one), one, Normaliser(1.0, 1.0))
    loss.backward()
    assert torch.isfinite(loss)
    assert values.grad is not None
    assert torch.isfinite(values.grad).all()


@pytest.mark.parametrize(
    "objective", [CPO(), CPO(0.3, 0.5, 0.1), CPO(0.3, 0.0)], ids=["defaults", "smoothed", "without NLL"]
)
def test_equals_trl(objective: CPO, tmp_path: Path) -> None:
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    model = concatenated_model()
    trainer = trl_trainer(
        CPOTrainer, CPOConfig, model, tmp_path, loss_type="sigmoid",
        beta=objective.beta, cpo_alpha=objective.cpo_alpha, label_smoothing=objective.label_smoothing,
    )  # fmt: skip
    assert_equals_trl(objective, trainer, model, [0, 1, 2])
