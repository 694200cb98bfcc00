"""Rows that share an image follow each other: whatever the window holds, and from any position."""

from __future__ import annotations

from collections.abc import Hashable
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orpo_ray.config.recipe import Recipe
from orpo_ray.data.bad_rows import BadRow
from orpo_ray.data.from_recipe import all_data, held_out_data, run_data
from orpo_ray.data.other_images import WindowPairs
from orpo_ray.data.pairs import PreferencePair
from orpo_ray.data.reading import pair_at
from orpo_ray.data.related_rows import grouped
from orpo_ray.data.shards import Shard
from support.sources import read_all, rows, spec_of, write_jsonl

# Number of the image and of the prompt of each row; -1 is a row without an image, None a bad row.
Content = tuple[int, int]
contents = st.lists(st.none() | st.tuples(st.integers(-1, 3), st.integers(0, 2)), max_size=14)


def window_of(contents: list[Content | None], first_sample: int) -> WindowPairs:
    shard = Shard("jsonl", "a.jsonl", 0, len(contents))
    found: WindowPairs = {}
    for place, content in enumerate(contents):
        sample_index, row_id = first_sample + place, f"r{place}"
        if content is None:
            found[sample_index] = shard, BadRow(sample_index, row_id, "f", "too_long", "")
            continue
        images = [] if content[0] < 0 else [{"bytes": b"%d" % content[0], "path": None}]
        prompt = [{"role": "user", "content": [{"type": "text", "text": str(content[1])}]}]
        found[sample_index] = shard, PreferencePair(row_id, images, prompt, "a", "b")
    return found


def runs(keys: list[Hashable]) -> list[Hashable]:
    return [key for key, _ in groupby(keys)]


@given(contents, st.integers(0, 99))
def test_rows_of_an_image_and_of_a_prompt_follow_each_other(contents: list[Content | None], first: int) -> None:
    window = window_of(contents, first)
    found = grouped(window, lambda shard: None)
    assert list(found) == list(window)
    of_row = {f"r{place}": content or ("bad", place) for place, content in enumerate(contents)}
    ids = [pair.id for _, pair in found.values()]
    assert sorted(ids) == sorted(of_row)
    assert all(pair.sample_index == index for index, (_, pair) in found.items() if isinstance(pair, BadRow))
    after = [of_row[each] for each in ids]
    # Rows without an image share their prompt.
    images: list[Hashable] = [content if content[0] in ("bad", -1) else content[0] for content in after]
    prompts: list[Hashable] = list(after)
    assert len(runs(images)) == len(set(images))
    assert len(runs(prompts)) == len(set(prompts))
    # The first of each come in the order of the window, and so do rows with the same image and prompt.
    before = [of_row[f"r{place}"] for place in range(len(contents))]
    assert list(dict.fromkeys(images)) == list(
        dict.fromkeys(content if content[0] in ("bad", -1) else content[0] for content in before)
    )
    for _, same in groupby(zip(after, ids, strict=True), key=lambda each: each[0]):
        places = [int(row_id[1:]) for _, row_id in same]
        assert places == sorted(places)


@given(st.permutations(range(8)))
def test_rows_that_share_nothing_keep_their_order(order: list[int]) -> None:
    window = window_of([(image, 0) for image in order], 5)
    assert grouped(window, lambda shard: None) == window


def vlfeedback_shaped(tmp_path: Path) -> list[str]:
    """Two files of rows about ten images, with two prompts, and two bad rows."""
    items: list[Any] = [
        row | {"images": [f"{i % 10}.png"], "prompt": f"q{i // 10 % 2}"} for i, row in enumerate(rows(38))
    ]
    items[7] = items[20] = "{broken"
    return [str(write_jsonl(tmp_path / f"{i}.jsonl", items[19 * i : 19 * i + 19])) for i in range(2)]


@pytest.mark.parametrize("seed", [0, None])
def test_the_order_is_the_same_from_any_position(tmp_path: Path, seed: int | None) -> None:
    """A resumed run starts within a window, a short one ends in one."""
    sources = vlfeedback_shaped(tmp_path)
    spec = spec_of(sources, seed=seed, window=16, group=True)
    whole = read_all(spec)
    assert [row["sample_index"] for row in whole] == list(range(38))
    plain = read_all(spec_of(sources, seed=seed, window=16))
    assert whole != plain
    for start in (0, 16, 32):
        assert sorted(row["id"] for row in whole[start : start + 16]) == sorted(
            row["id"] for row in plain[start : start + 16]
        )
    for position in (1, 15, 16, 21, 37):
        assert read_all(spec_of(sources, seed=seed, window=16, group=True, first_sample=position)) == whole[position:]
        assert read_all(spec_of(sources, seed=seed, window=16, group=True, end_sample=position)) == whole[:position]
    for row in whole:
        pair = pair_at(spec, row["sample_index"])[1]
        assert (pair.id, isinstance(pair, BadRow)) == (row["id"], row["bad"] is not None)
    assert [row["bad"]["sample_index"] for row in whole if row["bad"]] == [
        row["sample_index"] for row in whole if row["bad"]
    ]


def test_other_images_do_not_depend_on_it(tmp_path: Path) -> None:
    sources = vlfeedback_shaped(tmp_path)
    first, second = (
        {row["id"]: row["other"] for row in read_all(spec_of(sources, window=16, group=group, other_image="exchange"))}
        for group in (False, True)
    )
    assert first == second


def test_only_training_is_grouped(tmp_path: Path) -> None:
    """Held-out pairs are a random sample, and the data commands read the order of the files."""
    (source, held_out) = vlfeedback_shaped(tmp_path)
    recipe = Recipe.model_validate(
        {
            "name": "a",
            "model": {"id": "orpo-ray/tiny-smolvlm"},
            "data": {"train": source, "eval": held_out, "group": "auto"},
        }
    )
    train, evaluated = run_data(recipe)
    assert train.group
    assert evaluated is not None
    assert not evaluated.group
    assert not any(spec.group for spec in all_data(recipe) if spec is not None)
    alone = held_out_data(recipe)
    assert alone is not None
    assert not alone.group
