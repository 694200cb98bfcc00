"""Candidates of a row: how they are drawn, and which of them can be used."""

from __future__ import annotations

from orpo_ray.evaluation.draws import Draw, Drawn
from orpo_ray.synthesis.candidates import Candidate, draws_of, usable, with_answer
from support.tiny_runs import tiny_recipe


def test_draws_depend_on_seed_row_and_number_alone(tmp_path) -> None:  # type: ignore[no-untyped-def]
    config = tiny_recipe(tmp_path, "x", synthesize={"candidates": 5, "temperatures": [0, 0.7], "seed": 3}).synthesize
    found = draws_of("a", config)
    assert [draw.temperature for draw in found] == [0, 0.7, 0, 0.7, 0]
    assert len({draw.seed for draw in (*found, *draws_of("b", config))}) == 10
    assert all(0 <= draw.seed < 2**31 for draw in found)
    assert draws_of("a", config.model_copy(update={"candidates": 2})) == found[:2]
    assert draws_of("a", config.model_copy(update={"seed": 4}))[0].seed != found[0].seed


def test_empty_cut_off_and_repeated_answers_are_no_candidates() -> None:
    draws = [Draw(1.0, number) for number in range(5)]
    drawn = [Drawn("a", True), Drawn("", True), Drawn("b", False), Drawn("a", True), Drawn("b", True)]
    assert usable(draws, drawn) == [Candidate("a", "model", 1.0, 0), Candidate("b", "model", 1.0, 4)]


def test_the_given_answer_is_a_candidate_once() -> None:
    own = [Candidate("a", seed=1)]
    assert with_answer(own, "b") == [*own, Candidate("b", "given")]
    assert with_answer(own, "a") == with_answer(own, None) == own
    assert with_answer(own, "b")[1].as_json() == {"text": "b", "origin": "given"}
