"""Runs whose worker or driver is killed: the losses are those of an uninterrupted run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from orpo_ray.config.recipe import Recipe
from support.commands import on_this_cluster, orpo_ray_here, without_cluster
from support.kills import one_worker_killed
from support.runs import last_step, run, wait_until
from support.tiny_runs import LONG, losses, same_curve, tiny_recipe


def test_a_killed_worker_is_replaced_and_the_curve_goes_on(reference: dict[int, float], storage: Path) -> None:
    recipe = tiny_recipe(
        storage, "worker-killed", optim=LONG, checkpoint={"every_steps": 3}, scaling={"num_workers": 2}
    )
    with one_worker_killed(recipe):
        metrics = run(recipe).metrics
    same_curve(Path(recipe.run_uri), reference)
    assert metrics["train/restarts"] == 1
    assert metrics["train/repeated_steps"] <= 1


@pytest.mark.nightly
@pytest.mark.parametrize("which", [0, -1])
def test_the_steps_of_a_lost_worker_are_saved_by_another(
    reference: dict[int, float], storage: Path, which: int
) -> None:
    """The last periodic checkpoint is far behind: there is none."""
    recipe = tiny_recipe(storage, f"survived{which}", optim=LONG, scaling={"num_workers": 2})
    with one_worker_killed(recipe, which) as done:
        run(recipe)
    saved = [json.loads(path.read_text())["step"] for path in Path(recipe.run_uri).glob("checkpoint_*/position.json")]
    assert len(saved) == 2, "one by the worker that was left, one at the end"
    assert done[0] - 1 <= min(saved) < LONG["max_steps"]
    same_curve(Path(recipe.run_uri), reference)


def command(recipe: Recipe, folder: Path) -> list[str]:
    path = folder / f"{recipe.name}.yaml"
    path.write_text(recipe.to_yaml())
    return [sys.executable, "-m", "orpo_ray", "train", str(path)]


@pytest.mark.timeout(400)
@pytest.mark.parametrize("is_on_a_cluster", [True, pytest.param(False, marks=pytest.mark.nightly)])
def test_a_killed_driver_resumes_with_the_same_command_and_ends_once(
    reference: dict[int, float], tmp_path: Path, is_on_a_cluster: bool
) -> None:
    """Killing the driver ends its Ray, or its job on a cluster; the same command resumes from a checkpoint."""
    environment = on_this_cluster() if is_on_a_cluster else without_cluster()
    recipe = tiny_recipe(tmp_path, "driver-killed", optim=LONG, checkpoint={"every_steps": 3})
    first = subprocess.Popen(command(recipe, tmp_path), env=environment, stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: last_step(Path(recipe.run_uri)) >= 8, "step 8")
    finally:
        first.kill()
        first.wait()
    assert last_step(Path(recipe.run_uri)) < LONG["max_steps"]
    again = orpo_ray_here(*command(recipe, tmp_path)[3:])
    assert again.returncode == 0, again.stderr
    same_curve(Path(recipe.run_uri), reference)
    third = orpo_ray_here(*command(recipe, tmp_path)[3:])
    assert third.returncode == 0
    assert "finished already" in third.stderr


OFFLOADED: dict[str, Any] = {
    "zero_stage": 3,
    "offload_optimizer": "cpu",
    "offload_param": "cpu",
    "config": {"zero_optimization": {"sub_group_size": 10_000}},
}


@pytest.mark.nightly
@pytest.mark.parametrize("deepspeed", [{}, OFFLOADED], ids=["", "offloaded"])
def test_lora_trains_resumes_and_leaves_adapters(ray_cluster: None, tmp_path: Path, deepspeed: dict[str, Any]) -> None:
    from safetensors.torch import load_file
    from transformers import AutoModelForImageTextToText

    from orpo_ray.tiny_models.build import resolve

    section: dict[str, Any] = {"lora": {"r": 4, "dropout": 0.1}, "gradient_checkpointing": True}
    optim = LONG
    held_out: dict[str, Any] = {
        "data": {"eval": "easy-vqa:test"}, "eval": {"max_pairs": 8, "every_steps": 12, "grounding": True}
    }  # fmt: skip
    whole = run(tiny_recipe(tmp_path, "whole", model=section, optim=optim, deepspeed=deepspeed, **held_out))
    assert {"eval/grounding_gap", "eval/rewards/margins"} <= set(whole.metrics)
    killed = tiny_recipe(tmp_path, "killed", model=section, optim=optim, checkpoint={"every_steps": 3})
    with one_worker_killed(killed):
        run(killed)
    same_curve(Path(killed.run_uri), losses(Path(whole.run_uri)))
    finals = [Path(uri) / "final" for uri in (whole.run_uri, killed.run_uri)]
    adapters, others = [load_file(final / "adapter_model.safetensors") for final in finals]
    assert adapters.keys() == others.keys()
    for name, value in adapters.items():
        assert "text_model.layers" in name
        assert value.abs().max() > 0, f"{name} was not trained, or not gathered"
        assert torch.allclose(value, others[name], atol=1e-3), name
    start = dict(AutoModelForImageTextToText.from_pretrained(resolve("orpo-ray/tiny-smolvlm")).named_parameters())
    loaded, info = AutoModelForImageTextToText.from_pretrained(finals[0], output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    held = {name.replace(".base_layer", ""): value for name, value in loaded.named_parameters()}
    assert sum("lora_" in name for name in held) == len(adapters)
    assert {name for name in held if "lora_" not in name} == start.keys()
    assert all(torch.equal(held[name], value) for name, value in start.items())
    assert run(killed).was_finished
