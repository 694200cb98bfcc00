"""Compare LoRA trials of a sweep (a) side by side on one base model with (b) the same trials one after another.

    python benchmarks/packed_sweep.py [--shape NAME] [--trials N] [--steps N] [--pairs N] [--tiles N] [--json]

Both run in one process, on the same pairs, through the product's own loss, engine and optimizer. Loading the model and
making its adapters is part of neither. The vision encoder is frozen. Trials differ in beta, learning rate and seed.
Memory is the peak of the process in (a), and in the first trial of (b), base model included. A micro-batch of one trial
is the whole step, and (a) has as many tokens at once. Requires no Ray. Weights are random.

The bound is arithmetic: with V the FLOPs of the vision part and L those of a forward pass of the language model, N
trials side by side take at least (V + 2NL) / (N (V + 2L)) of the time of trials one after another.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from machine import provenance
from step_throughput import BUILDERS, M_MMAP_THRESHOLD, NORM, Shape, make_pairs, real_lengths
from torch.utils.flop_counter import FlopCounterMode

from orpo_ray.config.load import parse_recipe
from orpo_ray.config.recipe import Recipe
from orpo_ray.data.balance import Packing
from orpo_ray.data.encoding import EncodedPair
from orpo_ray.model import shared_prefix
from orpo_ray.model.fused_ops import has_kernels
from orpo_ray.model.loading import ready_to_train
from orpo_ray.objective.base import load_objective
from orpo_ray.objective.pair_model import PairModel
from orpo_ray.objective.step_planner import StepPlan, StepPlanner
from orpo_ray.training.replicated_engine import ReplicatedEngine
from orpo_ray.training.side_by_side import SideBySide, tokens_for

BETAS, RATES = (0.05, 0.1, 0.2, 0.4), (1e-4, 3e-4)


def small() -> Any:
    """SmolVLM-256M with a quarter of its widths and a third of its layers: about the same shares of the work."""
    from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration

    text = {
        "model_type": "llama", "hidden_size": 144, "intermediate_size": 384, "num_hidden_layers": 10,
        "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49280, "max_position_embeddings": 8192,
        "tie_word_embeddings": False, "pad_token_id": 2,
    }  # fmt: skip
    vision = {
        "hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 4,
        "image_size": 512, "patch_size": 16,
    }  # fmt: skip
    config = SmolVLMConfig(
        text_config=text, vision_config=vision, scale_factor=4, image_token_id=49190, tie_word_embeddings=False
    )
    return SmolVLMForConditionalGeneration(config)


class Bench:
    """One base model and the steps that every trial trains on."""

    def __init__(self, arguments: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> None:
        self.steps, self.device = arguments.steps, device
        shape = Shape("sweep", "smolvlm-256m", arguments.pairs, arguments.tiles, lora=True)
        lengths = real_lengths()
        pairs = [make_pairs(shape, arguments.pairs, lengths, seed=step) for step in range(arguments.steps)]
        self.budget = max(sum(_tokens(pair) for pair in each) for each in pairs)
        self.recipes = [self._recipe(number, arguments) for number in range(arguments.trials)]
        torch.manual_seed(0)
        torch.set_default_dtype(dtype)
        with device:
            self.base = small() if arguments.shape == "small" else BUILDERS["smolvlm-256m"][0]()
        torch.set_default_dtype(torch.float32)
        shared_prefix.register()
        self.base.set_attn_implementation({"text_config": shared_prefix.NAME, "vision_config": "sdpa"})
        self.pairs = pairs

    def model(self, recipe: Recipe) -> PairModel:
        """The base model with the adapter of a trial. `unload` takes it off again."""
        fused = has_kernels(self.device.type)
        return PairModel(ready_to_train(self.base, recipe.model, recipe.optim.seed, fused).to(self.device), NORM)

    def plans(self, recipe: Recipe, model: PairModel, tokens: int) -> list[StepPlan]:
        """The micro-batches of all steps."""
        packing, dummy = Packing(tokens, model.layout), self.pairs[0][0]
        planner = StepPlanner(load_objective(recipe), packing, dummy, dummy, self.device, model.collate)
        return [planner.plan(planner.share(pairs, step=step)) for step, pairs in enumerate(self.pairs)]

    def alone(self, recipe: Recipe) -> tuple[PairModel, Callable[[int], list[list[float]]]]:
        """(b): one trial, ready to train: number of steps -> its losses."""
        model = self.model(recipe)
        engine, objective = ReplicatedEngine(model, recipe, self.steps, 1), load_objective(recipe)
        plans = self.plans(recipe, model, self.budget)

        def train(steps: int) -> list[list[float]]:
            losses = []
            for plan in plans[:steps]:
                total = 0.0
                for batch in plan.batches:
                    batch = batch.to(self.device)
                    loss, _ = objective.loss(engine.forward(batch), batch.weights, plan.normaliser)
                    engine.backward(loss)
                    total += float(loss.detach())
                engine.step()
                losses.append(total)
            return [losses]

        return model, train

    def together(self) -> tuple[PairModel, Callable[[int], list[list[float]]]]:
        """(a): all trials, ready to train: number of steps -> the losses of each."""
        first = self.recipes[0]
        model = self.model(first)
        recipes = {str(number): recipe for number, recipe in enumerate(self.recipes)}
        runs = SideBySide(recipes, model, self.steps)
        plans = self.plans(first, model, tokens_for(first, len(recipes)))

        def train(steps: int) -> list[list[float]]:
            results = [runs.train_step(plan) for plan in plans[:steps]]
            return [[result[name].metrics["loss"] for result in results] for name in recipes]

        return model, train

    def flops(self) -> tuple[float, float]:
        """The FLOPs of a step's vision part, and of a forward pass of its language model."""
        model = self.model(self.recipes[0])
        (plan, *_) = self.plans(self.recipes[0], model, self.budget)
        counts = [0.0, 0.0]
        with torch.no_grad():
            for batch in plan.batches:
                batch = batch.to(self.device)
                with FlopCounterMode(display=False) as vision:
                    images = model.encode_images(batch)
                with FlopCounterMode(display=False) as language:
                    model.logps(batch, images)
                counts[0] += vision.get_total_flops()
                counts[1] += language.get_total_flops()
        model.model.unload()  # type: ignore[operator]
        return counts[0], counts[1]

    def _recipe(self, number: int, arguments: argparse.Namespace) -> Recipe:
        beta, rate = list(itertools.product(BETAS, RATES))[number % (len(BETAS) * len(RATES))]
        return parse_recipe(
            {
                "name": f"trial-{number}",
                "model": {"id": "random", "freeze": ["vision", "connector"], "lora": {"r": arguments.rank}},
                "data": {"train": "random"},
                "orpo": {"beta": beta},
                "optim": {
                    "learning_rate": rate,
                    "seed": number,
                    "warmup": 0,
                    "pairs_per_step": arguments.pairs,
                    "tokens_per_microbatch": self.budget,
                },
            }
        )


def _tokens(pair: EncodedPair) -> int:
    return len(pair.prompt_ids) + len(pair.chosen_ids) + len(pair.rejected_ids)


def measured(
    ready: tuple[PairModel, Callable[[int], list[list[float]]]], steps: int, device: torch.device
) -> tuple[float, float, list[list[float]]]:
    """Train, and take the adapters off again.

    Returns seconds, the peak memory in MiB of the process (on CUDA: of the allocator), and the losses.
    """
    model, train = ready
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    started = time.perf_counter()
    losses = train(steps)
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**20
    else:
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        peak = int(status["VmHWM"].split()[0]) / 1024
    model.model.unload()  # type: ignore[operator]
    return seconds, peak, losses


def compare(bench: Bench) -> dict[str, Any]:
    """Run half of the trials of (b), then (a), then the other half, so that neither is only early or only late."""
    device, trials = bench.device, len(bench.recipes)
    measured(bench.alone(bench.recipes[0]), 1, device)
    half = trials // 2
    singles = [measured(bench.alone(recipe), bench.steps, device) for recipe in bench.recipes[:half]]
    seconds, peak, losses = measured(bench.together(), bench.steps, device)
    singles += [measured(bench.alone(recipe), bench.steps, device) for recipe in bench.recipes[half:]]
    vision, language = bench.flops()
    one_by_one = sum(single[0] for single in singles)
    differences = [
        abs(mine - other)
        for own, single in zip(losses, singles, strict=True)
        for mine, other in zip(own, single[2][0], strict=True)
    ]
    return {
        "trials": trials,
        "steps": bench.steps,
        "side_by_side_seconds": seconds,
        "one_by_one_seconds": one_by_one,
        "time_ratio": seconds / one_by_one,
        "bound_by_arithmetic_time_ratio": (vision + 2 * trials * language) / (trials * (vision + 2 * language)),
        "shared_flops_fraction": vision / (vision + 2 * language),
        "side_by_side_peak_mib": peak,
        "one_trial_peak_mib": singles[0][1],
        "peak_memory_ratio": peak / singles[0][1],
        "largest_loss_difference": max(differences),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--shape", choices=["smolvlm-256m", "small"], default="smolvlm-256m")
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--pairs", type=int, default=1, help="pairs of a step")
    parser.add_argument("--tiles", type=int, default=5, help="tiles of an image")
    parser.add_argument("--rank", type=int, default=16, help="of the adapters")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if (c_library := ctypes.CDLL(None)) and hasattr(c_library, "mallopt"):
        # glibc would keep what is freed for later, so that a peak were not what lived at a time but what ever had.
        c_library.mallopt(M_MMAP_THRESHOLD, 4 * 2**20)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    row = {"shape": arguments.shape, **compare(Bench(arguments, device, dtype))}
    row = {name: round(value, 6) if isinstance(value, float) else value for name, value in row.items()}
    result = provenance() | {"threads": arguments.threads} | row
    print(json.dumps(result) if arguments.json else "\n".join(f"{name:32} {value}" for name, value in result.items()))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
