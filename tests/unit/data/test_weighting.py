"""Weights of languages and domains: exact counts in one order that does not depend on who reads it."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orpo_ray.config.recipe import Recipe
from orpo_ray.data import shards
from orpo_ray.data.from_recipe import all_data, held_out_data, run_data
from orpo_ray.data.groups import Grouping
from orpo_ray.data.order import Order
from orpo_ray.data.reading import ReadSpec, read_windows
from orpo_ray.data.weighting import weighted_by_group
from orpo_ray.errors import UserError
from support.sources import read_all, spec_of, write_jsonl
from support.tiny_runs import tiny_recipe

WORDS = {"en": "what is it", "ar": "ما هذا", "ja": "これは何"}


def rows(languages: list[str | None]) -> list[dict[str, Any]]:
    return [
        {"id": f"{language}-{place}", "prompt": f"{WORDS[language or 'en']} {place}", "chosen": "x", "rejected": "y",
         "lang": language, "kind": ("charts", "photos")[place % 2]}
        for place, language in enumerate(languages)
    ]  # fmt: skip


MIXED: list[str | None] = (["en"] * 6 + ["ar", "ja"] * 2) * 5  # 30 en, 10 ar, 10 ja


def recipe(tmp_path: Path, weights: dict[str, Any], languages: list[str | None] = MIXED, **data: Any) -> Recipe:
    path = write_jsonl(tmp_path / "pairs.jsonl", rows(languages))
    section = {"train": str(path), "language": "lang", "domain": "kind", "weights": weights, "shuffle_window": 7}
    return tiny_recipe(tmp_path, "run", data=section | data)


def training(recipe: Recipe) -> ReadSpec:
    """The training rows of a recipe, of any number of epochs."""
    return replace(run_data(recipe)[0], end_sample=1_000)


def counts(read: ReadSpec, epoch: int) -> Counter[str]:
    return Counter(row["language"] for row in read_all(read, epoch))


def test_an_epoch_holds_each_language_by_its_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "ROWS_PER_SHARD", 12)  # every shard holds all three
    read = training(recipe(tmp_path, {"language": {"ar": 3, "ja": 0.5}}))
    assert read.order.num_rows == 30 + 30 + 5
    seen: Counter[str] = Counter()
    for epoch in range(4):
        assert counts(read, epoch) == {"en": 30, "ar": 30, "ja": 5}
        seen.update(row["id"] for row in read_all(read, epoch))
    # Over four epochs, every row of a language was used equally often.
    used = {name: {seen[row["id"]] for row in rows(MIXED) if row["lang"] == name} for name in WORDS}
    assert used == {"en": {4}, "ar": {12}, "ja": {2}}


def test_weights_multiply_and_rows_without_a_name_count_once(tmp_path: Path) -> None:
    languages = [*MIXED, None, None]
    read = training(recipe(tmp_path, {"language": {"ar": 2}, "domain": {"charts": 2}}, languages))
    found = Counter((row["language"], row["domain"]) for row in read_all(read))
    # Arabic rows are all at even places, Japanese ones at odd places.
    assert found == {
        ("en", "charts"): 30, ("en", "photos"): 15, ("ar", "charts"): 40, ("ja", "photos"): 10, (None, "charts"): 2,
        (None, "photos"): 1,
    }  # fmt: skip


def test_weights_of_sources_multiply_with_those_of_languages(tmp_path: Path) -> None:
    other = write_jsonl(tmp_path / "other.jsonl", rows(["ar", "en"] * 4))
    train = {str(tmp_path / "pairs.jsonl"): 1, str(other): 2}
    read = training(recipe(tmp_path, {"language": {"ar": 3}}, train=train))
    found = Counter((row["language"], row["source"].split(":")[0]) for row in read_all(read))
    assert found[("ar", str(other))] == 4 * 2 * 3
    assert found[("en", str(other))] == 4 * 2
    assert found[("ar", str(tmp_path / "pairs.jsonl"))] == 10 * 3


def test_by_script(tmp_path: Path) -> None:
    read = training(recipe(tmp_path, {"language": {"Arabic": 2}}, language="script"))
    assert counts(read, 0) == {"Latin": 30, "Arabic": 20, "Japanese": 10}


def test_held_out_rows_and_data_commands_know_no_weights(tmp_path: Path) -> None:
    weighted = recipe(tmp_path, {"language": {"ar": 3}}, eval_fraction=0.2)
    plain = recipe(tmp_path, {}, eval_fraction=0.2)
    held_out, same = held_out_data(weighted), held_out_data(plain)
    assert held_out is not None
    assert same is not None
    assert held_out.digest == same.digest
    assert [row["id"] for row in read_all(held_out)] == [row["id"] for row in read_all(same)]
    assert sum(each.order.num_rows for each in all_data(weighted) if each) == 50
    # Training rows that were not held out are weighted.
    trained, rest = Counter(row["id"] for row in read_all(training(weighted))), {row["id"] for row in read_all(same)}
    assert not rest & set(trained)
    assert {count for row_id, count in trained.items() if row_id.startswith("ar")} == {3}
    assert {count for row_id, count in trained.items() if not row_id.startswith("ar")} == {1}


def test_names_that_no_row_has_and_weights_without_a_column_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"(?s)data\.weights\.language: no training row.*'sw'.*weight one of: en \(30 rows\)"
    ):
        run_data(recipe(tmp_path, {"language": {"sw": 2}}))
    for kind in ("language", "domain"):
        with pytest.raises(UserError, match=rf"weights\.{kind} needs data\.{kind}"):
            recipe(tmp_path, {kind: {"ar": 2}}, **{kind: None})
    with pytest.raises(UserError, match="greater than 0"):
        recipe(tmp_path, {"language": {"ar": 0}})


def test_the_order_is_a_function_of_seed_and_epoch_and_any_part_of_it_can_be_read(tmp_path: Path) -> None:
    weighted = recipe(tmp_path, {"language": {"ar": 3, "ja": 0.3}})
    read, again = training(weighted), training(weighted)
    whole = [row["id"] for epoch in range(3) for row in read_all(read, epoch)]
    assert whole == [row["id"] for epoch in range(3) for row in read_all(again, epoch)]
    assert read.digest == again.digest
    assert read.digest != run_data(recipe(tmp_path, {"language": {"ar": 2}}))[0].digest
    for first in (1, 40, 64, 90):
        part = replace(read, first_sample=first, end_sample=first + 33)
        tables = read_windows(part, part.order.windows(first, first + 33))
        found = [(row["sample_index"], row["id"]) for table in tables for row in table.to_pylist()]
        assert found == [(index, whole[index]) for index in range(first, first + 33)]


def test_every_window_has_its_share_of_each_language() -> None:
    """A shard is larger than a window; its rows are sorted by language."""
    order = Order((700, 300), 0, 100, (0, 1), (1.0, 2.0), stored_in=(0, 0))
    shares = [float((order.window(0, number).rows[:, 0] == 1).mean()) for number in range(10)]
    assert shares == pytest.approx([0.3] * 10, abs=0.011)


parts = st.lists(st.lists(st.integers(0, 9), min_size=2, max_size=2), min_size=1, max_size=5).filter(
    lambda sizes: all(sum(each[group] for each in sizes) for group in (0, 1))
)


@given(parts, st.none() | st.integers(0, 3), st.integers(1, 15), st.sampled_from([0.5, 1.0, 1.5, 2.0]))
def test_no_row_of_a_group_repeats_before_all_were_used(
    sizes: list[list[int]], seed: int | None, window: int, weight: float
) -> None:
    """Two groups whose rows are spread over the same stored shards."""
    flat = [(shard, group, size) for shard, each in enumerate(sizes) for group, size in enumerate(each)]
    order = Order(
        tuple(size for _, _, size in flat), seed, window, tuple(group for _, group, _ in flat), (1.0, weight),
        stored_in=tuple(shard for shard, _, _ in flat),
    )  # fmt: skip
    seen = {(place, row): 0 for place, (_, _, size) in enumerate(flat) for row in range(size)}
    for epoch in range(3):
        for number in range(order.windows_per_epoch):
            for place, row in order.window(epoch, number).rows.tolist():
                seen[place, row] += 1
        for group in (0, 1):
            used = [count for (place, _), count in seen.items() if flat[place][1] == group]
            assert max(used) - min(used) <= 1
    assert sum(seen.values()) == 3 * order.num_rows
    assert order.stored_rows.tolist() == [sum(each) for each in sizes]


def test_a_column_of_a_parquet_file_is_read_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = pa.Table.from_pylist(rows(MIXED)).append_column("images", pa.array([[b"x" * 1000]] * len(MIXED)))
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=20)
    read_columns: list[Any] = []
    whole = pq.ParquetFile.read_row_group
    monkeypatch.setattr(
        pq.ParquetFile, "read_row_group",
        lambda self, group, columns=None: read_columns.append(columns) or whole(self, group, columns),
    )  # fmt: skip
    spec = replace(spec_of([str(tmp_path)]), grouping=Grouping("lang", "kind"))
    read = weighted_by_group(spec, {"language": {"ja": 2}, "domain": {}})
    assert read_columns == [["lang"]] * 3
    assert read.order.num_rows == 60
    assert np.concatenate(list(read.row_indices.values())).shape == (50,)
    lacking = replace(spec, grouping=Grouping("tongue"))
    with pytest.raises(UserError, match="weight one of: none, as no row has one"):
        weighted_by_group(lacking, {"language": {"ja": 2}, "domain": {}})
