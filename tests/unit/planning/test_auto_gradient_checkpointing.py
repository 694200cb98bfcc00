"""`model.gradient_checkpointing: auto`: the fastest mode that fits, by the plan's estimate."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from orpo_ray.config.load import parse_recipe
from orpo_ray.config.recipe import Recipe
from orpo_ray.errors import UserError
from orpo_ray.planning.fit import MAX_FILL, MODES
from orpo_ray.planning.gpus import GIB
from orpo_ray.planning.inputs import choose_checkpointing, plan_inputs
from orpo_ray.planning.plan import Options, load_config, plan
from orpo_ray.training.auto_gradient_checkpointing import decide, share_of_gpu, with_checkpointing
from support.families import tiny_unknown


def recipe_of(folder: Path, model: str = "orpo-ray/tiny-smolvlm", checkpointing: Any = "auto") -> Recipe:
    """Long rows in small micro-batches, so that activations are most of what differs."""
    return parse_recipe(
        {
            "name": "x",
            "model": {"id": model, "gradient_checkpointing": checkpointing},
            "data": {"train": "none", "max_length": 2048},
            "optim": {"tokens_per_microbatch": 8192, "pairs_per_step": 64},
            "checkpoint": {"storage": str(folder)},
        }
    )


def test_it_is_the_fastest_mode_that_fits(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path)
    config, _ = load_config(recipe.model)
    inputs = plan_inputs(recipe, config)
    planner, setting = inputs.planner, inputs.setting
    needed = [planner.memory(replace(setting, checkpointing=mode)).total / MAX_FILL / GIB for mode in MODES]
    assert needed == sorted(set(needed), reverse=True)
    for mode, gib in zip(MODES, needed, strict=True):
        assert planner.resolved(setting, 1.0001 * gib).checkpointing == mode
    assert planner.resolved(setting, 0.1).checkpointing == "full"
    assert planner.resolved(replace(setting, checkpointing="none"), 0.1).checkpointing == "none"
    assert choose_checkpointing(recipe, config, 1.0001 * needed[1]) == "selective"


def test_a_model_that_cannot_be_planned_is_recomputed_in_full(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, "orpo-ray/tiny-mllama")
    assert choose_checkpointing(recipe, load_config(recipe.model)[0], 1000.0) == "full"


def test_a_plan_says_what_it_means_on_each_gpu(tmp_path: Path) -> None:
    report = plan(recipe_of(tmp_path), Options())
    assert [gpu["recipe"]["checkpointing"] for gpu in report["gpus"]] == ["none"] * len(report["gpus"])
    assert report["setting"]["checkpointing"] == "full"
    assert report["assumptions"][0].startswith("model.gradient_checkpointing auto is none on L4, A10G")


def test_a_run_on_a_cpu_recomputes_in_full_and_other_modes_stay(tmp_path: Path) -> None:
    cpu = torch.device("cpu")
    for given, mode in {"auto": "full", "selective": "selective", False: "none"}.items():
        assert with_checkpointing(recipe_of(tmp_path, checkpointing=given), cpu).gradient_checkpointing == mode


def test_a_model_without_a_readable_config_is_recomputed_in_full(tmp_path: Path) -> None:
    assert decide(recipe_of(tmp_path, str(tmp_path)), 1000.0) == "full"


def test_a_model_of_an_unknown_family_is_recomputed_in_full_if_it_cannot_be_estimated(tmp_path: Path) -> None:
    """An image of Aya Vision has a quarter of the tokens that the plan assumes for unknown families."""
    tiny_unknown("aya_vision").save_pretrained(tmp_path)
    recipe = recipe_of(tmp_path, str(tmp_path))
    with pytest.raises(UserError, match="cannot estimate a model of the family aya_vision, which is not known"):
        plan(recipe, Options())
    assert decide(recipe, 1000.0) == "full"


def test_an_estimate_that_fails_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("a library broke")

    monkeypatch.setattr(transformers.AutoModelForImageTextToText, "from_config", fail)
    assert decide(recipe_of(tmp_path), 1000.0) == "full"
    assert "could not be estimated: a library broke" in caplog.text


@pytest.mark.parametrize(("share", "expected"), [("auto", 1.0), (1, 1.0), (0.5, 0.5), (0, 1.0)])
def test_trials_on_one_gpu_share_its_memory(tmp_path: Path, share: Any, expected: float) -> None:
    scaling = recipe_of(tmp_path).scaling.model_copy(update={"gpus_per_worker": share})
    assert share_of_gpu(recipe_of(tmp_path).model_copy(update={"scaling": scaling})) == expected
