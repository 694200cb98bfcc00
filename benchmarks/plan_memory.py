"""Compare a plan's activation memory with the memory that the same forward and backward pass takes on this machine.

    python benchmarks/plan_memory.py [--json]

For each way of training, a new process runs a random model of about 40 M parameters in float32 on the CPU, with a
packed row of thousands of tokens and several images. It runs twice, since the first run allocates gradients and pages
of the allocator. Measured is the increase of peak resident memory during the second run (Linux: VmHWM, reset through
/proc/self/clear_refs). `predicted_over_measured_ratio` is the ratio farthest from 1.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from machine import provenance

WAYS: dict[str, dict[str, Any]] = {
    "full": {},
    "full, selective": {"gradient_checkpointing": "selective"},
    "full, gradient checkpointing": {"gradient_checkpointing": "full"},
    "lora": {"lora": {"r": 16}},
    "lora, selective": {"lora": {"r": 16}, "gradient_checkpointing": "selective"},
    "lora, gradient checkpointing": {"lora": {"r": 16}, "gradient_checkpointing": "full"},
    "frozen vision": {"freeze": ["vision"]},
    "concatenated": {"attention": "concatenated"},
}
PAIRS = 4


def mid_size() -> Any:
    """Return the config of a SmolVLM of about 40 M parameters."""
    from transformers import AutoConfig

    text = {
        "model_type": "llama", "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 8,
        "num_attention_heads": 6, "num_key_value_heads": 2, "vocab_size": 16384, "pad_token_id": 0,
        "max_position_embeddings": 4096, "tie_word_embeddings": False,
    }  # fmt: skip
    vision = {
        "hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 6,
        "image_size": 256, "patch_size": 16,
    }  # fmt: skip
    options = {"text_config": text, "vision_config": vision, "scale_factor": 4, "image_token_id": 7, "pad_token_id": 0}
    return AutoConfig.for_model("idefics3", **options, tie_word_embeddings=False)


def one(way: str) -> dict[str, Any]:
    """Measure in this process: predicted and measured bytes, without weights and gradients."""
    import numpy as np
    import torch

    from orpo_ray.config.schema import ModelConfig
    from orpo_ray.model.loading import pick_attention
    from orpo_ray.objective.base import Normaliser
    from orpo_ray.objective.orpo import ORPO
    from orpo_ray.objective.pair_model import PIXELS_AT_ONCE, PairModel
    from orpo_ray.planning.activations import NORM, PairShape, batch_of, measure, unloaded_model

    torch.set_num_threads(2)
    config, model_config = mid_size(), ModelConfig(id="mid-size", **WAYS[way])
    layout = pick_attention(model_config, config).layout
    shape = PairShape(60, 440, 400, 1, 64, {"pixel_values": np.zeros((4, 3, 256, 256), np.uint8)})
    batch = batch_of(shape, PAIRS, config, "response", layout)
    dry = measure(model_config, config, torch.float32, layout, batch, True, "cpu")
    model = unloaded_model(model_config, config, torch.float32, layout, "cpu").to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    for name, buffer in model.named_buffers():
        buffer.fill_(1 if "freq" in name else 0)
    bounded = model_config.gradient_checkpointing != "none"
    pair_model = PairModel(model, NORM, PIXELS_AT_ONCE["cpu"] if bounded else None)
    pair_model.layout = layout

    def step() -> None:
        logps = pair_model(batch)
        loss, _ = ORPO(0.1).loss(logps, batch.weights, Normaliser(float(batch.num_pairs)))
        loss.backward()

    step()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    step()
    measured = _resident("VmHWM") - before
    return {
        "way": way,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "tokens": batch.input_ids.numel(),
        "images": PAIRS,
        "predicted_mib": dry.peak / 2**20,
        "measured_mib": measured / 2**20,
        "predicted_over_measured": dry.peak / measured,
    }


def _resident(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith(field)).split()[1]) * 1024


def main() -> None:
    """Measure each way in a new process."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout, all else on stderr")
    parser.add_argument("--one", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one(options.one)))
        return
    # Large tensors are returned to the system at once, so that resident memory equals live memory.
    environment = os.environ | {
        "MALLOC_MMAP_THRESHOLD_": "131072",
        "MALLOC_TRIM_THRESHOLD_": "131072",
        "DNNL_PRIMITIVE_CACHE_CAPACITY": "0",
    }
    rows = []
    for way in WAYS:
        command = [sys.executable, __file__, "--one", way]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True, env=environment)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        row = rows[-1]
        sizes = f"predicted {row['predicted_mib']:8.1f} MiB  measured {row['measured_mib']:8.1f}"
        print(f"{way:30} {sizes}  ratio {row['predicted_over_measured']:.3f}", file=sys.stderr)
    worst = max((row["predicted_over_measured"] for row in rows), key=lambda ratio: abs(ratio - 1))
    if options.json:
        print(json.dumps(provenance() | {"rows": rows, "predicted_over_measured_ratio": worst}))


if __name__ == "__main__":
    main()
