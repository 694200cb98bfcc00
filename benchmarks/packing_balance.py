"""Measure how evenly the work of a step is distributed over workers, with lengths of real answers.

    python benchmarks/packing_balance.py PAIRS [--workers N] [--pairs-per-step N] [--tokens N] [--json]

PAIRS: JSONL of {prompt, chosen, rejected}. Runs no model: the tokens of a pair are its characters / 3.6 plus the image
tokens. Workers run their k-th micro-batch together and wait for the largest one. `lockstep_ratio` is the sum over k of
the largest micro-batch, relative to the mean; 1 means that no worker waits. `unsorted_ratio` is the same if a pair's
place in the step determined its worker, which filled micro-batches in order of arrival. `milliseconds` is the time of
one core to distribute a step.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
from machine import provenance

from orpo_ray.data.balance import Packing, PairSize, distribute

CHARACTERS_PER_TOKEN = 3.6


def size_of(row: dict[str, str], image_tokens: int) -> PairSize:
    """Return the size of a pair with an image."""
    prompt, chosen, rejected = (
        1 + round(len(row[key]) / CHARACTERS_PER_TOKEN) for key in ("prompt", "chosen", "rejected")
    )
    return PairSize(prompt + image_tokens, prompt - 1, chosen, rejected, 0, 1)


def in_order(sizes: list[PairSize], budget: int) -> list[int]:
    """Fill micro-batches one after another, in the order of the pairs. Returns the tokens of each."""
    batches: list[int] = []
    for size in sizes:
        if batches and batches[-1] + size.packed <= budget:
            batches[-1] += size.packed
        else:
            batches.append(size.packed)
    return batches


def lockstep_ratio(per_worker: list[list[int]]) -> float:
    """Return the tokens of the slowest worker in each micro-batch, relative to the mean."""
    tokens = np.zeros((len(per_worker), max(map(len, per_worker))))
    for worker, batches in enumerate(per_worker):
        tokens[worker, : len(batches)] = batches
    return float(tokens.max(0).sum() * len(per_worker) / tokens.sum())


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", type=Path)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--pairs-per-step", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=4096, help="tokens_per_microbatch")
    parser.add_argument("--image-tokens", type=int, default=320)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    arguments = parser.parse_args()
    rows = [json.loads(line) for line in arguments.pairs.open(encoding="utf-8")]
    rng = np.random.default_rng(0)
    packing, workers = Packing(arguments.tokens, "shared_prefix"), arguments.workers
    balanced, unsorted, microbatches, seconds = [], [], [], 0.0
    for _ in range(50):
        chosen = rng.choice(len(rows), arguments.pairs_per_step)
        sizes = [size_of(rows[index], arguments.image_tokens) for index in chosen]
        started = time.process_time()
        found = distribute(sizes, workers, packing)
        seconds += time.process_time() - started
        balanced.append(lockstep_ratio([[sum(sizes[i].packed for i in each) for each in worker] for worker in found]))
        shards = [sizes[worker::workers] for worker in range(workers)]
        unsorted.append(lockstep_ratio([in_order(shard, arguments.tokens) for shard in shards]))
        microbatches.append(len(found[0]))
    row = provenance() | {
        "microbatches": float(np.mean(microbatches)),
        "lockstep_ratio": round(float(np.mean(balanced)), 3),
        "unsorted_ratio": round(float(np.mean(unsorted)), 3),
        "milliseconds": round(seconds / 50 * 1000, 2),
    }
    print(json.dumps(row) if arguments.json else "\n".join(f"{name:16} {value}" for name, value in row.items()))


if __name__ == "__main__":
    main()
