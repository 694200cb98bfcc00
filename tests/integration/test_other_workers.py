"""A run that goes on with other numbers of workers, without Ray: the state is the same, and so is the curve."""

from __future__ import annotations

from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest

from orpo_ray.config.recipe import Recipe
from support.engines_by_hand import recipe_of, relay

WORKERS = (1, 2, 4, 1)
KINDS: dict[str, dict[str, Any]] = {
    "full": {},
    "LoRA": {"model": {"lora": {"r": 4, "modules_to_save": ["connector"]}}},
    "QLoRA": {"model": {"lora": {"r": 4}, "quantization": {}}},
    "QLoRA packed in float32": {"model": {"lora": {"r": 4}, "quantization": {"quant_storage": "float32"}}},
    "8 bits": {"model": {"lora": {"r": 16}}, "optim": {"optimizer": "adamw_8bit"}},
    "8 bits paged": {"optim": {"optimizer": "paged_adamw_8bit"}},
    "bfloat16": {"model": {"dtype": "bfloat16"}},
    # ZeRO-3 then has several vectors for a group of weights, and other ones for each number of workers.
    "in parts": {"deepspeed": {"config": {"zero_optimization": {"sub_group_size": 10_000}}}},
    "offloaded": {"deepspeed": {"offload_optimizer": "cpu"}},
}
ALL = [
    (kind, stage)
    for kind, stage in product(KINDS, range(4))
    if stage > 0 or kind not in ("in parts", "offloaded")  # refused without sharding
]
SOME = [
    *(("full", stage) for stage in (0, 2)), ("LoRA", 3), ("QLoRA", 2), ("8 bits", 1), ("8 bits", 3),
    *(("bfloat16", stage) for stage in (1, 3)), ("in parts", 3), ("offloaded", 1),
]  # fmt: skip


def sharded(kind: str, stage: int) -> Recipe:
    sections = {**KINDS[kind]}
    sections["deepspeed"] = {"zero_stage": stage, **sections.get("deepspeed", {})}
    return recipe_of(**sections)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("cases", [SOME, pytest.param(ALL, marks=pytest.mark.nightly)], ids=["some", "all"])
def test_one_two_four_and_one_workers_have_the_curve_of_one(cases: list[tuple[str, int]], tmp_path: Path) -> None:
    kinds = list(dict.fromkeys(kind for kind, _ in cases))
    alone = relay([recipe_of(**{**KINDS[kind], "deepspeed": {}}) for kind in kinds], (1,) * 4, tmp_path / "alone")
    expected = {kind: [step for leg in legs for step in leg["curve"]] for kind, legs in zip(kinds, alone, strict=True)}
    found = relay([sharded(*case) for case in cases], WORKERS, tmp_path / "relay")
    for case, legs in zip(cases, found, strict=True):
        for before, after in pairwise(legs):
            assert after["begin"] == before["end"], case
        curve = [step for leg in legs for step in leg["curve"]]
        if case[0] == "bfloat16":  # rounds other sums; the state above is exact
            continue
        # 8-bit moments have a scale per block, and shards have other block borders.
        tolerance = {"abs": 1e-4} if not case[0].startswith("8 bits") else {"rel": 5e-3}
        assert [step[0] for step in curve] == pytest.approx([step[0] for step in expected[case[0]]], **tolerance), case
        assert curve[-1][0] < 0.8 * curve[0][0], case
