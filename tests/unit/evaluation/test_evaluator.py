"""Scoring of held-out pairs."""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa
import pytest
import torch

from orpo_ray.data.bad_rows import BadRow
from orpo_ray.data.balance import Packing
from orpo_ray.data.packing import PairBatch, build_batch
from orpo_ray.errors import UserError
from orpo_ray.evaluation.evaluator import GRAY, Scores, blanked, iter_pair_scores, score, with_pass
from orpo_ray.evaluation.summary import summarize
from orpo_ray.objective.base import Normaliser, Objective, Sums
from orpo_ray.objective.cpo import CPO
from orpo_ray.objective.logps import PairLogps
from orpo_ray.objective.orpo import ORPO
from orpo_ray.objective.simpo import SimPO
from orpo_ray.objective.step_planner import StepPlanner
from support.encoded_pairs import IMAGE, make

CPU = torch.device("cpu")
DUMMY = make([1], [2], [3], -1)
BAD = BadRow(3, "id", "file:3", "too_long", "x")


def correct(scores: Scores) -> dict[int, bool]:
    return dict(zip(*(scores.pairs[name].to_pylist() for name in ("sample_index", "correct")), strict=True))


def of(preferred: dict[int, bool]) -> Scores:
    """Scores with nothing but which pairs are right."""
    rows = [{"sample_index": index, "id": str(index), "correct": right} for index, right in preferred.items()]
    return Scores({}, pa.Table.from_pylist(rows))


def test_no_usable_pair_is_an_error_not_a_zero() -> None:
    planner = StepPlanner(ORPO(0.5), Packing(12, "concatenated"), DUMMY, DUMMY, CPU)
    with pytest.raises(UserError, match="none of the 3 held-out rows"):
        score(lambda batch: pytest.fail("nothing to score"), [planner.share([], [BAD] * 3)], planner)


def test_scores_average_over_pairs_and_gap_over_pairs_with_both() -> None:
    pairs = [make([1, 2], [3], [4], sample_index) for sample_index in range(5)]
    planner = StepPlanner(ORPO(0.5), Packing(12, "concatenated"), DUMMY, DUMMY, CPU)

    def forward(batch: PairBatch) -> PairLogps:
        """Sample s has log-probs -1 for the chosen answer and -(s + 0.5) / 2 for the rejected one."""
        chosen = -torch.ones(len(batch.sample_indices))
        rejected = -(torch.tensor(batch.sample_indices, dtype=torch.float) + 0.5) / 2
        ones = torch.ones(len(batch.sample_indices))
        return PairLogps(chosen, rejected, -chosen, ones, ones, ones)

    seen = score(forward, [planner.share(pairs[:3], [BAD]), planner.share(pairs[3:])], planner)
    assert seen.bad == [BAD]
    assert correct(seen) == {0: False, 1: False, 2: True, 3: True, 4: True}
    assert seen.metrics["rewards/accuracies"] == pytest.approx(0.6)
    assert seen.metrics["rewards/margins"] == pytest.approx(0.5 * (-1 + sum((s + 0.5) / 2 for s in range(5)) / 5))
    assert seen.metrics["nll_loss"] == pytest.approx(1.0)
    assert (seen.metrics["pairs"], seen.metrics["bad_rows"]) == (5, 1)
    for name in ("loss", "nll_loss", "rewards/margins", "log_odds_chosen"):
        assert sum(seen.pairs[name].to_pylist()) / 5 == pytest.approx(seen.metrics[name], rel=1e-6), name
    third = seen.pairs.slice(3, 1).to_pylist()[0]
    assert (third["sample_index"], third["id"], third["prompt_tokens"], third["chosen_tokens"]) == (3, "3", 2, 1)
    assert third["rewards/margins"] == pytest.approx(0.5 * (-1 + 3.5 / 2))
    compared = with_pass(seen, of({1: False, 2: False, 3: True, 4: False}), "exchanged")
    expected = {"rewards/accuracies_exchanged": 0.25, "grounding_gap": 0.5, "grounding_pairs": 4}
    assert compared.metrics == pytest.approx(seen.metrics | expected)
    assert compared.pairs["exchanged/correct"].to_pylist() == [None, False, False, True, False]
    nothing = with_pass(seen, of({7: True}), "exchanged")
    assert nothing.metrics == seen.metrics


@pytest.mark.parametrize("without", [0, 2, 4])
def test_a_pair_without_another_image_takes_no_metric_from_the_others(without: int) -> None:
    """Wherever it is among them: the columns are the same, in the same order, and null for this pair alone."""
    pairs = [make([1, 2], [3], [4], sample_index) for sample_index in range(5)]
    planner = StepPlanner(ORPO(0.5, image_beta=0.3), Packing(12, "concatenated"), DUMMY, DUMMY, CPU)

    def forward(batch: PairBatch) -> PairLogps:
        """Sample s has log-probs -1 for the chosen answer, and -(s + 0.5) / 2 under the other image."""
        samples, ones = torch.tensor(batch.sample_indices, dtype=torch.float), torch.ones(len(batch.sample_indices))
        has_other = (samples != without).float()
        return PairLogps(-ones, -2 * ones, ones, ones, ones, ones, -has_other * (samples + 0.5) / 2, has_other)

    found = score(forward, [planner.share(pairs[:3]), planner.share(pairs[3:])], planner)
    names = ["rewards/image_margins", "rewards/image_accuracies", "image_log_odds_ratio", "image_pairs_fraction"]
    assert found.pairs.column_names[-4:] == names
    figures = summarize(found.pairs).figures
    for name in names[:3]:
        values = found.pairs[name].to_pylist()
        assert [place for place, value in enumerate(values) if value is None] == [without]
        assert sum(value for value in values if value is not None) / 4 == pytest.approx(found.metrics[name], rel=1e-6)
        assert figures[name].value == pytest.approx(found.metrics[name], rel=1e-6)
        assert figures[name].pairs == 4
        assert figures[name].low < figures[name].value < figures[name].high
    assert figures["image_pairs_fraction"].value == pytest.approx(0.8)
    assert figures["rewards/accuracies"].pairs == figures["image_pairs_fraction"].pairs == 5


def test_blank_images_are_gray_and_have_as_many_tokens() -> None:
    batch = build_batch([make([1, IMAGE, 2], [3], [4], 5)], "response", "shared_prefix")
    found = blanked(batch)
    assert found.images["pixel_values"].eq(GRAY).all()
    assert found.images["pixel_values"].shape == batch.images["pixel_values"].shape
    assert found.input_ids is batch.input_ids
    assert batch.images["pixel_values"].eq(5).all()


def test_the_objective_says_which_answer_is_preferred() -> None:
    """Log-probs -2 over one token against -3 over two: the sum prefers the chosen answer, the mean the rejected one."""
    pairs = [make([1, 2], [3], [4, 4], 0)]

    def forward(batch: PairBatch) -> PairLogps:
        one, two = torch.ones(1), 2 * torch.ones(1)
        return PairLogps(-2 * one, -3 * one, 2 * one, one, two, one)

    def scores(objective: Objective) -> Scores:
        planner = StepPlanner(objective, Packing(12, "shared_prefix"), DUMMY, DUMMY, CPU)
        return score(forward, [planner.share(pairs)], planner)

    summed, averaged = scores(CPO(0.5)), scores(SimPO(2.0))
    assert (correct(summed), correct(averaged)) == ({0: True}, {0: False})
    assert (summed.metrics["rewards/margins"], summed.metrics["rewards/accuracies"]) == (0.5, 1.0)
    assert (averaged.metrics["rewards/margins"], averaged.metrics["rewards/accuracies"]) == (-1.0, 0.0)
    assert summed.metrics["nll_loss"] == 2.0
    assert "nll_loss" not in averaged.metrics


@dataclass(frozen=True)
class Branching(ORPO):
    """An objective that branches on its values, which cannot be vectorized."""

    def loss(self, logps: PairLogps, weights: torch.Tensor, normaliser: Normaliser) -> tuple[torch.Tensor, Sums]:
        assert bool((logps.chosen < 0).all())
        return super().loss(logps, weights, normaliser)


@pytest.mark.parametrize(
    "objective", [ORPO(0.5), CPO(0.3), SimPO(2.0), Branching(0.5)], ids=lambda each: type(each).__name__
)
def test_the_figures_of_a_pair_are_those_of_an_evaluation_of_it_alone(objective: Objective) -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = [torch.randint(1, 9, (7,), generator=generator).float() for _ in range(2)]
    logps = [-(0.1 + torch.rand(7, generator=generator)) * count for count in tokens]
    everything = PairLogps(*logps, -logps[0], *tokens, tokens[0])
    pairs = [make([1, 2], [3], [4], sample_index) for sample_index in range(6)]  # the last one is a dummy pair
    rows = list(iter_pair_scores(objective, everything, pairs))
    assert [row["sample_index"] for row in rows] == list(range(6))
    for place, row in enumerate(rows):
        alone = PairLogps(*(sums[place : place + 1] for sums in vars(everything).values() if sums is not None))
        _, sums = objective.loss(alone, torch.ones(1), Normaliser(1.0))
        expected = objective.metrics({name: float(value) for name, value in sums.items()})
        assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-6)
    assert list(iter_pair_scores(objective, everything, [])) == []
