"""Workers that compute a packed row together give the log-probs, gradients and training of one worker."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from orpo_ray.config.field_types import Checkpointing
from orpo_ray.model.sequence_group import SequenceGroup
from orpo_ray.tiny_models.families import TINY_FAMILIES
from support.engines_by_hand import curves, recipe_of
from support.kills import one_worker_killed
from support.pairs_by_hand import CROSS, assert_equal
from support.runs import run
from support.sequence_parallel import (
    attended,
    check_images,
    in_group,
    joined_by_two,
    plain_attention,
    states_of,
    step_reads,
)
from support.tiny_runs import LONG, losses, same_curve, tiny_recipe
from support.worker_group import worker_group

# Masks: causal; bidirectional within images, sliding windows; bidirectional prompts. Positions: one axis; three.
CASES: list[tuple[str, bool, Checkpointing]] = [
    ("smolvlm", False, "none"),
    ("gemma3", False, "full"),
    ("paligemma", True, "none"),
    ("qwen2_5_vl", True, "full"),
    ("llava_next", False, "selective"),
]


@pytest.mark.parametrize(
    ("family", "lora", "checkpointing"),
    [CASES[0], *(pytest.param(*case, marks=pytest.mark.nightly) for case in CASES[1:])],
)
def test_two_workers_compute_what_one_does(family: str, lora: bool, checkpointing: Checkpointing) -> None:
    same_as_one(2, family, lora, checkpointing)


@pytest.mark.nightly
@pytest.mark.parametrize("family", [name for name in TINY_FAMILIES if name not in (*CROSS, "qwen3_vl")])
def test_two_workers_compute_what_one_does_in_every_family(family: str) -> None:
    same_as_one(2, family, lora=False, checkpointing="none")


@pytest.mark.nightly
def test_four_workers_share_two_key_heads() -> None:
    same_as_one(4, "qwen2_5_vl", False, "none")


def same_as_one(size: int, family: str, lora: bool, checkpointing: Checkpointing) -> None:
    one = in_group(0, 1, family, lora, checkpointing)
    for found in worker_group(size).run(in_group, family, lora, checkpointing):
        for got, expected in zip(found, one, strict=True):
            assert_equal(got, (*expected[:2], {name: each for name, each in expected[2].items() if each.any()}))


@pytest.mark.parametrize("keys", [1, 2, 4])
def test_key_heads_are_divided_or_sent_to_all_that_need_them(keys: int) -> None:
    tokens = 7
    states = [each.requires_grad_() for each in states_of(keys, tokens)]
    expected = plain_attention(*states)
    (expected * torch.arange(tokens * 4 * 8).view(1, tokens, 4, 8).float().sin()).sum().backward()
    for member, (out, gradients, exchanged) in enumerate(worker_group(2).run(attended, keys, tokens)):
        assert exchanged == 4 * (4 * 8) * 2 * (4 + max(keys, 2)), "docs/scaling.md: t D 2 (H + max(K, n)) numbers"
        group = SequenceGroup(2, member, None)
        torch.testing.assert_close(out[:, : 4 - member], group.own(expected.detach(), 1)[:, : 4 - member])
        for got, whole in zip(gradients, states, strict=True):
            assert whole.grad is not None
            torch.testing.assert_close(got[:, :, : 4 - member], group.own(whole.grad, 2)[:, :, : 4 - member])


def together(stage: int, image_beta: float = 0.0, **scaling: int) -> Any:
    optim, orpo = {"adam_epsilon": 1e-5}, {"image_beta": image_beta}
    return recipe_of(deepspeed={"zero_stage": stage}, scaling=scaling, optim=optim, orpo=orpo)


@pytest.mark.parametrize("stages", [[3], pytest.param([0, 1, 2], marks=pytest.mark.nightly)])
def test_every_zero_stage_trains_as_on_one_worker(stages: list[int], tmp_path: Path) -> None:
    """Losses and gradient norms of four steps."""
    (expected,) = curves([together(0)], 1, tmp_path)
    recipes = [together(stage, num_workers=2, sequence_parallel=2) for stage in stages]
    for stage, curve in zip(stages, curves(recipes, 2, tmp_path), strict=True):
        assert curve == [pytest.approx(step, rel=1e-5) for step in expected], stage


def test_other_images_are_divided_too(tmp_path: Path) -> None:
    (expected,) = curves([together(0, 1.0)], 1, tmp_path)
    (curve,) = curves([together(2, 1.0, num_workers=2, sequence_parallel=2)], 2, tmp_path)
    assert curve == [pytest.approx(step, rel=1e-5) for step in expected]


def test_a_step_in_a_group_reads_what_one_worker_reads(tmp_path: Path) -> None:
    """Once, what is logged: no worker waits for the device to divide the row."""
    ((alone, expected),) = worker_group(1).run(step_reads, str(tmp_path))
    for found, loss in worker_group(2).run(step_reads, str(tmp_path)):
        assert len(found) == len(alone) == 1, found
        assert loss == pytest.approx(expected, rel=1e-5)


def test_a_gradient_of_one_worker_shows_that_images_are_used() -> None:
    assert [worker_group(2).run(check_images, gradients) for gradients in (0, 1)] == [[False] * 2, [True] * 2]


def test_workers_that_do_not_fill_groups_are_refused() -> None:
    (said,) = worker_group(1).run(joined_by_two)
    assert "1 worker(s) cannot form groups of 2" in said


@pytest.mark.nightly
def test_two_groups_of_two_train_as_one_worker_does(tmp_path: Path) -> None:
    (expected,) = curves([together(0)], 1, tmp_path)
    recipes = [together(stage, num_workers=4, sequence_parallel=2) for stage in (0, 3)]
    for curve in curves(recipes, 4, tmp_path):
        assert curve == [pytest.approx(step, rel=1e-5) for step in expected]


@pytest.mark.nightly
def test_a_run_in_a_group_has_the_metrics_of_one_worker(ray_cluster: None, tmp_path: Path) -> None:
    """The real program, evaluation and exchanged images included: pairs count once. Ray has room for two workers."""
    found = []
    for workers in (1, 2):
        scaling = {"num_workers": [workers, 2 * workers], "sequence_parallel": workers} if workers > 1 else {}
        held_out = {"grounding": True, "max_pairs": 24}
        recipe = tiny_recipe(tmp_path, f"w{workers}", scaling=scaling, data={"eval": "easy-vqa:test"}, eval=held_out)
        summary = run(recipe)
        found.append((losses(Path(summary.run_uri)), summary.metrics))
    (one, alone), (two, grouped) = found
    assert two == pytest.approx(one, abs=1e-4)
    for name in ("eval/loss", "eval/rewards/accuracies", "eval/grounding_gap", "eval/pairs", "eval/grounding_pairs"):
        assert grouped[name] == pytest.approx(alone[name], abs=1e-4), name
    assert grouped["train/num_workers"] == 2


@pytest.mark.nightly
@pytest.mark.parametrize("which", [0, -1])
def test_the_steps_of_a_lost_worker_are_saved_by_another_of_its_group(
    reference: dict[int, float], storage: Path, which: int
) -> None:
    """There is no periodic checkpoint."""
    scaling = {"num_workers": 2, "sequence_parallel": 2}
    recipe = tiny_recipe(storage, f"group-survived{which}", optim=LONG, scaling=scaling)
    with one_worker_killed(recipe, which) as done:
        metrics = run(recipe).metrics
    assert metrics["train/repeated_steps"] <= 1 <= done[0]
    same_curve(Path(recipe.run_uri), reference)
