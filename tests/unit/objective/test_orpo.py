"""The ORPO loss worked by hand, and its edge cases."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from orpo_ray.data.pair_index import PairIndex
from orpo_ray.objective.base import Normaliser
from orpo_ray.objective.logps import PairLogps, sum_by_pair
from orpo_ray.objective.orpo import ORPO, log1mexp, log_odds


def pair(chosen: float, rejected: float, tokens: int = 2, nll: float | None = None, nll_tokens: int = 2) -> PairLogps:
    """Make a pair whose answers have the given mean log-probs."""
    total = -chosen * tokens if nll is None else nll
    values = (chosen * tokens, rejected * tokens, total, tokens, tokens, nll_tokens)
    return PairLogps(*(torch.tensor([float(value)]) for value in values))


def test_by_hand() -> None:
    """p_chosen = 1/2 has odds 1, p_rejected = 1/4 odds 1/3: the log odds ratio is ln 3, its sigmoid 3/4.

    NLL of the chosen answer is ln 2. With beta 0.1 the loss is ln 2 - 0.1 * ln(3/4) = 0.693147 + 0.028768.
    """
    loss, sums = ORPO(0.1).loss(pair(math.log(0.5), math.log(0.25)), torch.ones(1), Normaliser(1.0))
    assert loss.item() == pytest.approx(0.6931472 + 0.0287682, abs=1e-6)
    metrics = ORPO(0.1).metrics({name: value.item() for name, value in sums.items()})
    assert metrics == pytest.approx(
        {
            "loss": 0.7219154,
            "nll_loss": 0.6931472,
            "rewards/chosen": -0.0693147,
            "rewards/rejected": -0.1386294,
            "rewards/accuracies": 1.0,
            "rewards/margins": 0.0693147,
            "logps/chosen": -0.6931472,
            "logps/rejected": -1.3862944,
            "log_odds_chosen": 1.0986123,
            "log_odds_ratio": -0.2876821,
        },
        abs=1e-6,
    )


def test_equal_answers_cost_beta_ln_2() -> None:
    loss, _ = ORPO(0.3).loss(pair(-0.7, -0.7), torch.ones(1), Normaliser(1.0))
    assert loss.item() == pytest.approx(0.7 + 0.3 * math.log(2), abs=1e-6)


def test_nll_over_tokens_of_the_step() -> None:
    """prompt+response: 6 nats over this pair's 3 tokens, in a step of 12 tokens and 4 pairs."""
    loss, _ = ORPO(0.4).loss(pair(-0.7, -0.7, nll=6.0, nll_tokens=3), torch.ones(1), Normaliser(4.0, 12.0))
    assert loss.item() == pytest.approx(6 / 12 + 0.4 * math.log(2) / 4, abs=1e-6)


def test_micro_batches_add_up_to_the_step() -> None:
    chosen, rejected = torch.tensor([-0.3, -1.0, -2.0]), torch.tensor([-0.5, -0.9, -0.1])
    tokens = torch.tensor([1.0, 2.0, 3.0])
    whole = PairLogps(chosen * tokens, rejected * tokens, -chosen * tokens, tokens, tokens, tokens)

    def part(rows: slice) -> PairLogps:
        return PairLogps(*(values[rows] for values in vars(whole).values() if values is not None))

    expected, _ = ORPO(0.2).loss(whole, torch.ones(3), Normaliser(3.0))
    parts = [
        ORPO(0.2).loss(part(rows), torch.ones(n), Normaliser(3.0))[0] for rows, n in ((slice(1), 1), (slice(1, 3), 2))
    ]
    torch.testing.assert_close(sum(parts), expected)


def test_dummy_pairs_count_for_nothing() -> None:
    two = PairLogps(
        *(
            torch.tensor([value, other])
            for value, other in zip((-1.0, -2.0, 1.0, 2.0, 2.0, 2.0), (-9.0, -1.0, 9.0, 2.0, 2.0, 2.0), strict=True)
        )
    )
    alone, sums_alone = ORPO(0.5).loss(
        PairLogps(*(values[:1] for values in vars(two).values() if values is not None)), torch.ones(1), Normaliser(1.0)
    )
    loss, sums = ORPO(0.5).loss(two, torch.tensor([1.0, 0.0]), Normaliser(1.0))
    assert loss == alone
    assert sums == sums_alone


@pytest.mark.parametrize("logp", [0.0, -1e-9, -6e-8, -1e-6, -1e-3, -0.6931472, -5.0, -90.0, -1e4])
def test_values_and_gradients_are_finite_everywhere(logp: float) -> None:
    for other in (0.0, -1.0, -1e4):
        for chosen, rejected in ((logp, other), (other, logp)):
            values = torch.tensor([chosen, rejected], requires_grad=True)
            ones = torch.ones(1)
            logps = PairLogps(values[:1], values[1:], -values[:1], ones, ones, ones)
            loss, sums = ORPO(0.1).loss(logps, ones, Normaliser(1.0))
            (gradient,) = torch.autograd.grad(loss, values)
            assert torch.isfinite(loss)
            assert torch.isfinite(gradient).all()
            assert all(torch.isfinite(value) for value in sums.values())


@given(st.floats(-60.0, -2e-6))
def test_log1mexp_against_double_precision(x: float) -> None:
    exact = torch.log(-torch.expm1(torch.tensor(x, dtype=torch.float64)))
    value = torch.tensor(x, dtype=torch.float32)
    # Rounding the input to float32 changes the result by 6e-8 |x| * 1 / |x|.
    torch.testing.assert_close(log1mexp(value).double(), exact, rtol=2e-6, atol=2e-7)


def test_log_odds_gradient_is_one_over_one_minus_p() -> None:
    mean_logp = torch.tensor([math.log(0.2)], requires_grad=True)
    log_odds(mean_logp).sum().backward()
    assert mean_logp.grad is not None
    assert mean_logp.grad.item() == pytest.approx(1 / 0.8, rel=1e-6)


def test_sums_by_pair() -> None:
    """Two pairs; chosen rows 0 and 1, rejected rows 2 and 3; the first token of row 0 is of the prompt."""
    logps = torch.tensor([-10.0, -1.0, -2.0, -4.0, -8.0])
    index, in_response = torch.tensor([0, 0, 1, 2, 3]), torch.tensor([False, True, True, True, True])
    sums = sum_by_pair(logps, index, in_response, PairIndex.separate(2, answers_per_pair=2))
    assert sums.chosen.tolist() == [-1.0, -2.0]
    assert sums.rejected.tolist() == [-4.0, -8.0]
    assert sums.nll.tolist() == [11.0, 2.0]
    assert sums.nll_tokens.tolist() == [2.0, 1.0]
    assert sums.chosen_tokens.tolist() == [1.0, 1.0]
