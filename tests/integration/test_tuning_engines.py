"""Tuning options with real engines: every ZeRO stage, one worker and two."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from orpo_ray.config.recipe import Recipe
from orpo_ray.training.launch import launch_training
from support.engines_by_hand import curves, recipe_of, resumed
from support.tiny_runs import losses, tiny_recipe

RISKY: dict[str, dict[str, Any]] = {
    "QLoRA": {"model": {"lora": {"r": 4}, "quantization": {}}},
    "QLoRA packed in float32": {"model": {"lora": {"r": 4}, "quantization": {"quant_storage": "float32"}}},
    "QLoRA recomputed": {"model": {"lora": {"r": 4}, "quantization": {}, "gradient_checkpointing": True}},
    "DoRA": {"model": {"lora": {"r": 4, "use_dora": True}}},
    "trained beside": {"model": {"lora": {"r": 4, "modules_to_save": ["connector", "vision"]}}},
    "8 bits": {"model": {"lora": {"r": 16}}, "optim": {"optimizer": "adamw_8bit"}},
}
IMAGE = {"orpo": {"image_beta": 0.5, "anchor": 1.0}}
WITH_IMAGES: dict[str, dict[str, Any]] = {
    "image preference": IMAGE,
    **{f"image preference, {name}": RISKY[name] | IMAGE for name in ("QLoRA", "DoRA", "trained beside")},
    "image preference, frozen": {"model": {"freeze": ["vision", "connector"]}} | IMAGE,
    "image preference on trees": {"data": {"pairs_from_ranking": "all"}} | IMAGE,
}
SECTIONS = RISKY | WITH_IMAGES
STAGES = {
    "QLoRA": (1, 2, 3),
    "8 bits": (1, 2, 3),
    "image preference": (0, 1, 2, 3),
    "image preference, frozen": (0, 1, 2),  # ZeRO-3 cannot have a vision cache
    "image preference on trees": (0, 1, 2, 3),
}
# AdamW divides a gradient by its size, so that rounding errors of tiny gradients count fully. A larger epsilon keeps
# them small.
CALM = {"adam_epsilon": 1e-5}


def recipe_for(name: str, stage: int = 0, **more: dict[str, Any]) -> Recipe:
    """Return the recipe of a case; `more` adds fields to its sections."""
    sections = SECTIONS[name] | {"deepspeed": {"zero_stage": stage}}
    if name != "8 bits":
        sections["optim"] = CALM
    return recipe_of(**sections | {key: sections.get(key, {}) | fields for key, fields in more.items()})


def test_in_bfloat16_no_sharding_steps_as_far_as_sharding(tmp_path: Path) -> None:
    """Losses are equal from the first step on, without clipping, which rounds differently."""
    sections = {"model": {"dtype": "bfloat16"}, "optim": {"max_grad_norm": 0}}
    plain, sharded = curves([recipe_of(**sections, deepspeed={"zero_stage": n}) for n in (0, 1)], 1, tmp_path)
    np.testing.assert_allclose(plain, sharded, rtol=1e-3)
    assert plain[1][0] < plain[0][0] - 1


ALL = [(name, stage) for name in SECTIONS for stage in STAGES.get(name, (2, 3))]
# Each stage; ZeRO-3 is the one that changes what a layer computes with.
SOME = [("QLoRA packed in float32", 3), ("trained beside", 2), ("image preference", 3), ("8 bits", 1)]
REST, IMAGES = ([case for case in ALL if case[0] in names and case not in SOME] for names in (RISKY, WITH_IMAGES))


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "cases",
    [SOME, *(pytest.param(cases, marks=pytest.mark.nightly) for cases in (REST, IMAGES))],
    ids=["some", "rest", "image preference"],
)
def test_two_workers_on_every_zero_stage_have_the_curve_of_one(cases: list[tuple[str, int]], tmp_path: Path) -> None:
    """ZeRO-3 releases every weight as soon as possible, as in a model of billions of parameters.

    The one worker computes every pair alone and every image in every step; the two make trees of pairs, and read the
    features of a frozen vision encoder from a cache.
    """
    more = {
        "image preference, frozen": {"model": {"vision_cache": str(tmp_path / "features")}},
        "image preference on trees": {"data": {"group": "auto"}},
    }
    names = list(dict.fromkeys(name for name, _ in cases))
    one = dict(zip(names, curves([recipe_for(name) for name in names], 1, tmp_path), strict=True))
    recipes = [recipe_for(name, stage, **more.get(name, {})) for name, stage in cases]
    for (name, stage), curve in zip(cases, curves(recipes, 2, tmp_path), strict=True):
        assert curve[-1][0] < 0.8 * curve[0][0], name
        # 8-bit moments have a scale per block, and shards have other block borders.
        tolerance = 1e-3 if name == "8 bits" else 1e-5
        assert curve == [pytest.approx(step, rel=tolerance) for step in one[name]], (name, stage)
    assert ("image preference, frozen" in names) == bool(list(tmp_path.glob("features/**/*.safetensors")))


EIGHT_BITS = [(name, stage) for name in ("adamw_8bit", "paged_adamw_8bit") for stage in (0, 1, 2, 3)]


@pytest.mark.parametrize(
    "cases", [[("adamw_8bit", 0), ("paged_adamw_8bit", 2)], pytest.param(EIGHT_BITS, marks=pytest.mark.nightly)]
)
def test_8_bit_moments_are_8_bits_and_come_back_from_a_checkpoint(cases: list[tuple[str, int]], tmp_path: Path) -> None:
    recipes = [
        recipe_of(model={"lora": {"r": 16}}, optim={"optimizer": name}, deepspeed={"zero_stage": stage})
        for name, stage in cases
    ]
    for case, found in zip(cases, resumed(recipes, tmp_path), strict=True):
        assert found["again"] == found["tail"], case
        assert found["moments"] == ["torch.uint8"], case


@pytest.mark.nightly
def test_qlora_on_two_workers_has_the_curve_of_one(ray_cluster: None, tmp_path: Path) -> None:
    """The real program: adapters on 4-bit weights, a connector trained in full, two workers with ZeRO-2."""
    model = {"lora": {"r": 8, "modules_to_save": ["connector"]}, "quantization": {}, "gradient_checkpointing": True}
    found = []
    for workers, stage in ((1, 0), (2, 2)):
        recipe = tiny_recipe(
            tmp_path, f"w{workers}", model=model, scaling={"num_workers": workers}, deepspeed={"zero_stage": stage}
        )
        found.append(losses(Path(launch_training(recipe, Console(file=io.StringIO())).run_uri)))
    assert sorted(found[0]) == list(range(1, 11))
    assert found[0][10] < found[0][1]
    assert found[1] == pytest.approx(found[0], abs=1e-4)
