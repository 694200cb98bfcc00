"""Compare a training step (a) on trees with (b) the same step on separate pairs, in one process.

    python benchmarks/trees.py [--rows N] [--answers N] [--tokens N] [--rounds N] [--json]

A row is shaped like those of VLFeedback: an image, a prompt, and four ranked answers. All six pairs of them are trained
on. Both use the same model object, pairs and dtype, and the shared-prefix layout. (a) packs each row as a tree: image,
prompt and each answer once. (b) packs `[prompt | chosen | rejected]` of each pair, with its image. They run in turn,
each after its own warm-up, and their gradients are compared. SmolVLM-256M's shape with random weights. Requires neither
Ray nor DeepSpeed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import replace
from functools import partial
from itertools import combinations, islice
from typing import Any

import numpy as np
import torch
from machine import provenance
from step_throughput import SHAPES, keep_no_freed_memory, load, make_pairs, measured, ours, real_lengths

from orpo_ray.data.encoding import EncodedPair
from orpo_ray.data.packing import build_batch
from orpo_ray.objective.pair_model import PairModel


def ranked_rows(rows: int, answers: int, tokens: int | None, seed: int) -> list[EncodedPair]:
    """Make all pairs of ranked answers to the prompt of each row.

    Args:
        rows: images, each with one prompt.
        answers: to each prompt.
        tokens: of an answer; None takes the lengths of real ones.
        seed: of tokens and pixels.
    """
    rng = np.random.default_rng(seed)
    lengths = None if tokens else islice(real_lengths(), seed * rows * answers, None)
    shape = replace(SHAPES[0], responses=1)
    pairs = []
    for base in make_pairs(shape, rows, None, seed):
        counts = [tokens or next(lengths)[0] for _ in range(answers)]  # type: ignore[arg-type]
        texts = [rng.integers(10, 30000, count).astype(np.int32) for count in counts]
        pairs += [replace(base, chosen_ids=one, rejected_ids=other) for one, other in combinations(texts, 2)]
    return pairs


def gradient_distance(model: PairModel, before: list[torch.Tensor]) -> float:
    """Return the distance of the model's gradients from others, relative to those."""
    now = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    difference = sum(float((one - other).square().sum()) for one, other in zip(now, before, strict=True))
    return (difference / sum(float(other.square().sum()) for other in before)) ** 0.5


def compare(arguments: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Run (a) and (b) in turn on each of the batches."""
    model = load(SHAPES[0], device, dtype)
    results: dict[str, list[dict[str, float]]] = {"trees": [], "pairs": []}
    tokens, distances, pairs_per_step = {"trees": 0, "pairs": 0}, [], 0
    for number in range(arguments.rounds + 1):
        pairs = ranked_rows(arguments.rows if number else 1, arguments.answers, arguments.tokens, seed=number)
        gradients: list[torch.Tensor] = []
        for which in ("trees", "pairs") if number % 2 else ("pairs", "trees"):
            shares = model.family.shares if which == "trees" else "nothing"
            batch = build_batch(pairs, "response", "shared_prefix", shares=shares).to(device)
            started = time.process_time()
            result = measured(partial(ours, model, batch), model, device)
            result["cpu_seconds"] = time.process_time() - started
            if not number:
                continue
            results[which].append(result)
            tokens[which] += batch.input_ids.numel()
            if gradients:
                distances.append(gradient_distance(model, gradients))
            gradients = [each.grad.clone() for each in model.parameters() if each.grad is not None]
        pairs_per_step = len(pairs)
    seconds = {which: sum(result["seconds"] for result in each) for which, each in results.items()}
    peak = {which: max(result["peak_mib"] for result in each) for which, each in results.items()}
    together = list(zip(results["trees"], results["pairs"], strict=True))
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "rows_per_step": arguments.rows,
        "pairs_per_step": pairs_per_step,
        "rounds": arguments.rounds,
        "trees_pairs_per_s": pairs_per_step * arguments.rounds / seconds["trees"],
        "separate_pairs_per_s": pairs_per_step * arguments.rounds / seconds["pairs"],
        "pairs_per_s_ratio": seconds["pairs"] / seconds["trees"],
        "pairs_per_s_median_ratio": statistics.median(b["seconds"] / a["seconds"] for a, b in together),
        # Other programs on the machine disturb this ratio less than that of times.
        "cpu_seconds_ratio": sum(each["cpu_seconds"] for each in results["pairs"])
        / sum(each["cpu_seconds"] for each in results["trees"]),
        "trees_peak_mib": peak["trees"],
        "separate_peak_mib": peak["pairs"],
        "peak_memory_ratio": peak["trees"] / peak["pairs"],
        "tokens_ratio": tokens["pairs"] / tokens["trees"],
        "largest_loss_difference": max(abs(a["loss"] - b["loss"]) for a, b in together),
        "largest_gradient_distance": max(distances),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--rows", type=int, default=1, help="images in a micro-batch, each with one prompt")
    parser.add_argument("--answers", type=int, default=4, help="answers to each prompt")
    parser.add_argument("--tokens", type=int, help="tokens of an answer; by default the lengths of real answers")
    parser.add_argument("--rounds", type=int, default=4, help="batches, each run by (a) and by (b)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    keep_no_freed_memory()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    row = compare(arguments, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    result = provenance() | {"threads": arguments.threads} | row
    if arguments.json:
        print(json.dumps(result))
        return
    for name, value in result.items():
        print(f"{name:28} {value:.4g}" if isinstance(value, float) else f"{name:28} {value}")


if __name__ == "__main__":
    main()
