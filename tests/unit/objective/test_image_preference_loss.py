"""The image preference of ORPO worked by hand, and its edge cases."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from orpo_ray.data.pair_index import PairIndex
from orpo_ray.objective.base import Normaliser
from orpo_ray.objective.logps import PairLogps, sum_by_pair
from orpo_ray.objective.orpo import ORPO

# Probabilities per token: chosen 1/2 (odds 1), rejected 1/4 (odds 1/3), chosen under the other image 1/4.
HALF, QUARTER = math.log(0.5), math.log(0.25)
PLAIN = 0.6931472 + 0.1 * 0.2876821  # NLL, and beta times -ln(3/4)


def pair(other: float | None = QUARTER, chosen: float = HALF) -> PairLogps:
    """Make a pair of three tokens per answer with these mean log-probs; None if it has no other image."""
    values = (3 * chosen, 3 * QUARTER, -3 * chosen, 3, 3, 3, 0 if other is None else 3 * other, 3 * (other is not None))
    return PairLogps(*(torch.tensor([float(value)]) for value in values))


def both(one: PairLogps, two: PairLogps) -> PairLogps:
    return PairLogps(*(torch.cat(each) for each in zip(vars(one).values(), vars(two).values(), strict=True)))


def test_by_hand() -> None:
    """The log odds ratio of the images is ln 3, its sigmoid 3/4: 0.2 * -ln(3/4) is added."""
    objective = ORPO(0.1, image_beta=0.2)
    loss, sums = objective.loss(pair(), torch.ones(1), Normaliser(1.0))
    assert loss.item() == pytest.approx(PLAIN + 0.2 * 0.2876821, abs=1e-6)
    metrics = objective.metrics({name: value.item() for name, value in sums.items()})
    assert metrics["loss"] == pytest.approx(loss.item())
    assert metrics["rewards/image_margins"] == pytest.approx(0.1 * math.log(2), abs=1e-6)
    assert metrics["rewards/image_accuracies"] == 1.0
    assert metrics["image_log_odds_ratio"] == pytest.approx(math.log(0.75), abs=1e-6)
    assert metrics["image_pairs_fraction"] == 1.0


def test_the_anchor_by_hand() -> None:
    """Log odds 0 against an anchor of ln 3: sigmoid(-ln 3) is 1/4, and 0.2 * ln 4 is added."""
    loss, _ = ORPO(0.1, image_beta=0.2, anchor=math.log(3)).loss(pair(), torch.ones(1), Normaliser(1.0))
    assert loss.item() == pytest.approx(PLAIN + 0.2 * (0.2876821 + 1.3862944), abs=1e-6)


def test_an_anchor_of_0_is_the_nll_of_the_response() -> None:
    """-log sigmoid(log(p / (1 - p))) is -log p."""
    with_anchor, without = (ORPO(0.1, image_beta=0.2, anchor=anchor) for anchor in (0.0, None))
    one, two = (each.loss(pair(), torch.ones(1), Normaliser(1.0))[0] for each in (with_anchor, without))
    assert (one - two).item() == pytest.approx(0.2 * math.log(2), abs=1e-6)


def test_gradients_by_hand() -> None:
    """d log odds / d mean_logp is 1 / (1 - p): 2 at p = 1/2, 4/3 at p = 1/4.

    Image term: -(1 - 3/4) * 2 = -1/2 for the chosen answer, (1 - 3/4) * 4/3 = 1/3 under the other image.
    Anchor of ln 3: -(1 - 1/4) * 2 = -3/2.
    """
    means = torch.tensor([HALF, QUARTER], requires_grad=True)
    fixed = pair()
    logps = replace(fixed, chosen=3 * means[:1], other=3 * means[1:])
    of_terms = []
    for anchor in (None, math.log(3)):
        loss = ORPO(0.0, image_beta=1.0, anchor=anchor).loss(logps, torch.ones(1), Normaliser(1.0))[0]
        of_terms.append(torch.autograd.grad(loss, means, retain_graph=True)[0].tolist())
    assert of_terms[0] == pytest.approx([-0.5, 1 / 3], abs=1e-6)
    assert of_terms[1] == pytest.approx([-2.0, 1 / 3], abs=1e-6)


def test_a_pair_without_other_images_has_no_term() -> None:
    """A step of two pairs: the term of the one is divided by two pairs, its metrics by one."""
    objective = ORPO(0.1, image_beta=0.2, anchor=1.0)
    alone, _ = objective.loss(pair(), torch.ones(1), Normaliser(2.0))
    without, sums_without = objective.loss(pair(None), torch.ones(1), Normaliser(2.0))
    assert without.item() == pytest.approx(PLAIN / 2, abs=1e-6)
    loss, sums = objective.loss(both(pair(), pair(None)), torch.ones(2), Normaliser(2.0))
    torch.testing.assert_close(loss, alone + without)
    metrics = objective.metrics({name: value.item() for name, value in sums.items()})
    assert metrics["rewards/image_margins"] == pytest.approx(0.1 * math.log(2), abs=1e-6)
    assert metrics["image_pairs_fraction"] == 0.5
    no_image = objective.metrics({name: value.item() for name, value in sums_without.items()})
    assert no_image["image_pairs_fraction"] == 0.0
    assert "rewards/image_margins" not in no_image


def test_the_names_of_sums_do_not_depend_on_the_batch() -> None:
    """Workers add up their sums by place."""
    objective = ORPO(0.1, image_beta=0.2)
    plain = replace(pair(), other=None, other_tokens=None)
    sums = [objective.loss(logps, torch.ones(1), Normaliser(1.0))[1] for logps in (pair(), plain)]
    assert list(sums[0]) == list(sums[1])
    assert float(sums[1]["image_pairs"]) == 0.0


def test_without_weight_nothing_changes() -> None:
    """Loss and sums are bit-equal to those of a pair that has no other images."""
    plain = replace(pair(), other=None, other_tokens=None)
    (loss, sums), (expected, expected_sums) = (
        objective.loss(logps, torch.ones(1), Normaliser(1.0))
        for objective, logps in ((ORPO(0.1, image_beta=0.0, anchor=1.0), pair()), (ORPO(0.1), plain))
    )
    assert torch.equal(loss, expected)
    assert sums == expected_sums


@pytest.mark.parametrize("chosen", [0.0, -1e-9, -6e-8, -0.6931472, -90.0, -1e4])
@pytest.mark.parametrize("other", [0.0, -1e-9, -1.0, -1e4, None])
def test_values_and_gradients_are_finite_everywhere(chosen: float, other: float | None) -> None:
    logps = pair(other, chosen)
    values = torch.stack([logps.chosen[0], logps.other[0]]).requires_grad_()  # type: ignore[index]
    logps = replace(logps, chosen=values[:1], other=values[1:])
    loss, sums = ORPO(0.1, image_beta=1.0, anchor=2.0).loss(logps, torch.ones(1), Normaliser(1.0))
    (gradient,) = torch.autograd.grad(loss, values)
    assert torch.isfinite(loss)
    assert torch.isfinite(gradient).all()
    assert all(torch.isfinite(value) for value in sums.values())


def test_sums_by_pair_of_three_answers() -> None:
    """Two pairs, of which the second has other images."""
    logps = torch.tensor([-1.0, -2.0, -4.0, -8.0, -16.0, -32.0])
    answers = torch.tensor([0, 1, 2, 3, 5, 5])
    in_response = torch.ones(6, dtype=torch.bool)
    sums = sum_by_pair(logps, answers, in_response, PairIndex.separate(2, answers_per_pair=3))
    assert sums.other is not None
    assert sums.other_tokens is not None
    assert sums.chosen.tolist() == [-1.0, -2.0]
    assert sums.nll.tolist() == [1.0, 2.0]
    assert sums.other.tolist() == [0.0, -48.0]
    assert sums.other_tokens.tolist() == [0.0, 2.0]
