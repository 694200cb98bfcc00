"""Which trials can train side by side on one model, and how many do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from orpo_ray.config.load import load_recipe
from orpo_ray.errors import UserError
from orpo_ray.sweep.packs import pack_size, wanted_size, why_model_cannot, why_not_packed
from orpo_ray.sweep.space import make_space
from support.tiny_runs import tiny_recipe


def recipe_of(folder: Path, **sections: Any) -> Any:
    return tiny_recipe(folder, "sweep", **{"model": {"lora": {"r": 4}}, "data": {"eval": "easy-vqa:test"}} | sections)


@pytest.mark.parametrize(
    ("sections", "why"),
    [
        ({"tune": {"scheduler": "pbt"}}, "tune.scheduler is pbt"),
        ({"eval": {"generate": 4}}, "eval.generate is not 0"),
        ({"model": {}}, "model.lora is not set"),
        ({"model": {"lora": {"dropout": 0.1}}}, "model.lora.dropout is not 0"),
        ({"scaling": {"num_workers": 2}}, "scaling.num_workers is not 1"),
        ({"tune": {"search": {"data.max_length": {"choices": [64, 128]}}}}, "they differ in data.max_length"),
        ({"tune": {"search": {"model.lora.use_rslora": {"choices": [True, False]}}}}, "model.lora.use_rslora"),
    ],
)
def test_recipes_that_cannot_share_say_why(sections: dict[str, Any], why: str, tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, **sections)
    found = why_not_packed(recipe, make_space(recipe))
    assert found is not None
    assert why in found


def test_models_that_cannot_share_say_why(folders: dict[str, str], tmp_path: Path) -> None:
    def why(family: str, **lora: Any) -> str | None:
        return why_model_cannot(recipe_of(tmp_path, model={"id": folders[family], "lora": {"r": 4, **lora}}))

    assert why("smolvlm") is None
    assert why_model_cannot(recipe_of(tmp_path, model={"lora": {"r": 4}, "quantization": {}})) is None
    assert "the model itself puts image features into the row" in str(why("qwen3_vl"))
    assert "cannot share a prefix" in str(why("mllama"))
    assert "lies outside the layers of the language model" in str(why("smolvlm", target_modules=["vision"]))


@pytest.mark.parametrize(
    ("tune", "places", "size"),
    [
        ({"num_trials": 8}, 2, 4),
        ({"num_trials": 8}, 8, 1),
        ({"num_trials": 40}, 1, 8),
        ({"num_trials": 8, "max_concurrent": 2}, 1, 2),
        ({"num_trials": 40, "pack": 16}, 8, 16),
        ({"num_trials": 3, "pack": 16}, 8, 3),
        ({"num_trials": 8, "pack": "off"}, 1, 1),
        ({"num_trials": 8, "pack": 1}, 1, 1),
    ],
)
def test_size(tune: dict[str, Any], places: int, size: int, tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, tune=tune)
    assert wanted_size(recipe.tune, tune["num_trials"], places) == size


def test_what_is_not_possible_is_refused_only_if_it_is_asked_for(tmp_path: Path) -> None:
    for pack_of, full in ((4, {}), (4, {"lora": {"r": 4}})):
        recipe = recipe_of(tmp_path, tune={"pack": pack_of}, model=full)
        with pytest.raises(UserError, match=r"tune\.pack: the trials of this search cannot train side by side: "):
            pack_size(recipe, make_space(recipe), 8, 1, shares_rows=not full)
    recipe = recipe_of(tmp_path, model={})
    assert pack_size(recipe, make_space(recipe), 8, 1, True) == 1


def test_off_may_stand_without_quotes(tmp_path: Path) -> None:
    """YAML reads the word as `false`."""
    path = tmp_path / "recipe.yaml"
    path.write_text("name: a\nmodel: {id: m}\ndata: {train: t}\ntune:\n  pack: off\n")
    assert load_recipe(path, []).tune.pack == "off"
    assert load_recipe(path, ["tune.pack=off"]).tune.pack == "off"
    with pytest.raises(UserError, match=r"tune\.pack"):
        load_recipe(path, ["tune.pack=on"])
