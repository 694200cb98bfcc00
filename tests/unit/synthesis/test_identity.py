"""What a set belongs to."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orpo_ray.errors import UserError
from orpo_ray.storage.run_folder import RunFolder
from orpo_ray.synthesis.identity import check_identity, identity_of, weights_of
from orpo_ray.synthesis.local_model import LocalModel
from orpo_ray.synthesis.source import source_rows
from orpo_ray.tiny_models.build import resolve
from support.synthesis import synthesis_recipe, write_questions


def identity(tmp_path: Path, **fields: Any) -> dict[str, Any]:
    recipe = synthesis_recipe(tmp_path, "x", write_questions(tmp_path / "rows", 4), **fields)
    return identity_of(recipe, source_rows(recipe), LocalModel(recipe).target)


def test_what_decides_a_set_and_what_does_not(tmp_path: Path) -> None:
    own = identity(tmp_path)
    assert own == identity(tmp_path, num_workers=7, rounds=9, server={"concurrency": 2})
    for fields in ({"seed": 1}, {"temperatures": [0.2]}, {"max_rows": 3}, {"judge": {"model": "other"}}):
        assert own != identity(tmp_path, **fields)
    folder = RunFolder(str(tmp_path / "x"))
    check_identity(folder, own)
    check_identity(folder, identity(tmp_path, num_workers=7))
    for columns, dtype in (({"question": "ask"}, "float32"), ({}, "bfloat16")):
        recipe = synthesis_recipe(tmp_path, "x", write_questions(tmp_path / "rows", 4))
        source = replace(source_rows(recipe), columns=columns)
        recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"dtype": dtype})})
        assert own != identity_of(recipe, source, LocalModel(recipe).target)
    recipe = synthesis_recipe(tmp_path, "x", write_questions(tmp_path / "rows", 4))
    for language, same in (("script", True), ("lang", False)):  # a script is no column of the set
        recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"language": language})})
        assert same == (own == identity_of(recipe, source_rows(recipe), LocalModel(recipe).target))
    with pytest.raises(UserError, match=r"differ in synthesize\.judge\.model, synthesize\.seed"):
        check_identity(folder, identity(tmp_path, seed=1, judge={"model": "other"}))


def test_weights_are_compared_by_their_content(tmp_path: Path) -> None:
    shutil.copytree(resolve("orpo-ray/tiny-smolvlm"), tmp_path / "model")
    own = identity(tmp_path, model=str(tmp_path / "model"))
    assert own == identity(tmp_path, model=str(tmp_path / "model"))
    (file,) = (tmp_path / "model").glob("*.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    changed = identity(tmp_path, model=str(tmp_path / "model"))
    assert {key for key in own if own[key] != changed[key]} == {"weights"}
    recipe = synthesis_recipe(tmp_path, "x", tmp_path / "rows", model=str(tmp_path / "model"))
    assert weights_of(LocalModel(recipe).target) == changed["weights"]
