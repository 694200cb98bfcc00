"""Held-out rows are deterministic, about as many as requested, and share no image with the training rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orpo_ray.data.split import split_held_out
from orpo_ray.errors import UserError
from support.sources import read_all, spec_of, write_jsonl


def row(number: int, images: list[str], prompt: str = "") -> dict[str, Any]:
    answers = {"chosen": f"x{number}", "rejected": "y"}
    return {"id": f"r{number}", "prompt": prompt or f"q{number}", "images": images, **answers}


def ids(rows: list[dict[str, Any]]) -> set[str]:
    return {each["id"] for each in rows}


def images(rows: list[dict[str, Any]]) -> set[str]:
    return {image["path"] for each in rows for image in each["images"]}


@given(
    st.lists(st.lists(st.integers(0, 30), min_size=1, max_size=3), min_size=20, max_size=60),
    st.floats(0.1, 0.5),
    st.integers(1, 5),
)
@settings(deadline=None, max_examples=30)
def test_no_image_on_both_sides_and_no_row_lost(
    tmp_path_factory: pytest.TempPathFactory, sets: list[list[int]], share: float, window: int
) -> None:
    path = tmp_path_factory.mktemp("split") / "a.jsonl"
    write_jsonl(path, [row(number, [f"{image}.png" for image in chosen]) for number, chosen in enumerate(sets)])
    spec = spec_of([str(path)], window=window)
    try:
        train, held = split_held_out(spec, share)
    except UserError:  # one group contains nearly all rows
        return
    kept, out = read_all(train), read_all(held)
    assert not images(kept) & images(out)
    assert len(kept) + len(out) == len(sets)
    assert ids(kept) | ids(out) == {f"r{number}" for number in range(len(sets))}
    assert 0 < len(out) <= 1.5 * max(1, round(share * len(sets))) + 1


def test_the_fraction_is_met_and_stable(tmp_path: Path) -> None:
    rows = [row(number, [f"{number // 3}.png"]) for number in range(600)]
    spec = spec_of([str(write_jsonl(tmp_path / "a.jsonl", rows))])
    _, held = split_held_out(spec, 0.1)
    assert held.order.num_rows == 60
    first = ids(read_all(held))
    assert ids(read_all(split_held_out(spec, 0.1)[1])) == first
    # Additional rows change the selection little.
    more = [*rows, *(row(number, [f"{number // 3}.png"]) for number in range(600, 630))]
    (tmp_path / "longer").mkdir()
    (tmp_path / "a.jsonl").rename(tmp_path / "longer" / "old.jsonl")
    spec = spec_of([str(write_jsonl(tmp_path / "a.jsonl", more))])
    again = ids(read_all(split_held_out(spec, 0.1)[1]))
    assert len(first & again) >= 50


def test_a_copy_of_the_dataset_is_split_in_the_same_way(tmp_path: Path) -> None:
    """So that no pair that a model was trained on is held out on another machine."""
    rows = [row(number, [f"{number // 2}.png"]) for number in range(40)]
    held = []
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
        spec = spec_of([str(write_jsonl(tmp_path / folder / "a.jsonl", rows))])
        held.append(ids(read_all(split_held_out(spec, 0.2)[1])))
    assert held[0] == held[1]
    # Images of the same name in two folders are different images.
    both = spec_of([str(tmp_path / "here" / "a.jsonl"), str(tmp_path / "there" / "a.jsonl")])
    train, held_out = (read_all(part) for part in split_held_out(both, 0.025))
    assert len(held_out) == 2
    assert images(train) & images(held_out)
    # Which of them is held out depends on the order of the sources alone.
    turned = spec_of([str(tmp_path / "there" / "a.jsonl"), str(tmp_path / "here" / "a.jsonl")])
    other = read_all(split_held_out(turned, 0.025)[1])
    assert [row["source"].split("/")[-2] for row in (held_out[0], other[0])] == ["here", "there"]


def test_text_only_rows_with_one_prompt_stay_together_and_bad_rows_stay_in_training(tmp_path: Path) -> None:
    rows: list[Any] = [row(number, [], f"prompt {number // 2}") for number in range(40)]
    rows[7] = "{broken"
    train, held = split_held_out(spec_of([str(write_jsonl(tmp_path / "a.jsonl", rows))]), 0.2)
    prompts = [{json.dumps(each["prompt"]) for each in read_all(part) if each["prompt"]} for part in (train, held)]
    assert not prompts[0] & prompts[1]
    assert [each["bad"] is not None for each in read_all(train)].count(True) == 1
    assert not any(each["bad"] for each in read_all(held))


def test_all_other_rows_remain(tmp_path: Path) -> None:
    rows = [row(number, [f"{number}.png"]) for number in range(50)]
    train, held = (
        ids(read_all(part)) for part in split_held_out(spec_of([str(write_jsonl(tmp_path / "a.jsonl", rows))]), 0.2)
    )
    assert len(held) == 10
    assert train | held == {each["id"] for each in rows}
    assert not train & held


def test_rows_with_a_common_image_cannot_be_split(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [row(number, ["same.png"]) for number in range(10)])
    with pytest.raises(UserError, match="an image would be on both sides"):
        split_held_out(spec_of([str(path)]), 0.2)
