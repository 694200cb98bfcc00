"""Rows with several rated answers: which pairs they give, under which ids, and what they share."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from orpo_ray.config.field_types import PairsFromRanking
from orpo_ray.config.recipe import Recipe
from orpo_ray.data.bad_rows import BadRow
from orpo_ray.data.encoding import EncodedPair, PairEncoder
from orpo_ray.data.formats import to_pair
from orpo_ray.data.from_recipe import all_data, held_out_data, run_data
from orpo_ray.data.pairs import Ranking
from orpo_ray.data.ranking import rank_answers, split_ranking
from orpo_ray.data.reading import ReadSpec, pair_of
from orpo_ray.errors import RowError, UserError
from orpo_ray.processing.processor import load_processor
from orpo_ray.streaming.pipeline import encode_rows
from support.sources import read_all, spec_of, write_jsonl


def vlfeedback(ratings: list[str], image: str = "a.png", **others: Any) -> dict[str, Any]:
    """A row as the dataset stores it, with these ratings."""
    completions = [
        {"response": f"answer {place}", "annotations": {"Helpfulness": {"Rating": rating}}}
        for place, rating in enumerate(ratings, 1)
    ]
    return {"id": "row", "prompt": "What?", "img_path": image, "completions": completions} | others


def ids_of(row: dict[str, Any], kind: PairsFromRanking) -> list[str]:
    ranking = to_pair(row, "vlfeedback", {}, "f:1", kind).ranking
    return [each["id"] for each in split_ranking(stored(ranking))]


def stored(ranking: Ranking | None, **others: Any) -> dict[str, Any]:
    """A row of `reading.SCHEMA`, without its images and prompt."""
    row = {"id": "row", "sample_index": 3, "source": "f:1", "chosen": "x", "rejected": "y", "bad": None, "other": None}
    return row | {"language": None, "domain": None, "ranking": ranking and vars(ranking)} | others


def test_the_pairs_of_four_answers() -> None:
    """The first two are equally good, the last has no rating and is not counted."""
    row = vlfeedback(["4", "4", "5", "1", "N/A"])
    assert ids_of(row, "best_worst") == ["row"]
    assert ids_of(row, "best_rest") == ["row#3-1", "row#3-2", "row#3-4"]
    assert ids_of(row, "all") == ["row#3-1", "row#3-2", "row#3-4", "row#1-4", "row#2-4"]


def test_the_lowest_rank_of_nemo_rl_is_the_best() -> None:
    row = {"context": "What?", "completions": [{"rank": rank, "completion": f"c{rank}"} for rank in (2, 0, 1)]}
    ranking = to_pair(row, "nemo-rl", {}, "f:1", "all").ranking
    assert ranking is not None
    assert (ranking.better, ranking.worse) == ([1, 1, 2], [2, 0, 0])
    assert ranking.answers == ["c2", "c0", "c1"]


@given(st.lists(st.integers(0, 3), min_size=2, max_size=6).filter(lambda scores: len(set(scores)) > 1))
def test_every_two_answers_with_different_scores_are_a_pair_once(scores: list[int]) -> None:
    rated = [(float(score), f"a{place}") for place, score in enumerate(scores)]
    every, best = rank_answers(rated, "all"), rank_answers(rated, "best_rest")
    assert every is not None
    assert best is not None
    different = {(i, j) for i, one in enumerate(scores) for j, two in enumerate(scores) if one > two}
    found = list(zip(every.better, every.worse, strict=True))
    assert len(found) == len(different)
    assert set(found) == different
    assert set(best.better) == {scores.index(max(scores))}
    assert sorted(best.worse) == [place for place, score in enumerate(scores) if score < max(scores)]


def test_pairs_that_are_none_are_bad_rows_of_their_own() -> None:
    row = vlfeedback(["4", "3", "2"])
    row["completions"][1]["response"] = " "
    row["completions"][2]["response"] = "answer 1"
    with pytest.raises(RowError, match="equal"):
        to_pair(row, "vlfeedback", {}, "f:1", "all")
    row["completions"][2]["response"] = "answer 3"
    row["completions"].append({"response": "answer 1", "annotations": {"Helpfulness": {"Rating": "2.5"}}})
    ranking = to_pair(row, "vlfeedback", {}, "f:1", "all").ranking
    assert ranking is not None
    whole = stored(ranking, language="ar", domain="charts")
    bad = {each["id"]: BadRow(**each["bad"]) for each in split_ranking(whole) if each["bad"]}
    assert {row_id: each.reason for row_id, each in bad.items()} == {
        "row#1-2": "empty_response", "row#1-4": "identical_responses",
        "row#2-4": "empty_response", "row#2-3": "empty_response",
    }  # fmt: skip
    assert all((each.sample_index, each.language, each.domain) == (3, "ar", "charts") for each in bad.values())


@pytest.mark.parametrize(("images", "contrasted"), [([{"path": "b.png"}], {"row#1-2", "row#1-3"}), (None, None)])
def test_images_of_another_row_contrast_the_best_answer_only(
    images: list[Any] | None, contrasted: set[str] | None
) -> None:
    """They were chosen for it; changes of the row's own images suit every answer."""
    ranking = to_pair(vlfeedback(["4", "3", "2"]), "vlfeedback", {}, "f:1", "all").ranking
    other = {"images": images, "image_root": None, "change": None if images else "crop", "seed": 0}
    assert ranking is not None
    found = {
        each["id"]: each["other"] for each in split_ranking(stored(ranking, chosen=ranking.answers[0], other=other))
    }
    assert set(found) == {"row#1-2", "row#1-3", "row#2-3"}
    assert {name for name, each in found.items() if each == other} == (contrasted or set(found))


@pytest.mark.parametrize(("answer", "reason"), [("\ud800", "malformed_row"), (5, "malformed_row")])
def test_an_answer_between_that_is_no_text(answer: Any, reason: str) -> None:
    row = vlfeedback(["4", "3", "2"])
    row["completions"][1]["response"] = answer
    with pytest.raises(RowError) as refused:
        to_pair(row, "vlfeedback", {}, "f:1", "all")
    assert refused.value.reason == reason
    assert to_pair(row, "vlfeedback", {}, "f:1").ranking is None, "the best and the worst are a pair"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    for name, color in (("a.png", "red"), ("b.png", "blue")):
        Image.new("RGB", (40, 30), color).save(tmp_path / name)
    items = [vlfeedback(["4", "3", "1"], "a.png"), vlfeedback(["1", "2"], "b.png", id="two"), "{broken"]
    return write_jsonl(tmp_path / "rows.jsonl", items)


def ranked(source: Path, **changes: Any) -> ReadSpec:
    return spec_of([str(source)], format_names=("vlfeedback",), pairs_from_ranking="all", seed=None, **changes)


def test_a_row_is_encoded_once_for_all_its_pairs(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = PairEncoder(load_processor("orpo-ray/tiny-smolvlm", None), 256)
    prompts: list[int] = []
    encode = encoder.prompts.encode
    monkeypatch.setattr(encoder.prompts, "encode", lambda given: prompts.append(len(given)) or encode(given))
    rows = [pair for row in read_all(ranked(source, other_image="crop")) for pair in split_ranking(row)]
    assert [row["id"] for row in rows[:4]] == ["row#1-2", "row#1-3", "row#2-3", "two#2-1"]
    assert [row["sample_index"] for row in rows] == [0, 0, 0, 1, 2]
    found = encode_rows(rows, encoder)
    assert isinstance(found[4], BadRow)
    assert sum(prompts) == 4, "two images, and as many other ones"
    first, second, third = (pair for pair in found[:3] if isinstance(pair, EncodedPair))
    for one, other in ((first, second), (first, third)):
        assert one.images["pixel_values"] is other.images["pixel_values"]
        assert one.prompt_ids is other.prompt_ids
        assert one.other_prompt is other.other_prompt
    assert first.chosen_ids.tolist() == second.chosen_ids.tolist()
    assert first.rejected_ids.tolist() == third.chosen_ids.tolist()
    alone = [encode_rows([replace_other(row)], encoder)[0] for row in rows[:4]]
    for pair, single in zip(found[:4], alone, strict=True):
        assert isinstance(pair, EncodedPair)
        assert isinstance(single, EncodedPair)
        assert (pair.id, pair.chosen_ids.tolist()) == (single.id, single.chosen_ids.tolist())
        assert (pair.images["pixel_values"] == single.images["pixel_values"]).all()


def replace_other(row: dict[str, Any]) -> dict[str, Any]:
    return row | {"other": None}


def test_only_training_rows_give_several_pairs(source: Path) -> None:
    data = {"train": str(source), "eval": str(source), "pairs_from_ranking": "all"}
    recipe = Recipe.model_validate({"name": "a", "model": {"id": "orpo-ray/tiny-smolvlm"}, "data": data})
    train, evaluated = run_data(recipe)
    rows = read_all(train)
    assert sum(row["ranking"] is not None for row in rows) == 2
    others = [evaluated, held_out_data(recipe), *all_data(recipe)]
    assert len(others) == 4
    for spec in others:
        assert spec is not None
        assert all(row["ranking"] is None for row in read_all(spec))
        assert pair_of(read_all(replace(spec, order=train.order))[0]).id


def test_rows_without_ratings_are_refused(tmp_path: Path) -> None:
    row = {"prompt": "q", "chosen": "x", "rejected": "y", "images": []}
    data = {"train": str(write_jsonl(tmp_path / "a.jsonl", [row])), "pairs_from_ranking": "best_rest"}
    recipe = Recipe.model_validate({"name": "a", "model": {"id": "orpo-ray/tiny-smolvlm"}, "data": data})
    with pytest.raises(UserError, match=r"data.pairs_from_ranking.*the formats are trl"):
        run_data(recipe)
