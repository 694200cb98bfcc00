"""How long a device waits between two steps: from the end of a step's last backward pass to the next forward pass.

    python benchmarks/step_gap.py [--steps N] [--pairs N] [--tiles N] [--json]

Trains the tiny SmolVLM on pairs with images of its size, from an Arrow block as the object store holds it. Two ways,
in turn, on the same steps:

  in turn: the training thread plans a step and builds its tensors when the step before has ended
  ahead:   a thread does so while the step before trains, as runs do

The optimizer's step lies in the gap and is measured apart. `gap_ratio` is ahead to in turn, both without the optimizer.

`worker_ms` is the same gap in the real training program (metrics, requests and logging included), without its engine's
calls: what the training thread does while a GPU has no next forward pass yet. On a CPU only; `make gpu` measures how
long a GPU is idle.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from machine import ROOT, provenance

sys.path.insert(0, str(ROOT / "tests"))  # the worker without Ray, which tests use too

from orpo_ray.config.load import parse_recipe
from orpo_ray.config.schema import ModelConfig
from orpo_ray.data.balance import StepShare
from orpo_ray.data.encoded_columns import from_arrow, to_arrow
from orpo_ray.data.encoding import EncodedPair, PairEncoder
from orpo_ray.model.loading import load_model
from orpo_ray.objective.orpo import ORPO
from orpo_ray.objective.pair_model import PairModel
from orpo_ray.objective.step_planner import StepPlan, StepPlanner
from orpo_ray.processing.pixel_norm import PixelNorm
from orpo_ray.processing.processor import load_processor
from orpo_ray.training.ahead import on_device, one_ahead, pinned
from support.worker_alone import make_worker, plan_step, train_step

TINY = "orpo-ray/tiny-smolvlm"
TOKENS = 4096


def make_steps(encoder: PairEncoder, pairs: int, tiles: int, steps: int) -> list[list[EncodedPair]]:
    """Return the pairs of each step: as many image tokens per tile as the model has, answers of random lengths."""
    rng = np.random.default_rng(0)
    like = encoder.dummy_pair(with_image=True)
    found = []
    for _ in range(steps):
        step = []
        for index in range(pairs):
            images = {
                name: np.concatenate([value] * tiles) if name == "pixel_values" else value
                for name, value in like.images.items()
            }
            prompt = np.concatenate([like.prompt_ids] * tiles)
            answers = [rng.integers(10, 200, rng.integers(10, 120)).astype(np.int32) for _ in range(2)]
            is_text = np.concatenate([like.prompt_is_text] * tiles)
            step.append(EncodedPair(str(index), prompt, *answers, is_text, images, index))
        found.append(step)
    return found


def gaps(
    model: PairModel, planner: StepPlanner, steps: list[list[EncodedPair]], around: Callable[..., Iterable[StepPlan]]
) -> tuple[list[float], list[float]]:
    """Train the steps. Returns the seconds between backward and forward, and the optimizer's part, of each gap."""
    objective, device = ORPO(), planner.device
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-5)
    blocks = [to_arrow(list(range(len(step))), step) for step in steps]

    def plans() -> Iterator[StepPlan]:
        for number, block in enumerate(blocks):
            share: StepShare = planner.share(from_arrow(block), step=number)
            plan = planner.plan(share)
            yield replace(plan, batches=pinned(plan.batches, device))

    waits, updates = [], []
    ended: float | None = None
    for plan in around(plans()):
        for batch in on_device(plan.batches, device):
            if ended is not None:
                waits.append(time.perf_counter() - ended)
                ended = None
            loss, _ = objective.loss(model(batch), batch.weights, plan.normaliser)
            loss.backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        ended = time.perf_counter()
        optimizer.step()
        optimizer.zero_grad()
        updates.append(time.perf_counter() - ended)
    return waits, updates[:-1]


def worker_gaps(steps: list[list[EncodedPair]]) -> list[float]:
    """Train the steps in a real worker. Returns the seconds of each gap that no call of its engine takes."""
    import torch.distributed as dist

    with tempfile.TemporaryDirectory() as folder:
        raw = {"name": "gap", "model": {"id": TINY}, "data": {"train": "easy-vqa:train"}}
        recipe = parse_recipe(raw | {"checkpoint": {"storage": folder}, "optim": {"tokens_per_microbatch": TOKENS}})
        dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 1), rank=0, world_size=1)
        worker = make_worker(recipe, torch.device("cpu"), num_steps=len(steps))
        calls = timed(worker.engine)
        for step, plan in enumerate([plan_step(worker, pairs, number) for number, pairs in enumerate(steps)]):
            calls.append(("next", step, step))
            train_step(worker, plan)
        dist.destroy_process_group()
    found = []
    for number in range(len(steps) - 1):
        begin, end = (calls.index(("next", step, step)) for step in (number, number + 1))
        last = max(place for place in range(begin, end) if calls[place][0] == "backward")
        in_engine = sum(stop - start for _, start, stop in calls[last + 1 : end])
        found.append(calls[end + 1][1] - calls[last][2] - in_engine)
    return found


def timed(engine: Any) -> list[tuple[str, float, float]]:
    """Let an engine's calls be noted, with their begin and end."""
    calls: list[tuple[str, float, float]] = []

    def noted(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            begin = time.perf_counter()
            out = call(*args)
            calls.append((name, begin, time.perf_counter()))
            return out

        return run

    for name in ("forward", "backward", "reduce_gradient", "update_weights"):
        setattr(engine, name, noted(name, getattr(engine, name)))
    return calls


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--tiles", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    encoder = PairEncoder(load_processor(TINY, None), max_length=2048)
    model = PairModel(load_model(ModelConfig(id=TINY), device, seed=0), PixelNorm.of(encoder.processor))
    planner = StepPlanner.of(ORPO(), TOKENS, encoder, model, device)
    steps = make_steps(encoder, arguments.pairs, arguments.tiles, arguments.steps)
    ways: dict[str, Callable[..., Iterable[StepPlan]]] = {
        "in_turn": lambda plans: plans,
        "ahead": lambda plans: one_ahead(plans, device),
    }
    without: dict[str, list[float]] = {name: [] for name in ways}
    updates: list[float] = []
    for _ in range(arguments.rounds):
        for name, around in ways.items():
            waits, optimizer = gaps(model, planner, steps, around)
            without[name] += [wait - update for wait, update in zip(waits, optimizer, strict=True)]
            updates += optimizer
    medians = {name: statistics.median(values) for name, values in without.items()}
    row = provenance() | {f"{name}_ms": round(value * 1000, 3) for name, value in medians.items()}
    row |= {"optimizer_ms": round(statistics.median(updates) * 1000, 3)}
    if device.type == "cpu":
        row |= {"worker_ms": round(statistics.median(worker_gaps(steps)) * 1000, 3)}
    row |= {"gap_ratio": round(medians["ahead"] / medians["in_turn"], 4)}
    print(json.dumps(row) if arguments.json else "\n".join(f"{name:16} {value}" for name, value in row.items()))


if __name__ == "__main__":
    main()
