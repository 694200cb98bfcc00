"""Shipped recipes state the memory that the plan predicts."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from orpo_ray.config.load import load_recipe
from orpo_ray.planning.plan import Options, plan
from support.paths import ROOT

MEMORY = re.compile(r"# Memory: ([0-9.]+) GiB")


@pytest.mark.parametrize(
    "name", ["smolvlm-256m-full", pytest.param("llava-1.6-mistral-7b-qlora", marks=pytest.mark.nightly)]
)
def test_its_memory_is_the_plan_s(name: str, tmp_path: Path) -> None:
    path = ROOT / "recipes" / f"{name}.yaml"
    stated = MEMORY.search(path.read_text())
    assert stated
    report = plan(load_recipe(path, [f"checkpoint.storage={tmp_path}"]), Options())
    memory = report["memory"][str(report["setting"]["stage"])]["total"] / 2**30
    assert memory == pytest.approx(float(stated[1]), rel=0.02)
