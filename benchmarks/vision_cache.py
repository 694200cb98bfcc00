"""Compare LoRA steps that run the frozen vision encoder with steps that read its features from the cache.

    python benchmarks/vision_cache.py [--rounds N] [--json]

Both run in turn in one process. A step is forward, ORPO loss and backward over 2 pairs with 5 tiles of 512 px each
(sizes of SmolVLM-256M), or over 32 pairs with one image of 64 px (the quickstart's model). All images are in the cache,
as from the second epoch on.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from machine import provenance
from peft import LoraConfig, get_peft_model
from step_throughput import NORM, smolvlm_256m

from orpo_ray.data.encoding import EncodedPair
from orpo_ray.data.packing import PairBatch, build_batch
from orpo_ray.model import shared_prefix
from orpo_ray.objective.base import Normaliser
from orpo_ray.objective.orpo import ORPO
from orpo_ray.objective.pair_model import PairModel
from orpo_ray.tiny_models.families import TINY_FAMILIES


def batch_of(config: Any, pairs: int, tiles: int, side: int, tokens: int, answer: int) -> PairBatch:
    """Make a batch of `pairs` pairs with `tiles` tiles, 40 text tokens, and answers of `answer` tokens."""
    rng = np.random.default_rng(0)
    made = []
    for sample_index in range(pairs):
        text = rng.integers(20, 400, 40)
        ids = np.asarray([int(text[0])] + [config.image_token_id] * tokens * tiles + text[1:].tolist(), np.int32)
        answers = [rng.integers(20, 400, answer).astype(np.int32) for _ in range(2)]
        pixels = rng.integers(0, 256, (tiles, 3, side, side)).astype(np.uint8)
        made.append(
            EncodedPair(
                str(sample_index), ids, *answers, ids != config.image_token_id, {"pixel_values": pixels}, sample_index
            )
        )
    return build_batch(made, "response", "shared_prefix")


def step(model: PairModel, batch: PairBatch) -> float:
    """Run a step; returns seconds."""
    started = time.perf_counter()
    ORPO(0.1).loss(model(batch), batch.weights, Normaliser(batch.num_pairs))[0].backward()
    model.zero_grad(set_to_none=True)
    return time.perf_counter() - started


def measure(name: str, base: Any, batch: PairBatch, rounds: int) -> dict[str, Any]:
    """Return the median seconds of both, and the size of the cache on disk."""
    shared_prefix.register()
    base.set_attn_implementation({"text_config": shared_prefix.NAME, "vision_config": "sdpa"})
    model = get_peft_model(base, LoraConfig(r=16, target_modules=r".*text_model.*_proj"))
    with tempfile.TemporaryDirectory() as folder:
        plain, cached = PairModel(model.train(), NORM), PairModel(model.train(), NORM, vision_cache=Path(folder))
        for warm in (plain, cached):
            step(warm, batch)
        times = [(step(plain, batch), step(cached, batch)) for _ in range(rounds)]
        files = list(Path(folder).rglob("*.safetensors"))
        size = sum(file.stat().st_size for file in files) / len(files)
    uncached, cached_time = (statistics.median(column) for column in zip(*times, strict=True))
    return {
        "name": name,
        "uncached_s": uncached,
        "cached_s": cached_time,
        "bytes_per_tile": size,
        "speed_ratio": uncached / cached_time,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    large, small = smolvlm_256m(), TINY_FAMILIES["smolvlm"]().model()
    rows = [
        measure("smolvlm-256m, 5 tiles", large, batch_of(large.config, 2, 5, 512, 64, 100), arguments.rounds),
        measure("tiny-smolvlm", small, batch_of(small.config, 32, 1, 64, 16, 4), arguments.rounds * 5),
    ]
    if arguments.json:
        print(json.dumps({"rows": rows, "speed_ratio": rows[0]["speed_ratio"], **provenance()}))
        return
    for row in rows:
        print(
            f"{row['name']}: {row['uncached_s']:.2f} s without cache, {row['cached_s']:.2f} s with cache "
            f"({row['speed_ratio']:.2f}x), {row['bytes_per_tile'] / 1024:.0f} KiB per tile"
        )
    print(provenance(), file=sys.stderr)


if __name__ == "__main__":
    main()
