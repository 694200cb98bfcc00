"""Count the collectives of a training step, and the bytes of a checkpoint, by ZeRO stage and number of gloo workers.

    python benchmarks/collectives.py [--workers 1,2,4,8] [--stages 0,1,2,3] [--microbatches N] [--steps N] [--json]

Each worker is a process with the real engine and a tiny SmolVLM in bfloat16. A dispatch mode sees every collective
that reaches torch's process group, whoever calls it, so nothing of DeepSpeed or torch is replaced. `payload` is the
size of the whole tensor that a collective works on: what is reduced, or what has been gathered. `formula` is what
`orpo_ray/planning/traffic.py`, and so `orpo-ray plan`, expects for the same model. Steps per second are of processes
that share this machine's cores: they say nothing about a cluster.

After the steps, all workers save a checkpoint as a run does. `checkpoint` is the size of each worker's files by their
manifests, by rank, and `expected` is what the engine expects (`checkpoint_bytes`).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from machine import provenance

MODEL = "orpo-ray/tiny-smolvlm"
# The name of a collective in torch, its name here, and which of its arguments holds the whole tensor.
COLLECTIVES = {
    "allreduce_": ("all-reduce", 0),
    "allreduce_coalesced_": ("all-reduce", 0),
    "reduce_": ("reduce", 0),
    "broadcast_": ("broadcast", 0),
    "allgather_": ("all-gather", 0),
    "_allgather_base_": ("all-gather", 0),
    "allgather_into_tensor_coalesced_": ("all-gather", 0),
    "reduce_scatter_": ("reduce-scatter", 1),
    "_reduce_scatter_base_": ("reduce-scatter", 1),
    "reduce_scatter_tensor_coalesced_": ("reduce-scatter", 1),
}


def counting_mode() -> Any:
    """Return a dispatch mode whose `calls` and `payload` count collectives by name."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_flatten

    class CountCollectives(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.calls: Counter[str] = Counter()
            self.payload: Counter[str] = Counter()

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.namespace == "c10d" and func._opname in COLLECTIVES:
                name, which = COLLECTIVES[func._opname]
                tensors = [each for each in tree_flatten(args[which])[0] if isinstance(each, torch.Tensor)]
                self.calls[name] += 1
                self.payload[name] += sum(tensor.nbytes for tensor in tensors)
            return func(*args, **(kwargs or {}))

    return CountCollectives()


def work(rank: int, workers: int, stages: list[int], microbatches: int, steps: int, folder: str, pipe: Any) -> None:
    """Train a few steps on one worker at each stage, and send what rank 0 counted."""
    log = os.open(f"{folder}/rank-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(workers), "LOCAL_RANK": "0"}
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store-{workers}", workers)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=workers)
    for stage in stages:
        counted = train(rank, workers, stage, microbatches, steps, folder)
        if rank == 0:
            pipe.send(counted)
    dist.barrier()
    os._exit(0)  # gloo's threads may abort a process that ends by itself


def train(rank: int, workers: int, stage: int, microbatches: int, steps: int, folder: str) -> dict[str, Any]:
    """Train a few steps and save. Count the last step's collectives, and compute what the formulas expect."""
    import torch

    from orpo_ray.config.load import parse_recipe
    from orpo_ray.model.loading import load_model
    from orpo_ray.objective.base import Normaliser
    from orpo_ray.objective.orpo import ORPO
    from orpo_ray.objective.pair_model import PairModel
    from orpo_ray.planning.activations import NORM, PairShape, batch_of
    from orpo_ray.planning.images import image_shape
    from orpo_ray.planning.states import Weights
    from orpo_ray.planning.traffic import collectives
    from orpo_ray.training.engine import make_engine

    recipe = parse_recipe(
        {"name": f"{workers}-workers-stage-{stage}", "checkpoint": {"storage": folder},
         "model": {"id": MODEL, "dtype": "bfloat16"}, "data": {"train": "none"},
         "deepspeed": {"zero_stage": stage}, "optim": {"warmup": 0, "pairs_per_step": workers * microbatches}}
    )  # fmt: skip
    model = PairModel(load_model(recipe.model, torch.device("cpu"), seed=0), NORM)
    config: Any = model.model.config
    weights = Weights.of(model.model, recipe.model, torch.bfloat16, config.get_text_config().hidden_size)
    image = image_shape(config)
    shape = PairShape(16, 24, 20, 1, image.tokens, image.vision)
    engine: Any = make_engine(model, recipe, steps, workers)
    batch = batch_of(shape, 1, config, "response", model.layout)

    def step() -> None:
        for _ in range(microbatches):
            loss, _ = ORPO(0.1).loss(engine.forward(batch), batch.weights, Normaliser(float(workers * microbatches)))
            engine.backward(loss)
        engine.step()

    for _ in range(steps - 1):  # ZeRO-3 records its order of weights in the first steps
        step()
    started = time.perf_counter()
    with counting_mode() as counted:
        step()
    seconds = time.perf_counter() - started
    saved = save(engine, recipe, steps, rank, workers)
    if stage:
        engine.deepspeed.destroy()
    expected: Counter[str] = Counter()
    for each in collectives(weights, stage, microbatches):  # type: ignore[arg-type]
        expected[each.kind] += each.payload
    return {
        "workers": workers,
        "stage": stage,
        "parameters": weights.total,
        "calls": dict(counted.calls),
        "payload": dict(counted.payload),
        "formula": dict(expected),
        **saved,
        "steps_per_s": round(1 / seconds, 3),
    }


def save(engine: Any, recipe: Any, step: int, rank: int, workers: int) -> dict[str, list[int]]:
    """Save a checkpoint; return by rank the bytes of each worker's files, and those that its engine expects."""
    from orpo_ray.objective.collectives import gather_objects
    from orpo_ray.storage.run_folder import RunFolder
    from orpo_ray.training.checkpoint import Position
    from orpo_ray.training.checkpoint_choice import checkpoint_names
    from orpo_ray.training.manifest import check_sizes
    from orpo_ray.training.saving import Saver

    run = RunFolder(recipe.run_uri)
    run.make()
    expected = gather_objects(engine.checkpoint_bytes)
    Saver(recipe, engine, rank, workers, workers).save(engine, Position(step, num_workers=workers))
    (name,) = checkpoint_names(run)
    return {"checkpoint": [manifest.num_bytes for manifest in check_sizes(run, name)], "expected": expected}


def measure(workers: int, stages: list[int], microbatches: int, steps: int, folder: str) -> Iterator[dict[str, Any]]:
    """Run all stages in one group of new processes."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["deepspeed", "transformers.models.smolvlm", "orpo_ray.training.deepspeed_engine"])
    ours, theirs = context.Pipe()
    arguments = (workers, stages, microbatches, steps, folder, theirs)
    processes = [context.Process(target=work, args=(rank, *arguments), daemon=True) for rank in range(workers)]
    for process in processes:
        process.start()
    theirs.close()
    try:
        for _ in stages:
            yield ours.recv()
    except EOFError:
        raise SystemExit((Path(folder) / "rank-0.log").read_text()[-3000:]) from None
    finally:
        for process in processes:
            process.join(timeout=30)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", default="1,2,4,8")
    parser.add_argument("--stages", default="0,1,2,3")
    parser.add_argument("--microbatches", type=int, default=2, help="micro-batches per worker and step")
    parser.add_argument("--steps", type=int, default=3, help="of which the last is counted; 1 suffices for checkpoints")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    arguments = parser.parse_args()
    stages = [int(stage) for stage in arguments.stages.split(",")]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for workers in map(int, arguments.workers.split(",")):
            for row in measure(workers, stages, arguments.microbatches, arguments.steps, folder):
                rows.append(row)
                if not arguments.json:
                    print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)
    result = provenance() | {"microbatches": arguments.microbatches, "rows": rows}
    for row in rows:
        for kind, payload in row["payload"].items():
            if expected := row["formula"].get(kind):
                result[f"{row['workers']} workers, stage {row['stage']}, {kind}: counted_to_formula_ratio"] = (
                    payload / expected
                )
    print(json.dumps(result) if arguments.json else "\n".join(f"{k:12} {v}" for k, v in provenance().items()))


if __name__ == "__main__":
    main()
