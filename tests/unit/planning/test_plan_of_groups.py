"""Plans of runs whose workers compute pairs together (`scaling.sequence_parallel`)."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rich.console import Console
from torch.testing._internal.distributed.fake_pg import FakeStore

from orpo_ray.config.field_types import Checkpointing
from orpo_ray.config.load import parse_recipe
from orpo_ray.config.recipe import Recipe
from orpo_ray.config.schema import ModelConfig
from orpo_ray.errors import UserError
from orpo_ray.model.sequence_group import SequenceGroup
from orpo_ray.planning import activations
from orpo_ray.planning.activations import Activations, PairShape, batch_of, measure
from orpo_ray.planning.dry_run import Live, dry_run
from orpo_ray.planning.fit import FRAGMENTATION, MODES, Planner, Setting
from orpo_ray.planning.gpus import GB, Gpu
from orpo_ray.planning.images import image_shape
from orpo_ray.planning.known_shapes import KNOWN_SHAPES
from orpo_ray.planning.plan import Options, plan
from orpo_ray.planning.planned_group import PlannedGroup
from orpo_ray.planning.states import Offload, Weight, Weights
from orpo_ray.planning.step_time import Load, Rates, step_time
from orpo_ray.planning.table import print_plan
from orpo_ray.planning.work import Matmul, Work
from support.pairs_by_hand import make_row, run_as, tiny_pair_model

SMOLVLM = "HuggingFaceTB/SmolVLM-256M-Instruct"
LAYERS, HEADS, KEYS, HEAD, VOCABULARY = 30, 9, 3, 64, 49_280
GPU = Gpu("GPU", 80, 1e15, 1e12, 100, 1.0, 100 * GB, 10 * GB, 1.0)
RATES = Rates(link=1.0, imbalance=0.0)


def measured(together: int, mode: Checkpointing = "none", answers: int = 1200) -> Activations:
    """A pair of 2 x `answers` tokens and one image, of SmolVLM-256M: T is a multiple of 3."""
    config = KNOWN_SHAPES[SMOLVLM].config()
    image = image_shape(config)
    shape = PairShape(300 - image.tokens % 3, answers, answers, 1, image.tokens, image.vision)
    batch = batch_of(shape, 1, config, "response", "shared_prefix", together)
    assert batch.input_ids.numel() % 3 == 0
    section = ModelConfig(id=SMOLVLM, gradient_checkpointing=mode)
    return measure(section, config, torch.bfloat16, "shared_prefix", batch, True, "cuda")


@pytest.fixture(scope="module")
def alone() -> Activations:
    return measured(1)


@pytest.fixture(scope="module")
def member() -> Activations:
    return measured(3)


def test_the_language_model_of_a_member_is_a_third_and_its_vision_encoder_whole(
    alone: Activations, member: Activations
) -> None:
    assert member.tokens == alone.tokens
    assert member.vision_work.flops == alone.vision_work.flops
    assert member.vision_saved == pytest.approx(alone.vision_saved, rel=0.01)
    # The result of attention is there twice: as the kernel gives it, and exchanged for the output projection.
    language = [each.saved - each.vision_saved for each in (member, alone)]
    twice = LAYERS * (member.tokens // 3) * HEADS * HEAD * 2
    assert language[0] == pytest.approx(language[1] / 3 + twice, rel=0.01)
    flops = [each.work.flops - each.vision_work.flops for each in (member, alone)]
    assert flops[0] == pytest.approx(flops[1] / 3, rel=0.001)
    # Logits of 2,400 targets, or of a third of them, beside tensors of a fixed size.
    head = [each.peaks[2] - each.saved for each in (member, alone)]
    assert head[1] - head[0] == pytest.approx(1600 * VOCABULARY * 2, rel=0.01)


def test_what_a_member_exchanges_by_hand(alone: Activations, member: Activations) -> None:
    """docs/scaling.md: t D 2 (H + max(K, n)) numbers per layer and pass, of 2 bytes."""
    one_pass = LAYERS * (member.tokens // 3) * HEAD * 2 * (HEADS + KEYS) * 2
    assert alone.work.exchanged == 0
    assert member.work.exchanged == 2 * one_pass
    assert measured(3, "full").work.exchanged == 3 * one_pass


@pytest.fixture
def silent_group() -> Iterator[SequenceGroup]:
    """The first of two workers. Its collectives exchange nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield SequenceGroup.join(2, 60.0)
    dist.destroy_process_group()


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_a_dry_run_of_a_member_needs_what_a_real_one_does(
    checkpointing: Checkpointing, silent_group: SequenceGroup
) -> None:
    row = [(1, 61, 50, 40), (2, 30, 90, 70)]

    def prepared(group: SequenceGroup) -> Any:
        model = tiny_pair_model("smolvlm", checkpointing=checkpointing)
        run_as(model, "shared_prefix")
        model.group = group
        return model

    model = prepared(silent_group)
    built = activations.build_batch(make_row("smolvlm", row), "response", "shared_prefix", collate=model.family.collate)
    batch = silent_group.with_own_targets(built)
    with Live() as live:
        for parameter in model.parameters():
            live.add(parameter)
            parameter.grad = torch.zeros_like(parameter)
        real = activations.step(model, batch, live)
    with dry_run() as dry:
        model = prepared(PlannedGroup(2, 0, dry.work))
        activations.move_from_meta(model)
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter)
        planned = activations.step(model, batch, dry)
    assert planned.peak == pytest.approx(real.peak, rel=0.05)
    assert planned.saved == pytest.approx(real.saved, rel=0.05)


def test_exchanges_take_time_that_nothing_hides() -> None:
    """Three pairs of 4 GB on four workers of a node at 100 GB/s, three quarters of which go to others."""
    weights = Weights((Weight(8, 16, False, False),), 2, 8)
    work = Work({}, exchanged=4 * 10**9)
    load = Load(2, 8, 3, 1, together=4)
    assert step_time(work, weights, "adamw", load, GPU, RATES).communication == pytest.approx(3 * 3 / 100)
    slow = replace(RATES, gpus_per_node=2)
    assert step_time(work, weights, "adamw", load, GPU, slow).communication == pytest.approx(3 * 3 / 10)
    assert step_time(work, weights, "adamw", replace(load, together=1), GPU, RATES).communication == 0


def planner_by_hand(together: int) -> Planner:
    """12 pairs per step, of 1,000 tokens. A worker has 5 MB of FLOPs of vision and 15 of language for each."""
    vision, language = Work({Matmul(1, 10, 10, 25_000, "m"): 1}), Work({Matmul(1, 10, 10, 75_000, "m"): 1})
    pairs = 2 * together
    of_pairs = Activations(1000 * pairs, (0, 0, 1000 * pairs + 100, 0), vision.plus(language), pairs, 1000 * pairs,
                           vision_work=vision)  # fmt: skip
    weights, setting = Weights((Weight(8, 16, True, True),), 2, 8), Setting(4, 0, "none", 2000)
    sizes = (2000, 900, 10, 12)
    modes = dict.fromkeys(MODES, of_pairs)
    return Planner(weights, "adamw", modes, *sizes, RATES, setting, None, False, Offload(), together)


def test_the_step_of_a_group_by_hand() -> None:
    """Two groups of two: six pairs each, in micro-batches of four; four workers alone: three each, of two."""
    group, alone = planner_by_hand(2), planner_by_hand(1)
    setting = group.recipe
    work = group.activations["none"].work
    for planner, load in ((group, Load(0, 4, 6, 4, 2)), (alone, Load(0, 4, 3, 2))):
        expected = step_time(work, planner.weights, "adamw", load, GPU, RATES)
        assert planner.step_time(GPU, setting) == expected
    assert alone.pair_flops == 20_000_000
    assert group.pair_flops == 5_000_000 + 2 * 15_000_000
    # Activations are those of the whole budget of a group; half of it halves them, down to the longest pair.
    memory = [group.memory(replace(setting, budget=budget)) for budget in (2000, 1000, 100)]
    assert [each.activations for each in memory] == [4000, 2000, 900]
    temporary = memory[0].activations + memory[0].head + memory[0].buffers
    assert memory[0].overhead - memory[1].overhead == pytest.approx(FRAGMENTATION * 2000)
    assert temporary == 4100


def test_the_cheapest_setting_has_whole_groups() -> None:
    group = planner_by_hand(3).cheapest(GPU)
    assert group is not None
    assert group.setting.workers % 3 == 0
    assert group.setting.budget <= 2000


def recipe_of(folder: Path, model: str = "orpo-ray/tiny-smolvlm", **scaling: int) -> Recipe:
    return parse_recipe(
        {
            "name": "x",
            "model": {"id": model, "gradient_checkpointing": "none"},
            "data": {"train": "none", "max_length": 2048},
            "optim": {"tokens_per_microbatch": 1024, "pairs_per_step": 64},
            "scaling": scaling,
            "checkpoint": {"storage": str(folder)},
        }
    )


def test_a_plan_of_groups(tmp_path: Path) -> None:
    """Two groups of two: pairs of 508 tokens, as many in a micro-batch as twice the budget of 1,024 holds."""
    report = plan(recipe_of(tmp_path, num_workers=4, sequence_parallel=2), Options())
    step = report["step"]
    assert (step["pair"]["tokens"], step["pairs_per_microbatch"]) == (508, 4)
    assert (step["microbatches_per_worker"], step["workers_per_microbatch"]) == (8, 2)
    assert any("2 workers compute each micro-batch together" in line for line in report["assumptions"])
    said = Console(file=io.StringIO(), width=120)
    print_plan(report, said)
    assert "64 pairs, 32,512 tokens: 4 workers in groups of 2 x 8 micro-batches of 4 pairs" in said.file.getvalue()


def test_models_that_cannot_be_divided_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot be divided among 3 workers"):
        plan(recipe_of(tmp_path, num_workers=3, sequence_parallel=3), Options())
