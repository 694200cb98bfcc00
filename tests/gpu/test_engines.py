"""ZeRO stages, QLoRA and optimizers on one GPU: they step, the loss falls, and a checkpoint brings all of it back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import GlobalPageManager

from support.engine_memory import optimizer_of
from support.gpu_training import STEPS, Training, recipe_on, resumed
from support.sharded_loading import write_model

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("process_group")]


def losses(device: torch.device, **sections: Any) -> list[float]:
    training = Training(recipe_on(device, **sections), device)
    found = training.losses(STEPS)
    training.close()
    return found


def test_every_zero_stage_steps_alike(device: torch.device) -> None:
    found = {stage: losses(device, deepspeed={"zero_stage": stage}) for stage in (0, 1, 2, 3)}
    for stage, curve in found.items():
        assert curve[-1] < curve[0], stage
        assert curve == pytest.approx(found[0], rel=2e-2 if device.type == "cuda" else 1e-5), stage


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_qlora_steps(stage: int, device: torch.device) -> None:
    curve = losses(device, model={"lora": {"r": 8}, "quantization": {}}, deepspeed={"zero_stage": stage})
    assert curve[-1] < curve[0]


@pytest.mark.parametrize("stage", [0, 2])
@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit", "paged_adamw_8bit"])
def test_an_optimizer_comes_back_from_a_checkpoint(
    optimizer: str, stage: int, device: torch.device, tmp_path: Path
) -> None:
    recipe = recipe_on(
        device, model={"lora": {"r": 16}}, optim={"optimizer": optimizer}, deepspeed={"zero_stage": stage}
    )
    tail, again = resumed(recipe, device, tmp_path)
    # Kernels that add up in any order make two runs on a GPU differ in the last bits.
    assert again == pytest.approx(tail, rel=5e-3 if device.type == "cuda" else 1e-6)


def large_moments_paged(training: Training) -> set[bool]:
    """Whether moments of 100,000 elements or more are in bitsandbytes' paged memory."""
    paged = {id(tensor) for tensor in GlobalPageManager.get_instance().paged_tensors}
    found = set()
    for weight, state in optimizer_of(training.engine).state.items():
        if weight.numel() >= 1e5:
            found |= {getattr(m, "is_paged", False) and id(m) in paged for m in (state["state1"], state["state2"])}
    return found


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_large_moments_are_paged_before_and_after_a_resume(stage: int, device: torch.device, tmp_path: Path) -> None:
    """On a CPU, bitsandbytes has no paged memory."""
    model = {"id": write_model(tmp_path / "model", "smolvlm", intermediate_size=1024)}  # 1024 x 128 weights
    recipe = recipe_on(device, model=model, optim={"optimizer": "paged_adamw_8bit"}, deepspeed={"zero_stage": stage})
    first = Training(recipe, device)
    first.losses(1)
    assert large_moments_paged(first) == {device.type == "cuda"}
    first.engine.save(tmp_path / "checkpoint")
    first.close()
    second = Training(recipe, device)
    second.engine.load(tmp_path / "checkpoint")
    assert large_moments_paged(second) == {device.type == "cuda"}
    second.losses(1)
    assert large_moments_paged(second) == {device.type == "cuda"}
    second.close()
