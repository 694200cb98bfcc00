"""What a worker writes into its scratch folder is what it checks the room for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from orpo_ray.config.recipe import Recipe
from orpo_ray.errors import UserError
from orpo_ray.training.saving import check_scratch
from support.engine_memory import end_engine
from support.engines_by_hand import Training, recipe_of
from support.worker_group import worker_group

CASES: list[dict[str, Any]] = [
    *(
        {"model": {"dtype": dtype}, "deepspeed": {"zero_stage": n}}
        for dtype in ("float32", "bfloat16")
        for n in range(4)
    ),
    {"model": {"lora": {"r": 64}}, "deepspeed": {"zero_stage": 3}},
    {"optim": {"optimizer": "adamw_8bit"}, "deepspeed": {"zero_stage": 2}},
]


def expected_and_written(rank: int, workers: int, recipes: list[Recipe], folder: str) -> list[tuple[int, int]]:
    found = []
    for number, recipe in enumerate(recipes):
        training = Training(recipe, rank, workers)
        expected = training.engine.checkpoint_bytes
        training.step()
        path = Path(folder) / f"{number}-{rank}"
        training.engine.save(path)
        found.append((expected, sum(file.stat().st_size for file in path.rglob("*") if file.is_file())))
        end_engine(training.engine)
    return found


@pytest.mark.parametrize("cases", [CASES[1:4] + CASES[-2:], pytest.param(CASES, marks=pytest.mark.nightly)])
def test_the_size_of_a_checkpoint_is_known_before_the_first_step(cases: list[dict[str, Any]], tmp_path: Path) -> None:
    recipes = [recipe_of(**case) for case in cases]
    for rank, found in enumerate(worker_group(2).run(expected_and_written, recipes, str(tmp_path))):
        for case, (expected, written) in zip(cases, found, strict=True):
            assert expected == pytest.approx(written, rel=0.05, abs=200_000), (case, rank)


class EngineOf:
    """An engine with a checkpoint of some size."""

    def __init__(self, size: int) -> None:
        self.checkpoint_bytes = size


def test_a_scratch_folder_without_room_is_refused_with_both_numbers(tmp_path: Path) -> None:
    engine: Any = EngineOf(10**18)
    with pytest.raises(UserError, match=r"scratch: a checkpoint needs about 4,000,000,000,000,000,000 bytes"):
        check_scratch(engine, str(tmp_path), workers_of_node=4)
    engine = EngineOf(1000)
    check_scratch(engine, str(tmp_path / "made"), workers_of_node=4)
    assert (tmp_path / "made").is_dir()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot use the scratch folder"):
        check_scratch(engine, str(tmp_path / "file" / "below"), workers_of_node=1)
