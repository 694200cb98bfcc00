"""The language and the domain of rows, from the raw row to the encoded pair."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from orpo_ray.data.bad_rows import BadRow
from orpo_ray.data.encoded_columns import from_arrow, to_arrow
from orpo_ray.data.encoding import EncodedPair
from orpo_ray.data.from_recipe import all_data, encoder_of, held_out_data
from orpo_ray.data.groups import CHARACTERS, Grouping, column_value
from orpo_ray.data.pairs import PreferencePair
from orpo_ray.data.reading import pair_of
from orpo_ray.errors import UserError
from orpo_ray.streaming.pipeline import encode_rows
from support.sources import read_all, write_jsonl
from support.tiny_runs import tiny_recipe

ROWS = [
    {"prompt": "ما هذا؟", "chosen": "قطة", "rejected": "كلب", "lang": "ar", "topic": {"name": "pets"}},
    {"prompt": "これは何ですか", "chosen": "猫", "rejected": "犬", "lang": "ja"},
    {"prompt": "what is it?", "chosen": "a cat", "rejected": "a dog", "lang": "", "topic": 7},
]


def test_a_column_names_language_and_domain_of_every_row(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "pairs.jsonl", [*ROWS, {"prompt": "bad", "lang": "xx"}])
    data = {"train": str(path), "language": "lang", "domain": "topic"}
    read, _ = all_data(tiny_recipe(tmp_path, "run", data=data))
    pairs = list(map(pair_of, read_all(read)))
    assert [(pair.language, pair.domain) for pair in pairs if isinstance(pair, PreferencePair)] == [
        ("ar", '{"name": "pets"}'), ("ja", None), (None, "7"),
    ]  # fmt: skip
    assert isinstance(pairs[3], BadRow)


def test_by_script_and_without_groups(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "pairs.jsonl", ROWS)
    for language, expected in (("script", ["Arabic", "Japanese", "Latin"]), (None, [None] * 3)):
        data = {"train": str(path), "language": language}
        read, _ = all_data(tiny_recipe(tmp_path, "run", data=data))
        assert [row["language"] for row in read_all(read)] == expected


def test_a_column_that_no_training_source_has_is_refused(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "pairs.jsonl", ROWS)
    other = write_jsonl(tmp_path / "other.jsonl", [{"prompt": "q", "chosen": "a", "rejected": "b"}])
    for kind, hint in (("language", "give script, or one of: prompt"), ("domain", "give one of: prompt")):
        with pytest.raises(UserError, match=f"(?s)data.{kind}.*no training source has this column.*{hint}"):
            all_data(tiny_recipe(tmp_path, "run", data={"train": str(path), kind: "tongue"}))
    # Pairs that only are evaluated have no language there.
    recipe = tiny_recipe(tmp_path, "run", data={"train": str(path), "eval": str(other), "language": "lang"})
    held_out = held_out_data(recipe)
    assert held_out is not None
    assert [row["language"] for row in read_all(held_out)] == [None]


def test_groups_reach_encoded_pairs_and_bad_rows(tmp_path: Path) -> None:
    long = ROWS[0] | {"chosen": "ق" * 20_000}
    path = write_jsonl(tmp_path / "pairs.jsonl", [*ROWS, long])
    recipe = tiny_recipe(tmp_path, "run", data={"train": str(path), "language": "lang", "domain": "topic"})
    read, _ = all_data(recipe)
    items = encode_rows(read_all(read), encoder_of(recipe).build())
    good = [item for item in items if isinstance(item, EncodedPair)]
    assert [item.language for item in good] == ["ar", "ja", None]
    again = from_arrow(to_arrow([5, 6, 7], good))
    assert [(each.language, each.domain) for each in again] == [
        ("ar", '{"name": "pets"}'), ("ja", None), (None, "7"),
    ]  # fmt: skip
    (bad,) = [item for item in items if isinstance(item, BadRow)]
    assert (bad.reason, bad.language) == ("too_long", "ar")
    assert bad.as_line()["language"] == "ar"


def test_values_are_texts_of_bounded_length() -> None:
    assert column_value({"a": "x" * 100}, "a") == "x" * (CHARACTERS - 1) + "…"
    assert column_value({"a": "\ud800"}, "a") == "?"
    assert [column_value({"a": value}, "a") for value in (None, "", 0, ["é"])] == [None, None, "0", '["é"]']
    assert column_value({"a": 1}, None) is None
    assert Grouping("script").language_of({"script": "mine"}, [], "кот") == "Cyrillic"
    assert json.dumps(column_value({"a": {"b": object}}, "a"))
