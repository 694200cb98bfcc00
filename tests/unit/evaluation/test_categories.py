"""Groups of held-out pairs by a column or by script."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from orpo_ray.data.from_recipe import held_out_data
from orpo_ray.errors import UserError
from orpo_ray.evaluation.categories import groups_by
from support.tiny_runs import tiny_recipe


def test_pairs_by_script_unless_a_column_has_that_name(tmp_path: Path) -> None:
    rows = [
        {"prompt": f"{text} {n}", "chosen": text, "rejected": "b"} for n, text in enumerate(["dog", "собака", "犬"])
    ]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"prompt": "bad"}]))
    recipe = tiny_recipe(tmp_path, "run", data={"train": str(file), "eval": str(file)})
    held_out = held_out_data(recipe)
    assert held_out is not None
    assert sorted(groups_by(held_out, "script").values()) == ["Cyrillic", "Han", "Latin"]
    with pytest.raises(UserError, match="give script, or one of: prompt"):
        groups_by(held_out, "language")
    file.write_text("".join(json.dumps(row | {"script": "mine"}) + "\n" for row in rows))
    held_out = held_out_data(recipe)
    assert held_out is not None
    assert set(groups_by(held_out, "script").values()) == {"mine"}
