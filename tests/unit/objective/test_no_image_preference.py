"""A recipe whose image preference has weight 0 makes the step of one without it, bit by bit, from rows to gradients."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from orpo_ray.config.load import parse_recipe
from orpo_ray.data.encoding import EncodedPair
from orpo_ray.data.from_recipe import encoder_of, run_data
from orpo_ray.data.packing import PairBatch
from orpo_ray.data.reading import read_windows
from orpo_ray.model.loading import load_model
from orpo_ray.objective.base import load_objective
from orpo_ray.objective.pair_model import PairModel
from orpo_ray.objective.step_planner import StepPlanner
from orpo_ray.processing.pixel_norm import PixelNorm
from orpo_ray.streaming.pipeline import encode_rows
from support.tiny_runs import write_pairs

CPU = torch.device("cpu")
PAIRS = 6


@dataclasses.dataclass
class Step:
    """What a step computes with."""

    batches: list[PairBatch]
    losses: list[torch.Tensor]
    sums: list[Any]
    gradients: dict[str, torch.Tensor | None]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows about images; every second one has images of the rejected answer too."""
    path = write_pairs(tmp_path_factory.mktemp("rows"), PAIRS)
    read = [json.loads(line) for line in path.read_text().splitlines()]
    for place in range(0, PAIRS, 2):
        read[place]["rejected_images"] = read[place + 1]["images"]
    path.write_text("".join(json.dumps(row) + "\n" for row in read))
    return path


def step_of(rows: Path, attention: str = "auto", **orpo: Any) -> Step:
    """Make the first step of a run: read, encode, pack, forward, loss, backward."""
    recipe = parse_recipe(
        {
            "name": "x",
            "model": {"id": "orpo-ray/tiny-smolvlm", "attention": attention},
            "data": {"train": str(rows), "max_length": 128, "shuffle_seed": 3},
            "orpo": {"beta": 0.5, **orpo},
            "optim": {"pairs_per_step": PAIRS, "tokens_per_microbatch": 128},
        }
    )
    train, _ = run_data(recipe)
    table_rows = [row for table in read_windows(train, train.order.windows(0, PAIRS)) for row in table.to_pylist()]
    encoder = encoder_of(recipe).build()
    pairs = [
        dataclasses.replace(pair, sample_index=row["sample_index"])
        for row, pair in zip(table_rows[:PAIRS], encode_rows(table_rows[:PAIRS], encoder), strict=True)
        if isinstance(pair, EncodedPair)
    ]
    assert len(pairs) == PAIRS
    model = PairModel(load_model(recipe.model, CPU, 0), PixelNorm.of(encoder.processor))
    objective = load_objective(recipe)
    planner = StepPlanner.of(objective, recipe.optim.tokens_per_microbatch, encoder, model, CPU)
    plan = planner.plan(planner.share(pairs))
    step = Step(plan.batches, [], [], {})
    for batch in plan.batches:
        loss, sums = objective.loss(model(batch), batch.weights, plan.normaliser)
        loss.backward()  # type: ignore[no-untyped-call]
        step.losses.append(loss.detach())
        step.sums.append(sums)
    step.gradients = {name: weight.grad for name, weight in model.named_parameters()}
    return step


def differences(one: Any, other: Any, name: str = "step") -> list[str]:
    """Name everything in which two values do not have the same bits."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return [] if one.dtype == other.dtype and torch.equal(one, other) else [name]
    if type(one) is not type(other):
        return [name]
    if dataclasses.is_dataclass(one):
        return differences(vars(one), vars(other), name)
    if isinstance(one, dict):
        found = [name] if list(one) != list(other) else []
        return found + [each for key in one.keys() & other.keys() for each in differences(one[key], other[key], key)]
    if isinstance(one, (list, tuple)):
        found = [name] if len(one) != len(other) else []
        return found + [each for two in zip(one, other, strict=False) for each in differences(*two, name)]
    return [] if one == other else [name]


@pytest.mark.parametrize("attention", ["auto", "concatenated"])
@pytest.mark.parametrize("other_image", ["exchange", "column", "noise"])
def test_a_weight_of_0_changes_no_bit_of_a_step(rows: Path, other_image: str, attention: str) -> None:
    plain = step_of(rows, attention)
    assert len(plain.batches) > 1
    assert differences(plain, step_of(rows, attention, image_beta=0, other_image=other_image, anchor=1.0)) == []
    on = step_of(rows, attention, image_beta=0.5, other_image=other_image, anchor=1.0)
    assert {"batches", "losses", "sums", "gradients"} == {
        field.name
        for field in dataclasses.fields(Step)
        if differences(getattr(plain, field.name), getattr(on, field.name))
    }
    assert any(batch.pairs.other is not None for batch in on.batches)
