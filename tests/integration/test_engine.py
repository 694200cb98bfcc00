"""The DeepSpeed engine equals torch's AdamW in a plain loop: losses, gradient norms, weights, resuming."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from support.engines_by_hand import STEPS, Training, recipe_of, resumed_from_own_files, weights_after
from support.plain_engine import PlainEngine

# A large epsilon, since Adam would amplify gradients that consist of rounding errors.
OPTIM = {"learning_rate": 1e-3, "adam_epsilon": 1e-5, "warmup": 2, "weight_decay": 0.1, "max_grad_norm": 0.5}
CASES: dict[str, dict[str, Any]] = {
    "full": {"optim": OPTIM},
    "LoRA": {"optim": OPTIM, "model": {"lora": {"r": 4, "dropout": 0.0, "modules_to_save": ["connector"]}}},
}
STAGES = (0, 2, 3)


def test_every_zero_stage_trains_as_plain_torch_does(tmp_path: Path) -> None:
    """Four steps with gradient clipping, warm-up, learning-rate decay and weight decay, in float32."""
    recipes = [recipe_of(**sections, deepspeed={"zero_stage": n}) for sections in CASES.values() for n in STAGES]
    found = weights_after(recipes, tmp_path)
    for number, (name, sections) in enumerate(CASES.items()):
        training = Training(recipe_of(**sections), 0, 1, PlainEngine)
        expected = [training.step() for _ in range(STEPS)]
        assert min(norm for _, norm in expected) > OPTIM["max_grad_norm"], "this test must clip"
        weights = training.engine.consolidated_weights(trained_only=name == "LoRA")
        for stage, (curve, state) in zip(STAGES, found[number * len(STAGES) :][: len(STAGES)], strict=True):
            assert curve == [pytest.approx(step, rel=1e-5) for step in expected], (name, stage)
            assert state.keys() == weights.keys(), (name, stage)
            for key, weight in weights.items():
                torch.testing.assert_close(state[key], weight.detach(), rtol=0, atol=1e-5, msg=f"{name} {stage} {key}")
            storages = [{value.data_ptr() for value in each.values()} for each in (state, weights)]
            assert len(storages[0]) == len(storages[1]), (name, stage, "tied weights must stay tied")


@pytest.mark.parametrize(
    "stage", [pytest.param(1, marks=pytest.mark.nightly), pytest.param(2, marks=pytest.mark.nightly), 3]
)
def test_a_worker_resumes_from_the_files_that_it_asks_for(stage: int, tmp_path: Path) -> None:
    (found,) = resumed_from_own_files([recipe_of(optim=OPTIM, deepspeed={"zero_stage": stage})], tmp_path)
    assert found["again"] == found["tail"]
    shards = [name for name in found["files"] if name.endswith("optim_states.pt")]
    assert len(shards) == 1, "the shard of the other worker is left out"
    assert "zero_pp_rank_1_mp" in shards[0]
