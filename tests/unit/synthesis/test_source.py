"""Rows in parts, and what is held out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from orpo_ray.data.bad_rows import BadRow
from orpo_ray.data.prompt_rows import PromptRow
from orpo_ray.data.shards import ShardReader
from orpo_ray.errors import UserError
from orpo_ray.synthesis.held_out import held_out_keys
from orpo_ray.synthesis.source import SourceRows, content_keys, source_rows
from orpo_ray.tiny_models.easy_vqa import easy_vqa_rows
from support.synthesis import synthesis_recipe, write_questions
from support.tiny_runs import tiny_recipe, write_pairs


def ids(source: SourceRows, part: int, reader: ShardReader | None = None) -> list[str]:
    return [row.id for row in source.read(part, reader or ShardReader())]


def test_parts_divide_all_rows_and_are_the_same_in_any_order(tmp_path: Path) -> None:
    path = write_questions(tmp_path, 37)
    write_questions(tmp_path / "more", 20, first=100)
    recipe = synthesis_recipe(tmp_path, "x", tmp_path, rows_per_part=8, seed=1)
    source = source_rows(recipe)
    assert (source.num_rows, source.num_parts, source.formats) == (57, 8, ["question"])
    parts = [ids(source, part) for part in range(8)]
    assert [len(part) for part in parts] == [8] * 7 + [1]
    every = [row_id for part in parts for row_id in part]
    assert len(set(every)) == 57
    assert every != sorted(every)
    reader = ShardReader()
    assert [ids(source, part, reader) for part in reversed(range(8))] == parts[::-1]
    fewer = source_rows(synthesis_recipe(tmp_path, "x", tmp_path, rows_per_part=8, seed=1, max_rows=20))
    assert [ids(fewer, part) for part in range(3)] == [*parts[:2], parts[2][:4]]
    other = source_rows(synthesis_recipe(tmp_path, "x", tmp_path, rows_per_part=8, seed=2))
    assert ids(other, 0) != parts[0]
    assert other.digest == source.digest != source_rows(synthesis_recipe(tmp_path, "x", path)).digest


def test_rows_hold_their_images_and_a_bad_one_keeps_its_place(tmp_path: Path) -> None:
    path = write_questions(tmp_path, 10)
    lines = path.read_text().splitlines()
    (tmp_path / json.loads(lines[0])["image"]).unlink()
    path.write_text("\n".join([*lines[:3], "{", *lines[3:]]) + "\n")
    source = source_rows(synthesis_recipe(tmp_path, "x", path, rows_per_part=20))
    rows = source.read(0, ShardReader())
    assert len(rows) == 11
    bad = {row.source: row.reason for row in rows if isinstance(row, BadRow)}
    assert bad[f"{path}:line 4"] == "malformed_row"
    assert bad[f"{path}:line 1"] == "missing_image"
    assert len(bad) == 2
    assert all(row.images[0]["bytes"][:4] == b"\x89PNG" for row in rows if isinstance(row, PromptRow))


def test_without_a_source_the_training_pairs_are_the_rows(tmp_path: Path) -> None:
    source = source_rows(tiny_recipe(tmp_path, "x", synthesize={"rows_per_part": 4}))
    row = source.read(0, ShardReader())[0]
    assert isinstance(row, PromptRow)
    assert row.answer in {each["chosen"] for each in easy_vqa_rows("train")}
    with pytest.raises(UserError, match="format describes the rows of source, which is not set"):
        tiny_recipe(tmp_path, "x", synthesize={"format": "question"})


def test_rows_have_the_language_and_domain_that_the_recipe_names(tmp_path: Path) -> None:
    path = write_questions(tmp_path, 6)
    rows = [json.loads(line) | {"lang": "de"} for line in path.read_text().splitlines()]
    path.write_text("\n".join(json.dumps(row | {"topic": f"t{place % 2}"}) for place, row in enumerate(rows)) + "\n")
    recipe = synthesis_recipe(tmp_path, "x", path)
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"language": "lang", "domain": "topic"})})
    found = source_rows(recipe).read(0, ShardReader())
    assert {row.language for row in found if isinstance(row, PromptRow)} == {"de"}
    assert sorted(str(row.domain) for row in found if isinstance(row, PromptRow)) == ["t0"] * 3 + ["t1"] * 3
    data = {"train": str(write_pairs(tmp_path / "pairs", 4)), "language": "lang"}
    with pytest.raises(UserError, match=r"data\.language: no training source has this column"):
        source_rows(tiny_recipe(tmp_path, "x", data=data))


def test_held_out_images_are_known_by_their_content(tmp_path: Path) -> None:
    """As files, as bytes and as a fraction of the training pairs; not by path."""
    pairs = write_pairs(tmp_path / "set", 12)
    keys = held_out_keys(tiny_recipe(tmp_path, "x", data={"train": "none.jsonl", "eval": str(pairs)}))
    source = source_rows(synthesis_recipe(tmp_path, "x", write_questions(tmp_path / "same", 12)))
    rows = [row for part in range(source.num_parts) for row in source.read(part, ShardReader())]
    assert len(rows) == 12
    assert {key for row in rows if isinstance(row, PromptRow) for key in content_keys(row)} == keys
    limited = {"train": "none.jsonl", "eval": str(pairs)}
    assert held_out_keys(tiny_recipe(tmp_path, "x", data=limited, eval={"max_pairs": 2})) == keys
    fraction = tiny_recipe(tmp_path, "x", data={"train": str(pairs), "eval_fraction": 0.3})
    assert 0 < len(held_out_keys(fraction)) < len(keys)
    assert not held_out_keys(tiny_recipe(tmp_path, "x"))
