"""Steps per second of `orpo-ray train` with one worker against a bare loop of the same steps.

    python benchmarks/run_overhead.py [--rounds N] [--steps N] [--pairs N] [--threads N] [--width N] [--json]

  run:  `orpo-ray train` of the quickstart's model (or one of another width) and data, with all that a run does beside
        the step: Ray, reading and encoding, metrics of every step, progress, signals, the divergence guard, and four
        checkpoints
  bare: a loop in plain PyTorch over the same steps, whose tensors are in memory before it starts: forward, loss,
        backward, clipping and the same AdamW

Each is a process of its own; they run in turn. Steps are counted from the tenth to the last. `ratio` is the median of
the runs to that of the bare loops, and `ratio_of_best` the fastest to the fastest, which others on a shared machine
disturb least. The losses of both are compared, so that the steps are the same ones.

On a machine without a GPU, encoding the pairs takes cores from the training. `encoding_share` is the CPU time of that,
as a part of what the bare loop takes: what no implementation can avoid on the same cores. `checkpoint_share` is the
part of the run's time that its checkpoints take. With fewer `--threads` than cores, both train on some of the cores and
leave the others free, as training on a GPU does. With more `--width`, a step takes longer and encoding its pairs does
not, as with the models that people train.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from machine import ROOT, provenance

from orpo_ray.config.load import load_recipe
from orpo_ray.config.recipe import Recipe
from orpo_ray.tracking.jsonl import read_jsonl

FIRST = 10  # steps before it start the engine, the allocators and the data
POLL_S = 0.05
QUICKSTART_MODEL = "orpo-ray/tiny-smolvlm"


@dataclass(frozen=True)
class Setting:
    """What both change in the quickstart's recipe."""

    steps: int
    pairs: int
    threads: int
    model: str

    def overrides(self, storage: str) -> list[str]:
        """Return the fields of the recipe."""
        return [
            f"checkpoint.storage={storage}", f"model.id={self.model}", "data.eval=null",
            f"optim.max_steps={self.steps}",
            f"optim.pairs_per_step={self.pairs}", f"checkpoint.every_steps={self.steps // 4}", "scaling.num_workers=1",
            *([f"scaling.cpus_per_worker={self.threads}"] if self.threads < (os.cpu_count() or 1) else []),
        ]  # fmt: skip


def model_of_width(width: int, folder: Path) -> str:
    """Write the quickstart's model with another width of its language model, and six layers, for `model.id`."""
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    from orpo_ray.tiny_models.build import resolve

    there = resolve(QUICKSTART_MODEL)
    config = AutoConfig.from_pretrained(there)
    text = config.text_config
    text.hidden_size, text.intermediate_size, text.num_hidden_layers = width, 3 * width, 6
    text.head_dim = width // text.num_attention_heads
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    AutoProcessor.from_pretrained(there).save_pretrained(folder)
    return str(folder)


def measure_run(setting: Setting) -> dict[str, Any]:
    """Run `orpo-ray train` in its own Ray; return its steps per second and losses."""
    steps = setting.steps
    # Short, since the paths of Ray's sockets are limited.
    with tempfile.TemporaryDirectory(prefix="o-", ignore_cleanup_errors=True) as folder:
        path = Path(folder) / "quickstart" / "metrics.jsonl"
        recipe = str(ROOT / "recipes" / "quickstart.yaml")
        command = [sys.executable, "-m", "orpo_ray", "train", recipe, *setting.overrides(folder)]
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        environment |= {"PYTHONPATH": str(ROOT), "RAY_TMPDIR": folder}
        process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        seen: dict[int, float] = {}
        while process.poll() is None and steps not in seen:
            lines = path.read_bytes().count(b"\n") if path.exists() else 0
            seen.setdefault(lines, time.perf_counter())
            time.sleep(POLL_S)
        _, said = process.communicate()
        if process.returncode != 0:
            raise SystemExit(said)
        first = min(step for step in seen if step >= FIRST)
        lines = {line["step"]: line for line in read_jsonl(path) if "train/loss" in line}
    seconds = seen[steps] - seen[first]
    saving = sum(line["train/worker_checkpoint_seconds/0"] for step, line in lines.items() if step > first)
    return {
        "steps_per_s": (steps - first) / seconds,
        "losses": [line["train/loss"] for line in lines.values()],
        "checkpoint_share": saving / seconds,
    }


def measure_bare(setting: Setting) -> dict[str, Any]:
    """Run the bare loop in this process; return its steps per second, losses, and the seconds that encoding takes."""
    import torch

    from orpo_ray.data.from_recipe import encoder_of
    from orpo_ray.objective.base import load_objective
    from orpo_ray.objective.pair_model import PIXELS_AT_ONCE, PairModel
    from orpo_ray.objective.step_planner import StepPlanner
    from orpo_ray.processing.pixel_norm import PixelNorm
    from orpo_ray.training.auto_gradient_checkpointing import with_checkpointing
    from orpo_ray.training.optimizer import adamw, schedule
    from orpo_ray.training.sharded_loading import load_for_training

    steps, pairs = setting.steps, setting.pairs
    torch.set_num_threads(setting.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    recipe = load_recipe(ROOT / "recipes" / "quickstart.yaml", setting.overrides("/nowhere"))
    recipe = recipe.model_copy(update={"model": with_checkpointing(recipe, device)})
    bounded = recipe.model.gradient_checkpointing != "none"
    encoder = encoder_of(recipe).build()
    norm = PixelNorm.of(encoder.processor)
    model = PairModel(load_for_training(recipe, device), norm, PIXELS_AT_ONCE.get(device.type) if bounded else None)
    objective = load_objective(recipe)
    planner = StepPlanner.of(objective, recipe.optim.tokens_per_microbatch, encoder, model, device)
    began = time.process_time()
    encoded = list(encoded_pairs(recipe, encoder))
    encoding = time.process_time() - began
    shares = [planner.share(encoded[step * pairs : (step + 1) * pairs], step=step) for step in range(steps)]
    plans = [planner.plan(share) for share in shares]
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = adamw(trained, recipe.optim)
    rate = schedule(optimizer, recipe.optim, steps)
    model.train()
    losses = []
    began = 0.0
    for plan in plans:
        if plan.step == FIRST:
            began = time.perf_counter()
        total = 0.0
        for batch in (each.to(device) for each in plan.batches):
            loss, _ = objective.loss(model(batch), batch.weights, plan.normaliser)
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(trained, recipe.optim.max_grad_norm)
        optimizer.step()
        rate.step()
        optimizer.zero_grad()
        losses.append(total)
    seconds = time.perf_counter() - began
    return {
        "steps_per_s": (steps - FIRST) / seconds,
        "losses": losses,
        "encoding_share": encoding / steps / (setting.threads * seconds / (steps - FIRST)),
    }


def encoded_pairs(recipe: Recipe, encoder: Any) -> Iterator[Any]:
    """Yield the pairs of the run in its order."""
    from orpo_ray.data.from_recipe import run_data
    from orpo_ray.data.reading import read_tasks, read_windows
    from orpo_ray.streaming.pipeline import encode_rows

    read, _ = run_data(recipe)
    for windows in read_tasks(read):
        for table in read_windows(read, windows):
            yield from encode_rows(table.to_pylist(), encoder)


def bare_process(setting: Setting) -> dict[str, Any]:
    """Run the bare loop in a process of its own."""
    options = [f"--{name}={value}" for name, value in asdict(setting).items()]
    command = [sys.executable, __file__, "--bare", *options]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{Path(__file__).parent}"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of the training (default: all)")
    parser.add_argument("--width", type=int, help="of the language model (default: the quickstart's 128)")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--bare", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--model", default=QUICKSTART_MODEL, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.bare:
        setting = Setting(arguments.steps, arguments.pairs, arguments.threads, arguments.model)
        print(json.dumps(measure_bare(setting)))
        return
    with tempfile.TemporaryDirectory() as folder:
        model = arguments.model if arguments.width is None else model_of_width(arguments.width, Path(folder))
        compare(Setting(arguments.steps, arguments.pairs, arguments.threads, model), arguments.rounds, arguments.json)


def compare(setting: Setting, rounds: int, as_json: bool) -> None:
    """Measure both in turn, and print."""
    runs, loops = [], []
    for _ in range(rounds):
        loops.append(bare_process(setting))
        runs.append(measure_run(setting))
        off = max(abs(a - b) for a, b in zip(runs[-1]["losses"], loops[-1]["losses"], strict=True))
        print(f"run {runs[-1]['steps_per_s']:.3f}  bare {loops[-1]['steps_per_s']:.3f}  off {off:.1e}", file=sys.stderr)
    medians = {
        name: statistics.median(each["steps_per_s"] for each in found)
        for name, found in (("run", runs), ("bare", loops))
    }
    row = provenance() | {f"{name}_steps_per_s": round(value, 3) for name, value in medians.items()}
    row |= {"ratio": round(medians["run"] / medians["bare"], 4)}
    best = {name: max(each["steps_per_s"] for each in found) for name, found in (("run", runs), ("bare", loops))}
    row |= {"ratio_of_best": round(best["run"] / best["bare"], 4)}
    for name, found in (("encoding_share", loops), ("checkpoint_share", runs)):
        row |= {name: round(statistics.median(each[name] for each in found), 4)}
    row |= {"largest_loss_difference": off}
    print(json.dumps(row) if as_json else "\n".join(f"{name:24} {value}" for name, value in row.items()))


if __name__ == "__main__":
    main()
