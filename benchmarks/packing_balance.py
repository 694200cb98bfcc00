"""Measure how evenly micro-batches are filled, within a worker and across workers, with lengths of real answers.

    python benchmarks/packing_balance.py PAIRS [--workers N] [--pairs-per-step N] [--tokens N] [--json]

PAIRS: JSONL of {prompt, chosen, rejected}. Runs no model: the tokens of a pair are its characters / 3.6 plus the image
tokens. Workers run their k-th micro-batch together and wait for the largest one. `lockstep_ratio` is the sum over k of
the largest micro-batch, relative to the mean; 1 means that no worker waits. `unsorted_ratio` is the same if each worker
filled its micro-batches in order of arrival.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from machine import provenance

from orpo_ray.data.encoding import EncodedPair
from orpo_ray.data.packing import packed_length, plan_microbatches, spread

CHARACTERS_PER_TOKEN = 3.6


def pair_of(row: dict[str, str], image_tokens: int) -> EncodedPair:
    """Make a pair of the right lengths, with tokens of 0."""
    lengths = [1 + round(len(row[key]) / CHARACTERS_PER_TOKEN) for key in ("prompt", "chosen", "rejected")]
    ids = [np.zeros(length, np.int32) for length in (lengths[0] + image_tokens, *lengths[1:])]
    return EncodedPair("", *ids, np.ones(len(ids[0]), bool), {})


def in_order(pairs: list[EncodedPair], budget: int) -> list[list[EncodedPair]]:
    """Fill micro-batches one after another, in the order of the pairs."""
    batches: list[list[EncodedPair]] = []
    for pair in pairs:
        if batches and sum(map(packed_length, batches[-1])) + packed_length(pair) <= budget:
            batches[-1].append(pair)
        else:
            batches.append([pair])
    return batches


def lockstep_ratio(per_worker: list[list[list[EncodedPair]]], needed: int) -> float:
    """Return the tokens of the slowest worker in each micro-batch, relative to the mean."""
    count = max(map(len, per_worker))
    sizes = np.zeros((len(per_worker), count))
    for worker, batches in enumerate(per_worker):
        sizes[worker, : len(batches)] = [sum(map(packed_length, batch)) for batch in batches]
    return float(sizes.max(0).sum() * len(per_worker) / needed)


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
    packed, unsorted, microbatches = [], [], []
    for _ in range(50):
        chosen = rng.choice(len(rows), arguments.pairs_per_step)
        pairs = [pair_of(rows[index], arguments.image_tokens) for index in chosen]
        step_shards = [pairs[worker :: arguments.workers] for worker in range(arguments.workers)]
        needed = sum(map(packed_length, pairs))
        plans = [plan_microbatches(step_shard, arguments.tokens, "shared_prefix") for step_shard in step_shards]
        count = max(map(len, plans))
        packed.append(lockstep_ratio([spread(plan, count, "shared_prefix") for plan in plans], needed))
        unsorted.append(lockstep_ratio([in_order(step_shard, arguments.tokens) for step_shard in step_shards], needed))
        microbatches.append(count)
    row = provenance() | {
        "microbatches": float(np.mean(microbatches)),
        "lockstep_ratio": round(float(np.mean(packed)), 3),
        "unsorted_ratio": round(float(np.mean(unsorted)), 3),
    }
    print(json.dumps(row) if arguments.json else "\n".join(f"{name:16} {value}" for name, value in row.items()))


if __name__ == "__main__":
    main()
