"""How fast pairs with photographs reach a worker, and how many bytes they take on the way.

    python benchmarks/data_throughput.py PAIRS PROCESSOR [--epochs N] [--cores N] [--json]

PAIRS: JSONL of {image, prompt, chosen, rejected}, written to a parquet with the images' bytes and read from there.
PROCESSOR: a folder with a model's processor, as the hub has it. Compared in one run, in turn:

  stream: parquet -> reading and encoding tasks -> object store -> a worker's step, with nothing else to do
  bare:   as many processes as cores, each decoding and calling the same processor in a loop, no data frame, no Ray

`pairs_per_core_ratio` is stream to bare; `memory_growth_ratio` the peak of all processes' own memory with ten times the
rows to that with one time (Ray's object store is listed apart: it touches more and more of the memory that it was
given, and stays within that); `float32_to_uint8_bytes_ratio` the bytes of a pair with float32 pixels to those with
uint8.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from machine import provenance
from PIL import Image

from orpo_ray.config.load import parse_recipe
from orpo_ray.data.balance import Packing
from orpo_ray.data.encoded_columns import to_arrow
from orpo_ray.data.encoding import EncodedPair, EncoderSpec
from orpo_ray.data.from_recipe import run_data
from orpo_ray.processing.processor import load_processor
from orpo_ray.ray_cluster.start import start_ray
from orpo_ray.streaming.steps import iter_shares, open_feed

PAIRS_PER_STEP = 8
ANY_LENGTH = 10**6


@dataclass(frozen=True)
class Streamed:
    """Measurements of a stream: pairs per second after start-up, peaks of own and shared memory, bytes per pair."""

    pairs_per_s: float
    peak_mib: float
    shared_mib: float
    encoded_bytes: float
    float32_bytes: float


def write_parquet(pairs: Path, folder: Path) -> Path:
    """The pairs with their images' bytes."""
    rows = [json.loads(line) for line in pairs.read_text().splitlines() if line.strip()]
    for row in rows:
        row["image"] = {"bytes": (pairs.parent / row["image"]).read_bytes(), "path": None}
    path = folder / "pairs.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=64)
    return path


def stream(parquet: Path, processor: str, times: int, cores: int) -> Streamed:
    """Return all rows `times` times, as training data of a recipe with that weight."""
    raw = {
        "name": "data-throughput",
        "model": {"id": processor},
        "data": {"train": {str(parquet): times}, "max_length": ANY_LENGTH},
        "optim": {"pairs_per_step": PAIRS_PER_STEP},
    }
    read, _ = run_data(parse_recipe(raw))
    encoder = EncoderSpec(processor, None, ANY_LENGTH)
    steps = -(-read.end_sample // PAIRS_PER_STEP)
    arrived: list[float] = []
    weights: list[tuple[int, int]] = []
    with PeakMemory() as memory:
        feed = open_feed(read, encoder, max_encoders=cores)
        for share in iter_shares(feed, Packing(ANY_LENGTH, "shared_prefix"), 0, steps):
            if share.bad:
                raise SystemExit(f"the set should have no bad rows: {share.bad[0]}")
            arrived.append(time.perf_counter())
            if len(weights) < 64:
                weights += [(to_arrow([0], [pair]).nbytes, 3 * pixels_of(pair)) for pair in share.pairs]
    # The first fifth pays for starting processes and filling the pipeline.
    first = len(arrived) // 5
    seconds = arrived[-1] - arrived[first]
    encoded, more = np.mean(weights, axis=0)
    rate = (len(arrived) - 1 - first) * PAIRS_PER_STEP / seconds
    return Streamed(rate, memory.peak_mib, memory.shared_mib, float(encoded), float(encoded + more))


def pixels_of(pair: EncodedPair) -> int:
    """Values of the pixel tensors, a byte each."""
    return int(pair.images["pixel_values"].size)


class PeakMemory:
    """The most that this process and its children hold at a time of their own, and of what they share."""

    def __enter__(self) -> PeakMemory:
        self.peak_mib = self.shared_mib = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        own = psutil.Process()
        while not self._stop.wait(0.5):
            private, shared = 0, 0
            for process in (own, *own.children(recursive=True)):
                try:
                    facts = process.memory_info()
                except psutil.NoSuchProcess:
                    continue
                private += facts.rss - facts.shared
                shared = max(shared, facts.shared)  # the object store, in whoever has touched most of it
            self.peak_mib = max(self.peak_mib, private / 2**20)
            self.shared_mib = max(self.shared_mib, shared / 2**20)


def bare(parquet: Path, processor: str, cores: int) -> float:
    """Pairs a second of plain loops, one process a core, all at the same time."""
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(cores)
    with context.Pool(cores, initializer=_keep, initargs=(barrier,)) as pool:
        return float(sum(pool.starmap(_loop, [(str(parquet), processor)] * cores)))


def _keep(barrier: Any) -> None:
    globals()["BARRIER"] = barrier


def _loop(parquet: str, processor_folder: str) -> float:
    """Decode, call the processor, tokenise the answers; nothing else is timed."""
    os.environ["OMP_NUM_THREADS"] = "1"
    processor = load_processor(processor_folder, None)
    rows = pq.read_table(parquet).to_pylist()

    def call(row: dict[str, Any]) -> None:
        image = Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB")
        content = [{"type": "image"}, {"type": "text", "text": row["prompt"]}]
        messages = [{"role": "user", "content": content}]
        prompt = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        processor(text=[prompt], images=[[image]], add_special_tokens=False, do_rescale=False, do_normalize=False)
        processor.tokenizer([row["chosen"], row["rejected"]], add_special_tokens=False)

    for row in rows[:4]:
        call(row)
    globals()["BARRIER"].wait()
    started = time.perf_counter()
    for row in rows:
        call(row)
    return len(rows) / (time.perf_counter() - started)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", type=Path)
    parser.add_argument("processor")
    parser.add_argument("--epochs", type=int, default=2, help="times that the smaller of the two sets holds the pairs")
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        parquet = write_parquet(arguments.pairs, Path(folder))
        before = bare(parquet, arguments.processor, arguments.cores)
        start_ray()
        small = stream(parquet, arguments.processor, arguments.epochs, arguments.cores)
        large = stream(parquet, arguments.processor, 10 * arguments.epochs, arguments.cores)
        ray.shutdown()
        after = bare(parquet, arguments.processor, arguments.cores)
    row = {
        "stream_pairs_per_s": large.pairs_per_s,
        "bare_pairs_per_s": (before + after) / 2,
        "pairs_per_core_ratio": large.pairs_per_s / ((before + after) / 2),
        "encoded_mb_per_pair": large.encoded_bytes / 1e6,
        "float32_to_uint8_bytes_ratio": large.float32_bytes / large.encoded_bytes,
        "peak_mib": small.peak_mib,
        "peak_mib_10_fold": large.peak_mib,
        "object_store_mib": small.shared_mib,
        "object_store_mib_10_fold": large.shared_mib,
        "memory_growth_ratio": large.peak_mib / small.peak_mib,
    }
    result = provenance() | {name: round(value, 4) for name, value in row.items()}
    print(json.dumps(result) if arguments.json else "\n".join(f"{name:32} {value}" for name, value in result.items()))


if __name__ == "__main__":
    main()
