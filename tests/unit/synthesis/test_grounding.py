"""Scores by grounding: worked by hand, and with a model."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from orpo_ray.errors import RowError, UserError
from orpo_ray.synthesis.candidates import Candidate, as_pair
from orpo_ray.synthesis.labels.base import Answered, Tools
from orpo_ray.synthesis.labels.grounding import Grounding, grounding_score
from orpo_ray.synthesis.local_model import LocalModel
from support.synthesis import PlannedEngine, row_of
from support.tiny_runs import tiny_recipe

TEXTS = ("red", "a dark blue", "yes")


def test_the_score_by_hand() -> None:
    """p = 0.5 under the own image; 0.25 and 0.0625 under others, 0.15625 on average: log(0.5 / 0.15625) / 2 tokens."""
    found = grounding_score([math.log(0.5), math.log(0.25), math.log(0.0625)], 2)
    assert found == pytest.approx(math.log(0.5 / 0.15625) / 2)
    assert grounding_score([-3.0, -3.0, -3.0], 4) == pytest.approx(0.0)
    assert grounding_score([-900.0, -1800.0], 1) == pytest.approx(900.0)  # no underflow


@pytest.fixture(scope="module")
def label(tmp_path_factory: pytest.TempPathFactory) -> Grounding:
    recipe = tiny_recipe(tmp_path_factory.mktemp("x"), "x", synthesize={"other_images": 2})
    return Grounding(Tools(recipe, LocalModel(recipe), PlannedEngine(None)))


def part(numbers: list[int], texts: tuple[str, ...] = TEXTS) -> list[Answered]:
    return [Answered(row_of(number), [Candidate(text, seed=1) for text in texts]) for number in numbers]


def scores(found: list[Candidate] | RowError) -> list[float]:
    assert not isinstance(found, RowError)
    return [each.score or 0.0 for each in found]


def test_scores_are_differences_of_the_models_log_probs(label: Grounding) -> None:
    """With two rows, the other image is that of the other row; each answer is scored alone for comparison."""
    model, both = label._model, part([0, 1])
    found = label.score(both)
    for place, other in ((0, 1), (1, 0)):
        own_row, other_row = both[place].row, both[other].row
        for text, score in zip(TEXTS, scores(found[place]), strict=True):
            (own, shown) = model.logps(
                [as_pair(own_row, text, text), as_pair(replace(own_row, images=other_row.images), text, text)]
            )
            assert not isinstance(own, RowError)
            assert not isinstance(shown, RowError)
            assert score == pytest.approx((own.chosen - shown.chosen) / own.chosen_tokens, abs=1e-5)
    assert [each.seed for each in found[0]] == [1, 1, 1]  # type: ignore[union-attr]


def test_scores_do_not_depend_on_the_number_of_candidates_or_the_order_of_rows(label: Grounding) -> None:
    rows = part([0, 1, 2, 3])
    found = label.score(rows)
    again = label.score(rows[::-1])[::-1]
    for one, other in zip(found, again, strict=True):
        assert scores(one) == pytest.approx(scores(other), abs=1e-5)
    fewer = label.score(part([0, 1, 2, 3], TEXTS[:2]))
    assert scores(fewer[0]) == pytest.approx(scores(found[0])[:2], abs=1e-5)


def test_rows_without_other_images_have_no_scores(label: Grounding) -> None:
    same = label.score(part([0, 8]))  # the same color, so the same image
    assert [each.reason for each in same if isinstance(each, RowError)] == ["no_other_image"] * 2
    blind = Answered(replace(row_of(0), images=[]), [Candidate("a"), Candidate("b")])
    (found, *_) = label.score([blind, *part([1, 2])])
    assert isinstance(found, RowError)
    assert found.reason == "no_image"
    assert label.draws(blind.row) == 0
    assert label.draws(row_of(0)) == 4


def test_another_image_that_cannot_be_used_is_left_out(label: Grounding) -> None:
    """The row is scored by the other images that are left."""
    broken = Answered(replace(row_of(3), images=[{"bytes": b"no image", "path": None}]), part([3])[0].candidates)
    with_broken = label.score([*part([0, 1]), broken])  # two other images for each row: one of them is broken
    without = label.score(part([0, 1]))
    for found, wanted in zip(with_broken[:2], without, strict=True):
        assert scores(found) == pytest.approx(scores(wanted), abs=1e-5)
    assert isinstance(with_broken[2], RowError)
    assert with_broken[2].reason == "unreadable_image"
    (alone, _) = label.score([*part([0]), broken])
    assert isinstance(alone, RowError)
    assert alone.reason == "no_other_image"
    assert "unreadable_image" in alone.detail


def test_rows_without_two_candidates_are_not_scored(label: Grounding) -> None:
    found = label.score([*part([0], ()), *part([1], ("red",)), *part([2])])
    assert found[:2] == [[], [Candidate("red", seed=1)]]
    assert len(scores(found[2])) == 3


def test_a_missing_model_is_one_message(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, "x", synthesize={"model": str(tmp_path / "none")})
    with pytest.raises(UserError, match=r"synthesize\.model: the model cannot be loaded"):
        LocalModel(recipe).check()
