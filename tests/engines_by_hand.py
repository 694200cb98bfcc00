"""Several recipes through the real engine, without Ray: their losses and gradient norms on any number of workers."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from pairs_by_hand import NORM, make_pair

from orpo_ray.data.encoding import EncodedPair
from orpo_ray.model.loading import load_model
from orpo_ray.objective.forward import PairModel
from orpo_ray.objective.orpo import orpo_loss
from orpo_ray.objective.steps import StepPlanner, reduce_sums
from orpo_ray.recipe import Recipe, parse_recipe
from orpo_ray.training.deepspeed import Engine

FAMILY = "smolvlm"
CPU = torch.device("cpu")


def recipe_of(**sections: Any) -> Recipe:
    """A recipe for the tiny model: steps of 2 pairs."""
    raw: dict[str, Any] = {
        "name": "x",
        "model": {"id": f"orpo-ray/tiny-{FAMILY}"},
        "data": {"train": "none"},
        "optim": {"learning_rate": 1e-2, "warmup": 0, "pairs_per_step": 2},
    }
    for section, values in sections.items():
        raw[section] = {**raw.get(section, {}), **values}
    return parse_recipe(raw)


def share_of(rank: int, num_workers: int) -> list[EncodedPair]:
    """Two pairs with an image each, dealt out."""
    rng = np.random.default_rng(0)
    lengths = [(12, 9), (5, 7)]
    return [make_pair(FAMILY, rng, 1, 6, *both, slot) for slot, both in enumerate(lengths)][rank::num_workers]


class Training:
    """One worker's model, planner and engine."""

    def __init__(self, recipe: Recipe, rank: int, num_workers: int, steps: int) -> None:
        self.model = PairModel(load_model(recipe.model, CPU, seed=0), NORM)
        config = self.model.model.config
        fillers = share_of(0, 2) * 2
        vocabulary = config.get_text_config().vocab_size
        self.planner = StepPlanner("response", 8192, self.model.layout, vocabulary, fillers[0], fillers[1], CPU)
        self.engine = Engine(self.model, recipe, steps, num_workers)
        self.pairs = share_of(rank, num_workers)

    def step(self) -> list[float]:
        """[loss, gradient norm] of a step over all workers."""
        plan = self.planner.plan(self.pairs, 0)
        for batch in plan.batches:
            loss, sums = orpo_loss(self.engine.forward(batch), batch.weights, 0.1, plan.normaliser)
            self.engine.backward(loss)
        norm = self.engine.step()
        return [reduce_sums(sums, CPU)["loss"], norm]


def curves(recipes: list[Recipe], num_workers: int, folder: Path, steps: int = 4) -> list[list[list[float]]]:
    """Each recipe's [loss, norm] by step; an empty list for one whose engine raised."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    out = folder / f"{num_workers}.json"
    raw = [recipe.model_dump(mode="json") for recipe in recipes]
    mp.spawn(_worker, (num_workers, port, raw, steps, str(out)), num_workers)
    found: list[list[list[float]]] = json.loads(out.read_text())
    return found


def start_alone() -> None:
    """A process group of this process only."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        _start(0, 1, free.getsockname()[1])


def _start(rank: int, num_workers: int, port: int) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": "0"}
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(num_workers)}
    dist.init_process_group("gloo", rank=rank, world_size=num_workers)


def _worker(rank: int, num_workers: int, port: int, raw: list[dict[str, Any]], steps: int, out: str) -> None:
    _start(rank, num_workers, port)
    lines = []
    for recipe in map(parse_recipe, raw):
        training = Training(recipe, rank, num_workers, steps)
        lines.append([training.step() for _ in range(steps)])
        training.engine.ds.destroy()
    if rank == 0:
        Path(out).write_text(json.dumps(lines))
    dist.destroy_process_group()
