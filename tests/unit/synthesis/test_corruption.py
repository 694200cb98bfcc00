"""Worse answers that are made on purpose."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orpo_ray.data.prompt_rows import PromptRow
from orpo_ray.errors import RowError
from orpo_ray.evaluation.draws import Draw
from orpo_ray.synthesis.candidates import Candidate
from orpo_ray.synthesis.labels.base import Answered, Tools
from orpo_ray.synthesis.labels.corruption import Corruption
from orpo_ray.synthesis.local_model import LocalModel
from support.synthesis import PlannedEngine, picture, row_of
from support.tiny_runs import tiny_recipe


def label(tmp_path: Path, answer: Any = None, **fields: Any) -> tuple[Corruption, PlannedEngine]:
    engine = PlannedEngine(answer)
    recipe = tiny_recipe(tmp_path, "x", synthesize={"label": "corruption", **fields})
    return Corruption(Tools(recipe, LocalModel(recipe), engine)), engine


def test_the_given_answer_against_a_reworded_one(tmp_path: Path) -> None:
    made, engine = label(tmp_path)
    rows = [row_of(0, "It is red."), row_of(1, "Two dogs on the left."), row_of(2, "Nothing.")]
    assert [made.draws(row) for row in rows] == [0, 0, 0]
    found = made.score([Answered(row, []) for row in rows])
    good, wrong = found[0]  # type: ignore[misc]
    assert (good.text, good.origin, good.score) == ("It is red.", "given", 1.0)
    assert (wrong.origin, wrong.score) == ("changed", 0.0)
    assert wrong.note.startswith("color: red -> ")
    assert wrong.text == f"It is {wrong.note.removeprefix('color: red -> ')}."
    assert isinstance(found[2], RowError)
    assert found[2].reason == "nothing_to_corrupt"
    assert not engine.asked
    assert made.score([Answered(row, []) for row in rows])[:2] == found[:2]  # the same each time
    kinds = {made.score([Answered(row_of(number, "Two dogs on the left."), [])])[0][1].note.partition(":")[0]  # type: ignore[index]
             for number in range(40)}  # fmt: skip
    assert kinds == {"object", "count", "place"}


def test_without_an_answer_the_first_candidate_is_the_good_one(tmp_path: Path) -> None:
    made, _ = label(tmp_path, candidates=1)
    row = row_of(0)
    assert made.draws(row) == 1
    found = made.score([Answered(row, [Candidate("a red one", seed=5)]), Answered(row, [])])
    assert found[0][0] == Candidate("a red one", seed=5, score=1.0)  # type: ignore[index]
    assert isinstance(found[1], RowError)
    assert found[1].reason == "one_answer"


@pytest.mark.parametrize("kind", ["crop", "noise", "blank"])
def test_an_answer_to_a_degraded_image(tmp_path: Path, kind: str) -> None:
    seen: list[tuple[PromptRow, Draw]] = []

    def answer(row: PromptRow, draw: Draw) -> str:
        seen.append((row, draw))
        return "red" if row.id == "r0" else "gray"

    made, _ = label(tmp_path, answer, corruptions=[kind], temperatures=[0.5])
    rows = [row_of(0, "red"), row_of(1, "green")]
    found = made.score([Answered(row, []) for row in rows])
    assert isinstance(found[0], RowError), "the model gave the same answer"
    wrong = found[1][1]
    assert (wrong.text, wrong.note, wrong.temperature, wrong.score) == ("gray", f"image: {kind}", 0.0, 0.0)
    assert wrong.seed == seen[1][1].seed
    if kind != "crop":  # a part of one color looks like the whole
        assert seen[1][0].images[0]["bytes"] != picture("green")
    assert rows[1].images[0]["bytes"] == picture("green")


def test_a_degraded_image_is_answered_by_the_most_likely_tokens(tmp_path: Path) -> None:
    """A sampled answer may name the same thing otherwise, which is not wrong."""
    made, _ = label(tmp_path, lambda row, draw: "red" if draw.temperature == 0 else "crimson", corruptions=["noise"])
    (found,) = made.score([Answered(row_of(0, "red"), [])])
    assert isinstance(found, RowError)
    assert found.reason == "nothing_to_corrupt"


def test_the_same_answer_to_a_degraded_image_leads_to_the_next_change(tmp_path: Path) -> None:
    made, _ = label(tmp_path, lambda row, draw: "It is red.", corruptions=["noise", "color"])
    found = made.score([Answered(row_of(number, "It is red."), []) for number in range(8)])
    assert all(each[1].note.startswith("color: red -> ") for each in found)  # type: ignore[index]


def test_an_image_that_cannot_be_decoded_costs_its_own_row(tmp_path: Path) -> None:
    made, _ = label(tmp_path, lambda row, draw: "gray", corruptions=["blank"])
    broken = replace(row_of(0, "red"), images=[{"bytes": b"no image", "path": None}])
    lost, found = made.score([Answered(broken, []), Answered(row_of(1, "green"), [])])
    assert isinstance(lost, RowError)
    assert found[1].text == "gray"  # type: ignore[index]


def test_changes_are_tried_until_one_applies(tmp_path: Path) -> None:
    made, _ = label(tmp_path, lambda row, draw: "blurred", corruptions=["count", "noise", "place"])
    found = made.score([Answered(row_of(number, "It is red."), []) for number in range(8)])
    assert {each[1].note for each in found} == {"image: noise"}  # type: ignore[index]
