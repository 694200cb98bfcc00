"""Compare a training step (a) of orpo-ray with (b) the usual implementation, in one process.

    python benchmarks/step_throughput.py [--shapes NAME ...] [--rounds N] [--pairs N,N,...] [--json]

Both use the same model object, pairs and dtype. A step is forward, ORPO loss and backward; the optimizer is the same
for both and left out. (a) is one packed row [prompt | chosen | rejected] ... with each image once and log-probs at
response tokens. (b) has chosen and rejected as padded rows of one batch, with each image twice and logits at every
position. They run in turn, each after its own warm-up. Requires neither Ray nor DeepSpeed. Weights are random.

`--pairs 1,2,4,8,16` measures (a) alone with these numbers of pairs, to see how time grows with them.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import ROOT, provenance
from torch.utils.flop_counter import FlopCounterMode

from orpo_ray.data.encoding import EncodedPair
from orpo_ray.data.packing import RESPONSE, PairBatch, build_batch
from orpo_ray.model import shared_prefix
from orpo_ray.model.families.idefics3 import Idefics3
from orpo_ray.model.loading import is_adapted, without_adapters
from orpo_ray.objective.base import Normaliser
from orpo_ray.objective.logps import PairLogps
from orpo_ray.objective.orpo import ORPO
from orpo_ray.objective.pair_model import PIXELS_AT_ONCE, PairModel
from orpo_ray.processing.pixel_norm import PixelNorm, normalize_pixels

BETA = 0.1
M_MMAP_THRESHOLD = -3  # malloc.h
NORM = PixelNorm(1 / 255, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
ANSWERS = ROOT.parent / "shared" / "data" / "mathv_model_responses" / "pairs.jsonl"
# For English prose and vocabularies of 50,000 tokens and more.
CHARACTERS_PER_TOKEN = 3.6
# Dense bf16 peaks, from the data sheets.
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "4090": 165e12}


@dataclass(frozen=True)
class Shape:
    """Model and sizes of a measurement."""

    name: str
    model: str
    pairs: int
    """Pairs per step."""
    tiles: int
    """Tiles per image."""
    prompt: int = 40
    """Text tokens of the prompt."""
    responses: int | None = None
    """Tokens of each answer; None takes the lengths of real answers."""
    gradient_checkpointing: bool = False
    lora: bool = False
    cuda_only: bool = False


SHAPES = [
    Shape("smolvlm-256m-1-tile", "smolvlm-256m", pairs=4, tiles=1),
    Shape("smolvlm-256m-5-tiles", "smolvlm-256m", pairs=1, tiles=5),
    Shape("smolvlm-256m-13-tiles", "smolvlm-256m", pairs=2, tiles=13, gradient_checkpointing=True),
    Shape("smolvlm-256m-text", "smolvlm-256m", pairs=4, tiles=0, prompt=300, responses=150),
    Shape("llava-1.6-7b-lora", "llava-7b", pairs=4, tiles=5, lora=True, gradient_checkpointing=True, cuda_only=True),
]
ON_CUDA = {1: 16, 5: 4, 13: 2, 0: 16}  # tiles -> pairs, with more memory


def smolvlm_256m() -> Any:
    """SmolVLM-256M-Instruct: SigLIP-base at 512 px, 64 tokens per tile, SmolLM2-135M, untied head."""
    from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration

    text = {
        "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49280, "max_position_embeddings": 8192,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0}, "tie_word_embeddings": False,
        "pad_token_id": 2,
    }  # fmt: skip
    vision = {
        "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
        "image_size": 512, "patch_size": 16,
    }  # fmt: skip
    config = SmolVLMConfig(
        text_config=text, vision_config=vision, scale_factor=4, image_token_id=49190, tie_word_embeddings=False
    )
    return SmolVLMForConditionalGeneration(config)


def llava_7b() -> Any:
    """Same computation as LLaVA-1.6-Mistral-7B: CLIP-L at 336 px, 576 tokens per tile, Mistral-7B."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    text = {
        "model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32064, "max_position_embeddings": 32768,
        "sliding_window": None,
    }  # fmt: skip
    vision = {
        "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
        "num_attention_heads": 16, "image_size": 336, "patch_size": 14, "projection_dim": 768,
    }  # fmt: skip
    return LlavaForConditionalGeneration(LlavaConfig(text_config=text, vision_config=vision, image_token_index=32000))


BUILDERS: dict[str, tuple[Callable[[], Any], int, int]] = {
    "smolvlm-256m": (smolvlm_256m, 64, 512),  # tokens per tile, pixels per side
    "llava-7b": (llava_7b, 576, 336),
}


def load(shape: Shape, device: torch.device, dtype: torch.dtype) -> PairModel:
    """Build a model with random weights, ready to train."""
    torch.manual_seed(0)
    build = BUILDERS[shape.model][0]
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    with device:
        model = build()
    torch.set_default_dtype(default)
    shared_prefix.register()
    model.set_attn_implementation({"text_config": shared_prefix.NAME, "vision_config": "sdpa"})
    if shape.lora:
        from peft import LoraConfig, get_peft_model

        targets = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"
        model = get_peft_model(
            model, LoraConfig(r=16, lora_alpha=32, target_modules=targets), autocast_adapter_dtype=False
        )
    if shape.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    return PairModel(model, NORM, PIXELS_AT_ONCE[device.type] if shape.gradient_checkpointing else None)


def real_lengths() -> Iterator[tuple[int, int]]:
    """Yield the tokens of chosen and rejected of real answers, repeatedly."""
    if not ANSWERS.is_file():
        sys.exit(f"lengths of real answers are read from {ANSWERS}, which does not exist; run only the text shape")
    rows = [json.loads(line) for line in ANSWERS.open(encoding="utf-8")]
    while True:
        for row in rows:
            chosen, rejected = (1 + round(len(row[key]) / CHARACTERS_PER_TOKEN) for key in ("chosen", "rejected"))
            yield chosen, rejected


def make_pairs(shape: Shape, count: int, lengths: Iterator[tuple[int, int]] | None, seed: int) -> list[EncodedPair]:
    """Make pairs of the shape, with random tokens and pixels."""
    _, tile_tokens, side = BUILDERS[shape.model]
    rng = np.random.default_rng(seed)
    image_id = 49190 if shape.model == "smolvlm-256m" else 32000
    pairs = []
    for index in range(count):
        chosen, rejected = (shape.responses, shape.responses) if lengths is None else next(lengths)
        text = rng.integers(10, 30000, shape.prompt)
        prompt = np.concatenate([text[:4], np.full(shape.tiles * tile_tokens, image_id), text[4:]]).astype(np.int32)
        answers = [rng.integers(10, 30000, length).astype(np.int32) for length in (chosen, rejected)]
        pixels = rng.integers(0, 256, (shape.tiles, 3, side, side)).astype(np.uint8)
        images = {"pixel_values": pixels} if shape.tiles else {}
        pairs.append(EncodedPair(str(index), prompt, *answers, prompt != image_id, images, index))
    return pairs


def ours(model: PairModel, batch: PairBatch) -> torch.Tensor:
    """(a): forward, loss, backward."""
    loss, _ = ORPO(BETA).loss(model(batch), batch.weights, Normaliser(batch.num_pairs))
    loss.backward()
    return loss.detach()


def usual(model: PairModel, batch: PairBatch) -> torch.Tensor:
    """(b): the same with the model's own forward on a padded batch of both answers, as in other trainers."""
    rows, images = batch.input_ids, {}
    if batch.images:
        pixels = normalize_pixels(batch.images["pixel_values"], NORM).to(next(model.parameters()).dtype)
        twice = torch.cat([pixels, pixels])
        # SmolVLM takes [rows, tiles, ...], LLaVA a list of images.
        nested = isinstance(model.family, Idefics3)
        images["pixel_values"] = twice.view(len(rows), -1, *pixels.shape[1:]) if nested else twice
    attention_mask = (batch.token_kind <= RESPONSE).long()
    logits = model.model(input_ids=rows, attention_mask=attention_mask, use_cache=False, **images).logits
    return loss_of_logits(logits, batch)


def loss_of_logits(logits: torch.Tensor, batch: PairBatch) -> torch.Tensor:
    """Compute the loss from the logits of a padded batch at every position, and run backward."""
    rows = batch.input_ids
    labels, mask = rows[:, 1:], batch.token_kind[:, 1:] == RESPONSE
    logps = logits[:, :-1].float().log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    sums, counts = (logps * mask).sum(-1), mask.sum(-1).float()
    chosen, rejected = sums.chunk(2)
    chosen_count, rejected_count = counts.chunk(2)
    pairs = PairLogps(chosen, rejected, -chosen, chosen_count, rejected_count, chosen_count)
    loss, _ = ORPO(BETA).loss(pairs, batch.weights, Normaliser(batch.num_pairs))
    loss.backward()
    return loss.detach()


def set_attention(model: PairModel, name: str) -> None:
    """Set the attention of the language model."""
    without_adapters(model.model).set_attn_implementation({"text_config": name, "vision_config": "sdpa"})


def keep_no_freed_memory() -> None:
    """Have freed tensors returned to the system. glibc would keep them, so that a peak were not what lived at a time
    but what ever had."""
    if (c_library := ctypes.CDLL(None)) and hasattr(c_library, "mallopt"):
        c_library.mallopt(M_MMAP_THRESHOLD, 4 * 2**20)


def measured(run: Callable[[], torch.Tensor], model: PairModel, device: torch.device) -> dict[str, float]:
    """Run a step; returns seconds and the peak memory in MiB of the process (on CUDA: of the allocator)."""
    model.zero_grad(set_to_none=True)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    started = time.perf_counter()
    loss = run().item()
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**20
    else:
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        peak = int(status["VmHWM"].split()[0]) / 1024
    return {"seconds": seconds, "peak_mib": peak, "loss": loss}


def is_checkpointing(model: Any) -> bool:
    """Whether layers of a transformers model recompute activations, under either of transformers' names."""
    name = "is_activation_checkpointing"
    return bool(getattr(model, name) if hasattr(model, name) else model.is_gradient_checkpointing)


def model_flops(model: PairModel, batch: PairBatch) -> float:
    """Return the FLOPs of (a), without the recomputation of gradient checkpointing."""
    set_attention(model, shared_prefix.NAME)
    base = without_adapters(model.model)
    checkpointing = is_checkpointing(base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the new name is missing from some supported versions
        base.gradient_checkpointing_disable()
    # Counted in the forward pass, which fits without checkpointing. Backward has twice the FLOPs, with LoRA the same.
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(batch)
    if checkpointing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return counter.get_total_flops() * (2 if is_adapted(model.model) else 3)


def compare(shape: Shape, rounds: int, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Run (a) and (b) in turn on each of `rounds` batches."""
    model = load(shape, device, dtype)
    if device.type == "cuda":
        shape = replace(shape, pairs=shape.pairs if shape.lora else ON_CUDA[shape.tiles])
    lengths = None if shape.responses else real_lengths()
    results: dict[str, list[dict[str, float]]] = {"a": [], "b": []}
    tokens: dict[str, int] = {"a": 0, "b": 0, "needed": 0}
    warm_up = make_pairs(replace(shape, tiles=min(shape.tiles, 1)), 1, iter([(20, 20)]), seed=10**6)
    for number in range(rounds + 1):
        pairs = warm_up if number == 0 else make_pairs(shape, shape.pairs, lengths, seed=number)
        packed = build_batch(pairs, "response", "shared_prefix").to(device)
        padded = build_batch(pairs, "response", "concatenated").to(device)
        for which in "ab" if number % 2 else "ba":
            step, batch, name = (ours, packed, shared_prefix.NAME) if which == "a" else (usual, padded, "sdpa")
            set_attention(model, name)
            result = measured(partial(step, model, batch), model, device)
            if number:
                results[which].append(result)
        if number:
            tokens["a"] += packed.input_ids.numel()
            tokens["b"] += padded.input_ids.numel()
            tokens["needed"] += sum(len(p.prompt_ids) + len(p.chosen_ids) + len(p.rejected_ids) for p in pairs)
    seconds = {which: sum(r["seconds"] for r in results[which]) for which in "ab"}
    peak = {which: max(r["peak_mib"] for r in results[which]) for which in "ab"}
    row = {
        "shape": shape.name,
        "dtype": str(dtype).removeprefix("torch."),
        "pairs_per_step": shape.pairs,
        "rounds": rounds,
        "ours_pairs_per_s": shape.pairs * rounds / seconds["a"],
        "usual_pairs_per_s": shape.pairs * rounds / seconds["b"],
        "pairs_per_s_ratio": seconds["b"] / seconds["a"],
        "pairs_per_s_median_ratio": statistics.median(
            b["seconds"] / a["seconds"] for a, b in zip(results["a"], results["b"], strict=True)
        ),
        "ours_tokens_per_s": tokens["a"] / seconds["a"],
        "usual_tokens_per_s": tokens["b"] / seconds["b"],
        "ours_peak_mib": peak["a"],
        "usual_peak_mib": peak["b"],
        "peak_memory_ratio": peak["a"] / peak["b"],
        "tokens_computed_to_needed_ratio": tokens["a"] / tokens["needed"],
        "largest_loss_difference": max(
            abs(a["loss"] - b["loss"]) for a, b in zip(results["a"], results["b"], strict=True)
        ),
    }
    peaks = [
        value for name, value in PEAK_FLOPS.items() if device.type == "cuda" and name in torch.cuda.get_device_name()
    ]
    if peaks:
        row["ours_mfu"] = model_flops(model, packed) / results["a"][-1]["seconds"] / peaks[0]
    return row


def scaling(shape: Shape, counts: list[int], rounds: int, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Run (a) with growing numbers of pairs of equal length."""
    model = load(shape, device, dtype)
    seconds: dict[int, float] = {}
    for count in counts:
        pairs = make_pairs(shape, count, iter([(100, 100)] * count), seed=count)
        batch = build_batch(pairs, "response", "shared_prefix").to(device)
        runs = [measured(partial(ours, model, batch), model, device)["seconds"] for _ in range(rounds + 1)]
        seconds[count] = statistics.median(runs[1:])
    per_pair = {count: value / count for count, value in seconds.items()}
    row = {"shape": shape.name, "dtype": str(dtype).removeprefix("torch.")}
    row |= {f"seconds_{count}_pairs": value for count, value in seconds.items()}
    row["most_to_least_pairs_seconds_per_pair_ratio"] = per_pair[max(counts)] / per_pair[min(counts)]
    return row


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--shapes", nargs="+", choices=[shape.name for shape in SHAPES], help="by default all that fit")
    parser.add_argument("--rounds", type=int, default=4, help="batches, each run by (a) and by (b)")
    parser.add_argument("--pairs", help="time (a) alone over these numbers of pairs, e.g. 1,2,4,8,16")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    keep_no_freed_memory()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    chosen = arguments.shapes or [shape.name for shape in SHAPES if device.type == "cuda" or not shape.cuda_only]
    rows = []
    for shape in SHAPES:
        if shape.name not in chosen:
            continue
        if arguments.pairs:
            counts = [int(count) for count in arguments.pairs.split(",")]
            row = scaling(shape, counts, arguments.rounds, device, dtype)
        else:
            row = compare(shape, arguments.rounds, device, dtype)
        rows.append({name: round(value, 4) if isinstance(value, float) else value for name, value in row.items()})
        if not arguments.json:
            print("\n".join(f"{name:44} {value}" for name, value in rows[-1].items()), end="\n\n", flush=True)
    result = provenance() | {"threads": arguments.threads, "rows": rows}
    result |= {f"{row['shape']}/{name}": value for row in rows for name, value in row.items() if name.endswith("ratio")}
    print(json.dumps(result) if arguments.json else "\n".join(f"{k:12} {v}" for k, v in provenance().items()))


if __name__ == "__main__":
    main()
