"""Plans of all families that support shared prefixes."""

from __future__ import annotations

from pathlib import Path

import pytest

from orpo_ray.config.load import parse_recipe
from orpo_ray.planning.plan import Options, plan
from orpo_ray.tiny_models.families import TINY_FAMILIES
from support.pairs_by_hand import CROSS

SOME = ("smolvlm", "llava_next", "gemma3", "qwen2_5_vl")  # each counts its image tokens in another way


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(name, marks=[] if name in SOME else pytest.mark.nightly)
        for name in TINY_FAMILIES
        if name not in CROSS
    ],
)
def test_every_family_that_shares_prefixes_is_planned_from_its_config_alone(family: str, tmp_path: Path) -> None:
    TINY_FAMILIES[family]().config().save_pretrained(tmp_path)
    raw = {"name": "x", "model": {"id": str(tmp_path)}, "data": {"train": "easy-vqa:train", "max_length": 16384}}
    report = plan(parse_recipe(raw | {"checkpoint": {"storage": str(tmp_path)}}), Options())
    assert report["model"]["parameters"] == sum(p.numel() for p in TINY_FAMILIES[family]().model().parameters())
    assert report["step"]["pair"]["image"] > 0
    assert all(memory["activations"] > 0 for memory in report["memory"].values())
