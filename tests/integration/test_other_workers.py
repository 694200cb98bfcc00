"""A run that goes on with other numbers of workers, without Ray: the state is the same, and so is the curve."""

from __future__ import annotations

from functools import cache
from itertools import pairwise, product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from support.engines_by_hand import recipe_of, relay
from support.worker_group import worker_group

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
    "in parts": {
        "model": {"lora": {"r": 4, "modules_to_save": ["connector"]}},
        "deepspeed": {"config": {"zero_optimization": {"sub_group_size": 10_000}}},
    },
    "offloaded": {"deepspeed": {"offload_optimizer": "cpu"}},
}
ALL = [
    (kind, stage)
    for kind, stage in product(KINDS, range(4))
    if stage > 0 or kind not in ("in parts", "offloaded")  # refused without sharding
]
# A sharded run that goes on with other workers is in test_training.py, by default.
pytestmark = pytest.mark.nightly


@pytest.fixture(scope="module", autouse=True)
def processes() -> None:
    """Start them before the first test, which would take the time."""
    for number in set(WORKERS):
        worker_group(number).run(rank_of)


def rank_of(rank: int, _num_workers: int) -> int:
    return rank


@cache
def curve_of_one(kind: str) -> list[list[float]]:
    """Loss and gradient norm by step of one worker without sharding, which is not interrupted."""
    with TemporaryDirectory() as folder:
        recipe = recipe_of(**{**KINDS[kind], "deepspeed": {}})
        (legs,) = relay([recipe], (1,) * len(WORKERS), Path(folder) / "alone")
    return [step for leg in legs for step in leg["curve"]]


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("kind", "stage"), ALL)
def test_one_two_four_and_one_workers_have_the_curve_of_one(kind: str, stage: int, tmp_path: Path) -> None:
    sections = {**KINDS[kind]}
    sections["deepspeed"] = {"zero_stage": stage, **sections.get("deepspeed", {})}
    (legs,) = relay([recipe_of(**sections)], WORKERS, tmp_path / "relay")
    for before, after in pairwise(legs):
        assert after["begin"] == before["end"], "the weights and moments are other ones"
    if kind == "bfloat16":
        return  # rounds other sums
    losses = [step[0] for leg in legs for step in leg["curve"]]
    expected = [step[0] for step in curve_of_one(kind)]
    assert losses[-1] < 0.8 * losses[0]
    if kind.startswith("8 bits"):  # moments have a scale per block, and shards have other block borders
        assert losses == pytest.approx(expected, rel=1e-3)
    else:
        assert losses == pytest.approx(expected, abs=1e-4)
