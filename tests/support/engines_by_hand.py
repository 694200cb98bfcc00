"""Run recipes through the real engine without Ray, and return losses and gradient norms, for any number of workers."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash

from orpo_ray.config.load import parse_recipe
from orpo_ray.config.recipe import Recipe
from orpo_ray.data.balance import Packing
from orpo_ray.data.encoding import EncodedPair
from orpo_ray.model.sequence_group import SequenceGroup
from orpo_ray.objective.base import load_objective
from orpo_ray.objective.collectives import reduce_sums
from orpo_ray.objective.pair_model import PairModel
from orpo_ray.objective.step_planner import StepPlanner
from orpo_ray.training import deepspeed_engine
from orpo_ray.training.engine import Engine, make_engine
from orpo_ray.training.sharded_loading import load_for_training
from support.engine_memory import end_engine, optimizer_of
from support.pairs_by_hand import NORM, make_pair
from support.trees_by_hand import all_kinds, four_answers
from support.worker_group import worker_group

FAMILY = "smolvlm"
STEPS = 4
CPU = torch.device("cpu")


def recipe_of(**sections: Any) -> Recipe:
    """Return a recipe for the tiny model, with 2 pairs per step."""
    raw: dict[str, Any] = {
        "name": "x",
        "model": {"id": f"orpo-ray/tiny-{FAMILY}"},
        "data": {"train": "none"},
        "optim": {"learning_rate": 1e-2, "warmup": 0, "pairs_per_step": 2},
    }
    for section, values in sections.items():
        raw[section] = {**raw.get(section, {}), **values}
    return parse_recipe(raw)


def two_pairs(contrasted: bool = False) -> list[EncodedPair]:
    """Return a step of two pairs with one image each; if `contrasted`, the first has another image too."""
    rng = np.random.default_rng(0)
    lengths = [(12, 9), (5, 7)]
    pairs = [make_pair(FAMILY, rng, 1, 6, *both, sample_index) for sample_index, both in enumerate(lengths)]
    return [replace(pairs[0], other_prompt=pairs[1].prompt), pairs[1]] if contrasted else pairs


def pairs_of(recipe: Recipe) -> list[EncodedPair]:
    """Return a step of two pairs. If the recipe takes all pairs of ranked answers, return a step of trees, whose
    pairs share their own images, those of the rejected answers, and those to contrast with.
    """
    if recipe.data.pairs_from_ranking == "best_worst":
        return two_pairs(recipe.other_image is not None)
    trees = [*four_answers(FAMILY), *all_kinds(FAMILY)]
    return [replace(pair, id=str(index), sample_index=index) for index, pair in enumerate(trees)]


class Training:
    """Model, planner and engine of a worker."""

    def __init__(
        self,
        recipe: Recipe,
        rank: int,
        num_workers: int,
        engine: Callable[..., Engine] = make_engine,
        num_steps: int = STEPS,
    ) -> None:
        cache = recipe.model.vision_cache
        base = load_for_training(recipe, CPU)
        self.model = PairModel(base, NORM, vision_cache=None if cache is None else Path(cache))
        pairs, self.objective = pairs_of(recipe), load_objective(recipe)
        shares = self.model.family.shares if recipe.data.group == "auto" else "nothing"
        packing, dummy = Packing(8192, self.model.layout, shares=shares), two_pairs()[1]
        self.planner = StepPlanner(self.objective, packing, dummy, dummy, CPU, self.model.collate)
        together = recipe.scaling.sequence_parallel
        if together > 1:
            self.model.group = SequenceGroup.join(together, 60.0)
            self.planner.group = self.model.group
        self.engine: Any = engine(self.model, recipe, num_steps, num_workers)
        self.share = self.planner.share(pairs, rank=rank // together, workers=num_workers // together)

    def step(self) -> list[float]:
        """Make a step; returns [loss, gradient norm] over all workers."""
        plan = self.planner.plan(self.share)
        for batch in plan.batches:
            loss, sums = self.objective.loss(self.engine.forward(batch), batch.weights, plan.normaliser)
            self.engine.backward(loss)
        norm = self.engine.step()
        return [reduce_sums(sums, CPU, self.planner.counts)["loss"], norm]


def curves(recipes: list[Recipe], num_workers: int, folder: Path) -> list[list[list[float]]]:
    """Return [loss, gradient norm] by step for each recipe."""
    found: list[list[list[float]]] = _spawned(_curve, recipes, num_workers, folder)
    return found


def resumed(recipes: list[Recipe], folder: Path) -> list[dict[str, Any]]:
    """For each recipe, on one worker: `tail`, its steps 3 and 4; `again`, the same from a checkpoint of step 2; and
    `moments`, the types of the optimizer's larger tensors after that.
    """
    found: list[dict[str, Any]] = _spawned(_resume, recipes, 1, folder)
    return found


def resumed_from_own_files(recipes: list[Recipe], folder: Path) -> list[dict[str, Any]]:
    """For each recipe, on the second of two workers: `tail`, its steps 3 and 4; `again`, the same from those files of a
    checkpoint of step 2 that the worker wants; and `files`, their names.
    """
    found: list[dict[str, Any]] = _spawned(_resume_from_own_files, recipes, 2, folder, rank=1)
    return found


def relay(recipes: list[Recipe], workers: Sequence[int], folder: Path) -> list[list[dict[str, Any]]]:
    """Make two steps with each number of workers in turn, from the checkpoint of the ones before.

    Returns for each recipe and number of workers: `curve`, [loss, gradient norm] by step; `begin` and `end`, digests of
    the whole state, by name of a weight.
    """
    found: list[list[dict[str, Any]]] = [[] for _ in recipes]
    for turn, number in enumerate(workers):
        leg = partial(_leg, turn=turn, num_steps=2 * len(workers))
        for legs, made in zip(found, _spawned(leg, recipes, number, folder), strict=True):
            legs.append(made)
    return found


def weights_after(recipes: list[Recipe], folder: Path) -> list[tuple[list[list[float]], dict[str, torch.Tensor]]]:
    """Return [loss, gradient norm] by step on one worker, and the weights after the last step, for each recipe."""
    found = _spawned(_weights, recipes, 1, folder)
    states = [torch.load(folder / f"{number}.pt", weights_only=True) for number in range(len(recipes))]
    return list(zip(found, states, strict=True))


def _spawned(
    worker: Callable[..., Any], recipes: list[Recipe], num_workers: int, folder: Path, rank: int = 0
) -> list[Any]:
    raw = [recipe.model_dump(mode="json") for recipe in recipes]
    found: list[Any] = worker_group(num_workers).run(_run, worker, raw, str(folder))[rank]
    return found


def _run(rank: int, num_workers: int, worker: Callable[..., Any], raw: list[dict[str, Any]], folder: str) -> list[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deepspeed_engine, "deepspeed_config", keeping_nothing(deepspeed_engine.deepspeed_config))
        return [worker(parse_recipe(recipe), rank, num_workers, f"{folder}/{n}") for n, recipe in enumerate(raw)]


def _curve(recipe: Recipe, rank: int, num_workers: int, _folder: str) -> list[list[float]]:
    training = Training(recipe, rank, num_workers)
    lines = [training.step() for _ in range(STEPS)]
    end_engine(training.engine)
    return lines


def _weights(recipe: Recipe, rank: int, num_workers: int, path: str) -> list[list[float]]:
    training = Training(recipe, rank, num_workers)
    lines = [training.step() for _ in range(STEPS)]
    state = training.engine.consolidated_weights(trained_only=recipe.model.lora is not None)
    torch.save(state, f"{path}.pt")
    end_engine(training.engine)
    return lines


def _resume(recipe: Recipe, rank: int, num_workers: int, folder: str) -> dict[str, Any]:
    training = Training(recipe, rank, num_workers)
    for _ in range(2):
        training.step()
    training.engine.save(Path(folder))
    tail = [training.step() for _ in range(2)]
    end_engine(training.engine)
    training = Training(recipe, rank, num_workers)
    training.engine.load(Path(folder))
    again = [training.step() for _ in range(2)]
    tensors = [v for state in optimizer_of(training.engine).state.values() for v in state.values()]
    moments = {str(v.dtype) for v in tensors if isinstance(v, torch.Tensor) and v.numel() >= 4096}
    end_engine(training.engine)
    return {"tail": tail, "again": again, "moments": sorted(moments)}


def _resume_from_own_files(recipe: Recipe, rank: int, num_workers: int, folder: str) -> dict[str, Any]:
    training = Training(recipe, rank, num_workers)
    for _ in range(2):
        training.step()
    _save_merged(training, folder, rank)
    tail = [training.step() for _ in range(2)]
    end_engine(training.engine)
    training = Training(recipe, rank, num_workers)
    files = [str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file()]
    own = Path(f"{folder}-own-{rank}")
    wanted = training.engine.files_to_load(files, num_workers)
    for file in wanted:
        (own / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(Path(folder) / file, own / file)
    training.engine.load(own)
    again = [training.step() for _ in range(2)]
    end_engine(training.engine)
    return {"tail": tail, "again": again, "files": sorted(Path(file).name for file in wanted)}


def _save_merged(training: Training, folder: str, rank: int) -> None:
    training.engine.save(Path(f"{folder}-{rank}"))  # each worker has a folder of its own until all are merged
    shutil.copytree(f"{folder}-{rank}", folder, dirs_exist_ok=True)
    torch.distributed.barrier()


def _leg(recipe: Recipe, rank: int, num_workers: int, folder: str, turn: int, num_steps: int) -> dict[str, Any]:
    training = Training(recipe, rank, num_workers, num_steps=num_steps)
    if turn:
        training.engine.load(Path(f"{folder}-{turn - 1}"))
    begin = _digests(training) if turn else {}
    curve = [training.step() for _ in range(2)]
    _save_merged(training, f"{folder}-{turn}", rank)
    end = _digests(training)
    end_engine(training.engine)
    return {"curve": curve, "begin": begin, "end": end}


def _digests(training: Training) -> dict[str, list[str]]:
    """Digests of every trained weight in float32 and of its moments, put together from all workers."""
    trained = {name: weight for name, weight in training.model.named_parameters() if weight.requires_grad}
    wholes = {name: _whole(training.engine, name, weight) for name, weight in trained.items()}
    return {
        name: [xxhash.xxh3_128_hexdigest(value.detach().contiguous().numpy().tobytes()) for value in whole]
        for name, whole in wholes.items()
    }


def _whole(engine: Any, name: str, weight: torch.nn.Parameter) -> list[torch.Tensor]:
    """A weight in float32 and its moments, except for 8-bit ones of DeepSpeed. A collective."""
    if not hasattr(engine, "deepspeed"):
        master = engine._masters[name]
        states = [value for value in engine.optimizer.state[master].values() if isinstance(value, torch.Tensor)]
        return [master, *(value for value in states if value.dim())]
    moments = () if hasattr(engine.deepspeed.basic_optimizer, "args") else ("exp_avg", "exp_avg_sq")
    if hasattr(weight, "ds_id"):
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        found = [safe_get_full_optimizer_state(weight, moment) for moment in moments]
        return [safe_get_full_fp32_param(weight), *found]
    zero = engine.deepspeed.optimizer
    groups = getattr(zero, "bf16_groups", None) or zero.bit16_groups
    (number,) = [number for number, group in enumerate(groups) if any(each is weight for each in group)]
    flat = zero.optimizer.param_groups[number]["params"][0]
    found = []
    for vector in (flat.detach(), *(zero.optimizer.state[flat][moment] for moment in moments)):
        whole = torch.zeros(weight.numel())
        if (mapping := weight._hp_mapping) is not None:  # type: ignore[attr-defined]
            inside, place = mapping.hp_fragment_address, mapping.lp_fragment_address
            whole[place.start : place.start + place.numel] = vector[inside.start : inside.start + inside.numel]
        torch.distributed.all_reduce(whole)
        found.append(whole)
    return found


def keeping_nothing(config: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """The same, but ZeRO-3 releases weights after each use. By default, it would keep all weights of this model."""
    limits = ("max_live_parameters", "max_reuse_distance", "param_persistence_threshold", "prefetch_bucket_size")

    def strict(*arguments: Any) -> dict[str, Any]:
        found = config(*arguments)
        found["zero_optimization"] |= {f"stage3_{limit}": 0 for limit in limits}
        return found

    return strict
