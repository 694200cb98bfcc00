"""Runs side by side against each of them alone: losses, gradient norms, weights and checkpoints."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from orpo_ray.config.recipe import Recipe
from orpo_ray.errors import UserError
from orpo_ray.training.divergence import MAX_SKIPPED
from orpo_ray.training.side_by_side import SideBySide, tokens_for, why_not_side_by_side
from support.device_waits import reads_of_values
from support.engines_by_hand import STEPS, Training, recipe_of

LORA = {"lora": {"r": 4}}
# AdamW divides a gradient by its size, so that rounding errors of tiny gradients count fully. A larger epsilon keeps
# them small.
CALM = {"learning_rate": 1e-2, "adam_epsilon": 1e-3}
RECIPES = {
    "plain": recipe_of(model=LORA, optim=CALM),
    "strong": recipe_of(model=LORA, orpo={"beta": 2.0}, optim=CALM | {"learning_rate": 3e-3, "schedule": "cosine"}),
    "wide": recipe_of(model={"lora": {"r": 8, "alpha": 4}}, optim=CALM | {"seed": 3, "weight_decay": 0.1, "warmup": 2}),
}


@pytest.fixture(autouse=True)
def process_group(tmp_path: Path) -> Iterator[None]:
    """A process group of this process."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Together:
    """Several recipes in one process, over the pairs of `Training`."""

    def __init__(self, recipes: dict[str, Recipe]) -> None:
        first = Training(next(iter(recipes.values())), 0, 1)
        self.side_by_side = SideBySide(recipes, first.model, STEPS)
        self.plan = first.planner.plan(first.share)
        self.planner, self.share = first.planner, first.share

    def step(self) -> dict[str, list[float]]:
        """As `Training.step`, whose loss is a sum over pairs."""
        results, pairs = self.side_by_side.train_step(self.plan), self.plan.pairs
        return {name: [pairs * each.metrics["loss"], each.metrics["grad_norm"]] for name, each in results.items()}

    def weights(self, name: str) -> dict[str, torch.Tensor]:
        return self.side_by_side.runs[name].engine.consolidated_weights(trained_only=True)


def weights_of(alone: Training) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = alone.engine.consolidated_weights(trained_only=True)
    return {name: weight for name, weight in state.items() if "lora_" in name}


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert list(found) == list(expected)
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-4, atol=1e-5, msg=name)


def test_every_run_equals_itself_alone_and_goes_on_alone(tmp_path: Path) -> None:
    alone = {name: Training(recipe, 0, 1) for name, recipe in RECIPES.items()}
    together = Together(RECIPES)
    curves: dict[str, list[list[float]]] = {name: [] for name in RECIPES}
    for step in range(STEPS):
        if step == 2:
            for name, run in together.side_by_side.runs.items():
                run.engine.save(tmp_path / name)
        for name, figures in together.step().items():
            curves[name].append(figures)
    for name, training in alone.items():
        assert curves[name] == [pytest.approx(training.step(), rel=1e-4) for _ in range(STEPS)], name
        assert_equal(together.weights(name), weights_of(training))
    # A checkpoint of one of them is one of a run of its own, and the other way round.
    resumed = Training(RECIPES["wide"], 0, 1)
    resumed.engine.load(tmp_path / "wide")
    tail = [resumed.step() for _ in range(2, STEPS)]
    assert curves["wide"][2:] == [pytest.approx(each, rel=1e-4) for each in tail]
    again = Together(RECIPES)
    for name, run in again.side_by_side.runs.items():
        run.engine.load(tmp_path / name)
    assert again.step() == {name: pytest.approx(curve[2], rel=1e-5) for name, curve in curves.items()}


def test_a_step_of_all_runs_reads_once() -> None:
    """After a first step, which also checks that images are used."""
    together = Together(RECIPES)
    together.step()
    with reads_of_values() as found:
        together.side_by_side.train_step(together.plan)
    assert len(found) == 1, found


def test_a_run_that_leaves_and_one_that_diverges_disturb_no_other() -> None:
    lost = recipe_of(model=LORA, optim={"learning_rate": 1e12, "max_grad_norm": 0.0})
    alone = Training(RECIPES["strong"], 0, 1)
    together = Together({"lost": lost, **RECIPES})
    seen = []
    for _ in range(MAX_SKIPPED + 3):
        results = together.side_by_side.train_step(together.plan)
        seen.append(set(results))
        assert results["strong"].metrics["loss"] == pytest.approx(alone.step()[0] / 2, rel=1e-4)
        if "lost" in results and results["lost"].diverged is not None:
            assert "not finite" in str(results["lost"].diverged)
        if len(seen) == 2:
            gone = weakref.ref(
                next(iter(together.side_by_side.runs["plain"].engine.optimizer.param_groups[0]["params"]))
            )
            together.side_by_side.leave("plain")
            gc.collect()
            assert gone() is None
    assert seen[0] == {"lost", *RECIPES}
    assert seen[2] == {"lost", "strong", "wide"}
    assert seen[-1] == {"strong", "wide"}
    assert_equal(together.weights("strong"), weights_of(alone))


def test_a_base_in_four_bits_serves_all() -> None:
    recipes = {
        name: recipe_of(model=LORA | {"quantization": {}}, orpo={"beta": beta}, optim=CALM)
        for name, beta in (("low", 0.1), ("high", 1.0))
    }
    alone = {name: Training(recipe, 0, 1) for name, recipe in recipes.items()}
    together = Together(recipes)
    for _ in range(2):
        found = together.step()
        assert found == {name: pytest.approx(training.step(), rel=1e-4) for name, training in alone.items()}
    for name, training in alone.items():
        assert_equal(together.weights(name), weights_of(training))


@pytest.mark.parametrize(
    "data",
    [{}, pytest.param({"pairs_from_ranking": "all", "group": "auto"}, marks=pytest.mark.nightly)],
    ids=["pairs", "trees"],
)
def test_runs_with_an_image_preference_equal_themselves_alone(data: dict[str, str]) -> None:
    """Its weight and the anchor are a run's own, and the other images are those of all."""
    recipes = {
        name: recipe_of(model=LORA, orpo=orpo, optim=CALM, data=data)
        for name, orpo in (("low", {"image_beta": 0.1}), ("high", {"image_beta": 2.0, "anchor": 1.0}))
    }
    alone = {name: Training(recipe, 0, 1) for name, recipe in recipes.items()}
    together = Together(recipes)
    for _ in range(STEPS):
        found = together.step()
        assert found == {name: pytest.approx(training.step(), rel=1e-5) for name, training in alone.items()}
    assert found["high"][0] > 1.1 * found["low"][0]
    for name, training in alone.items():
        assert_equal(together.weights(name), weights_of(training))


def test_held_out_pairs_are_scored_for_every_run_at_once() -> None:
    together = Together(RECIPES)
    before = together.step()
    scores = together.side_by_side.evaluate(iter([together.share]), together.planner)
    after = together.step()
    assert {name: each.metrics["loss"] for name, each in scores.items()} == {
        name: pytest.approx(figures[0] / 2, rel=1e-5) for name, figures in after.items()
    }
    assert before != after
    assert all(each.pairs.num_rows == 2 for each in scores.values())


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"optim": {"pairs_per_step": 4}}, "optim.pairs_per_step"),
        ({"orpo": {"nll": "prompt+response"}}, "orpo.nll"),
        ({"data": {"shuffle_seed": 5}}, "data.shuffle_seed"),
        ({"model": {"lora": {"r": 4, "target_modules": ["q_proj"]}}}, "model.lora.target_modules"),
    ],
)
def test_recipes_that_differ_in_more_are_refused(changes: dict[str, Any], why: str) -> None:
    recipes = [RECIPES["plain"], recipe_of(**{"model": LORA, **changes})]
    assert why_not_side_by_side(recipes) == f"they differ in {why}"


def test_what_cannot_be_shared_is_refused() -> None:
    assert why_not_side_by_side(list(RECIPES.values())) is None
    assert "model.lora is not set" in str(why_not_side_by_side([recipe_of()]))
    dropout = recipe_of(model={"lora": {"r": 4, "dropout": 0.1}})
    assert "dropout" in str(why_not_side_by_side([dropout, dropout]))
    with pytest.raises(UserError, match="side by side"):
        SideBySide({"a": dropout}, Training(dropout, 0, 1).model, STEPS)


def test_copies_of_a_micro_batch_fit_the_budget_of_one_run() -> None:
    assert tokens_for(recipe_of(optim={"tokens_per_microbatch": 8192}), 8) == 1024
