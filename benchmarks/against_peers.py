"""Measure complete training steps with a probe that is also used in other trainers.

    python benchmarks/against_peers.py MODEL PAIRS --probe PROBE [--steps N] [--pairs N]

MODEL: a model folder. PAIRS: JSONL of {id, image, prompt, chosen, rejected}, images relative to it, taken in order.
PROBE: a Python file with train_begin(), step_begin(), batch(dict), step_end(loss) and finish(model), which writes
$PROBE_OUT. Runs the training program without Ray: encoding, packing, forward, loss, backward, and the DeepSpeed engine
with clipping and AdamW. See against_peers.md for the comparison.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from orpo_ray.config.load import parse_recipe
from orpo_ray.config.recipe import Recipe
from orpo_ray.data.encoding import EncodedPair, PairEncoder
from orpo_ray.data.pairs import PreferencePair
from orpo_ray.model.loading import load_model
from orpo_ray.objective.base import load_objective
from orpo_ray.objective.pair_model import PairModel
from orpo_ray.objective.step_planner import StepPlanner
from orpo_ray.processing.pixel_norm import PixelNorm
from orpo_ray.processing.processor import load_processor
from orpo_ray.training.engine import make_engine


def recipe_of(arguments: argparse.Namespace) -> Recipe:
    """Return the settings that all trainers use."""
    return parse_recipe(
        {
            "name": "against-peers",
            "model": {"id": arguments.model, "attention": arguments.attention},
            "data": {"train": "none", "max_length": 4096},
            "orpo": {"beta": 0.1},
            "optim": {
                "learning_rate": 5e-6,
                "schedule": "constant",
                "warmup": 0,
                "pairs_per_step": arguments.pairs,
                "tokens_per_microbatch": 4096,
            },
        }
    )


def encode(row: dict[str, Any], root: Path, encoder: PairEncoder) -> EncodedPair:
    """Decode and encode a row in this process, as the loaders of other trainers do. The image goes before the text."""
    content = [{"type": "image"}, {"type": "text", "text": row["prompt"]}]
    image = {"bytes": (root / row["image"]).read_bytes(), "path": None}
    prompt = [{"role": "user", "content": content}]
    (pair,) = encoder.encode_many([PreferencePair(row["id"], [image], prompt, row["chosen"], row["rejected"])], [None])
    if not isinstance(pair, EncodedPair):
        raise pair
    return pair


def main() -> None:
    """Train, and let the probe write its measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("--probe", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--attention", default="auto", choices=["auto", "concatenated"])
    arguments = parser.parse_args()
    spec = importlib.util.spec_from_file_location("probe", arguments.probe)
    assert spec is not None
    assert spec.loader is not None
    probe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(probe)

    torch.set_num_threads(arguments.threads)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=os.environ.get("MASTER_PORT", "29591"))
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    dist.init_process_group("gloo", rank=0, world_size=1)
    recipe, device = recipe_of(arguments), torch.device("cpu")
    encoder = PairEncoder(load_processor(arguments.model, None), recipe.data.max_length)
    model = PairModel(load_model(recipe.model, device, seed=0), PixelNorm.of(encoder.processor))
    objective = load_objective(recipe)
    planner = StepPlanner.of(objective, recipe.optim.tokens_per_microbatch, encoder, model, device)
    engine = make_engine(model, recipe, arguments.steps, num_workers=1)
    rows = [json.loads(line) for line in arguments.data.open(encoding="utf-8")]

    probe.train_begin()
    for step in range(arguments.steps):
        chosen = [rows[(step * arguments.pairs + k) % len(rows)] for k in range(arguments.pairs)]
        pairs = [encode(row, arguments.data.parent, encoder) for row in chosen]
        probe.step_begin()
        plan = planner.plan(planner.share(pairs))
        total = 0.0
        for batch in plan.batches:
            probe.batch({"input_ids": batch.input_ids})
            loss, _ = objective.loss(engine.forward(batch), batch.weights, plan.normaliser)
            engine.backward(loss)
            total += loss.item()
        engine.step()
        probe.step_end(total)
        print(step, probe.R["steps"][-1], flush=True)
    probe.finish(model.model)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
