"""Steps per second and MFU on a GPU, against the usual step and against `orpo-ray plan`, with random weights.

    python benchmarks/gpu.py [--shapes NAME ...] [--checkpointing MODE] [--rounds N] [--json]
    python benchmarks/gpu.py --tiny   # small models of the same families, to run the program on a CPU

Needs no network: models are built from their configs on the device. A step is forward, ORPO loss and backward of one
micro-batch. (a) is orpo-ray: one packed row [prompt | chosen | rejected] ..., each image once, logits at answers only.
(b) is the usual implementation with the same model: both answers as padded rows, each image twice, logits everywhere.
(c) is (a) with transformers' and peft's own layers, as (b) has them. All run in turn. MFU counts the FLOPs of (a)
without recomputation.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from machine import provenance
from step_throughput import loss_of_logits, measured, ours, set_attention

from orpo_ray.config.field_types import Checkpointing
from orpo_ray.config.schema import LoraConfig, ModelConfig, QuantizationConfig
from orpo_ray.data.balance import Layout
from orpo_ray.data.encoding import EncodedPair
from orpo_ray.data.packing import RESPONSE, PairBatch, build_batch
from orpo_ray.model import shared_prefix, vision_attention
from orpo_ray.model.families.idefics3 import Idefics3
from orpo_ray.model.families.registry import family_of
from orpo_ray.model.fused_layers import rotary_on
from orpo_ray.model.loading import ready_to_train, without_adapters
from orpo_ray.model.quantization import quantization_config
from orpo_ray.objective.pair_model import PIXELS_AT_ONCE, PairModel
from orpo_ray.planning.activations import NORM, PairShape, batch_of, measure, more_logits, unloaded_model
from orpo_ray.planning.gpus import Gpu, gpu_named
from orpo_ray.planning.images import image_shape
from orpo_ray.planning.known_shapes import KNOWN_SHAPES
from orpo_ray.planning.states import Weights
from orpo_ray.planning.step_time import Load, Rates, step_time
from orpo_ray.tiny_models.families import TINY_FAMILIES

# Tokens of a prompt's text, and of each answer.
PROMPT, ANSWER = 60, 150
# What the models take of a batch's images in their own forward.
OWN_INPUTS = ("pixel_values", "image_sizes", "image_grid_thw")


@dataclass(frozen=True)
class GpuShape:
    """A model, the way it is tuned, and the pairs of a micro-batch."""

    name: str
    model_id: str
    tiny: str
    """The family of the small model that `--tiny` takes instead."""
    pairs: int
    lora: bool = False
    quantized: bool = False

    def model_config(self, checkpointing: Checkpointing = "none") -> ModelConfig:
        """The `model` section of a recipe."""
        return ModelConfig(
            id=self.model_id,
            gradient_checkpointing=checkpointing,
            lora=LoraConfig(r=16) if self.lora else None,
            quantization=QuantizationConfig() if self.quantized else None,
        )


LLAVA = "llava-hf/llava-v1.6-mistral-7b-hf"
SHAPES = (
    GpuShape("smolvlm-256m-full", "HuggingFaceTB/SmolVLM-256M-Instruct", "smolvlm", 8),
    GpuShape("llava-1.6-7b-lora", LLAVA, "llava_next", 2, lora=True),
    GpuShape("llava-1.6-7b-qlora", LLAVA, "llava_next", 2, lora=True, quantized=True),
    GpuShape("qwen2.5-vl-7b-lora", "Qwen/Qwen2.5-VL-7B-Instruct", "qwen2_5_vl", 4, lora=True),
)


def build(section: ModelConfig, config: Any, device: torch.device, dtype: torch.dtype) -> PairModel:
    """Build the model with random weights, ready to train."""
    from transformers import AutoModelForImageTextToText

    torch.manual_seed(0)
    shared_prefix.register()
    attention = {"text_config": shared_prefix.NAME, "vision_config": "sdpa"}
    with device:
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype, attn_implementation=attention)
    if section.quantization is not None:
        quantize(model, device, dtype)
    model = ready_to_train(model, section, seed=0, fused=True).to(device)
    return PairModel(model, NORM, PIXELS_AT_ONCE[device.type] if section.gradient_checkpointing != "none" else None)


def quantize(model: Any, device: torch.device, dtype: torch.dtype) -> None:
    """Pack the weights that QLoRA packs, one at a time."""
    from bitsandbytes.nn import Linear4bit, Params4bit
    from transformers.quantizers.quantizers_utils import should_convert_module

    skipped = quantization_config(QuantizationConfig(), family_of(model.config), dtype).llm_int8_skip_modules
    for name, linear in list(model.named_modules()):
        if not isinstance(linear, torch.nn.Linear) or not should_convert_module(name, skipped):
            continue
        packed = Linear4bit(
            linear.in_features, linear.out_features, linear.bias is not None, dtype, quant_type="nf4", device="meta"
        )
        packed.weight = Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4").to(device)
        packed.bias = linear.bias
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, packed)
    model.requires_grad_(False)


def random_pairs(shape: PairShape, count: int, config: Any) -> list[EncodedPair]:
    """Pairs of random tokens and pixels: a GPU multiplies equal numbers faster than others."""
    random, vocabulary = np.random.default_rng(0), config.get_text_config().vocab_size // 2  # below special tokens

    def tokens(ids: np.ndarray) -> np.ndarray:
        return np.where(ids == config.image_token_id, ids, random.integers(10, vocabulary, len(ids))).astype(np.int32)

    pairs = []
    for pair in (shape.pair(config.image_token_id, index) for index in range(count)):
        ids = {name: tokens(getattr(pair, name)) for name in ("prompt_ids", "chosen_ids", "rejected_ids")}
        pixels = random.integers(0, 256, pair.images["pixel_values"].shape).astype(np.uint8)
        pairs.append(replace(pair, **ids, images=pair.images | {"pixel_values": pixels}))
    return pairs


def usual(model: PairModel, batch: PairBatch) -> torch.Tensor:
    """(b): the model's own forward on a padded batch of both answers, as in other trainers."""
    inputs = model.family.vision_inputs(batch.images, NORM, next(model.parameters()).dtype)
    images = {name: torch.cat([value, value]) for name, value in inputs.items() if name in OWN_INPUTS}
    if isinstance(model.family, Idefics3):  # takes [rows, tiles, ...]
        pixels = images["pixel_values"]
        images["pixel_values"] = pixels.view(len(batch.input_ids), -1, *pixels.shape[1:])
    others = (
        {"attention_mask": (batch.token_kind <= RESPONSE).long()} | model.family.concatenated_inputs(batch) | images
    )
    return loss_of_logits(model.model(input_ids=batch.input_ids, use_cache=False, **others).logits, batch)


@contextmanager
def own_layers(model: torch.nn.Module) -> Iterator[None]:
    """Take fused layers back: forward passes that `fuse_layers` and `fuse_adapters` replaced."""
    replaced = {module: vars(module).pop("forward") for module in model.modules() if "forward" in vars(module)}
    with rotary_on():
        yield
    for module, forward in replaced.items():
        module.forward = forward


def step_of(which: str, model: PairModel, batches: dict[Layout, PairBatch], device: torch.device) -> dict[str, float]:
    """Measure one step of (a), (b) or (c)."""
    layout: Layout = "concatenated" if which == "b" else "shared_prefix"
    set_attention(model, "sdpa" if which == "b" else shared_prefix.NAME)
    if which == "a":
        vision_attention.use_in(without_adapters(model.model))
    with nullcontext() if which == "a" else own_layers(model):
        return measured(lambda: (usual if which == "b" else ours)(model, batches[layout]), model, device)


def run(
    shape: GpuShape, mode: Checkpointing, tiny: bool, rounds: int, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """Measure a shape."""
    config = TINY_FAMILIES[shape.tiny]().config() if tiny else KNOWN_SHAPES[shape.model_id].config()
    image = image_shape(config)
    pair = PairShape(PROMPT, ANSWER, ANSWER, 1, image.tokens, image.vision)
    pairs = random_pairs(pair, shape.pairs, config)
    collate = family_of(config).collate
    batches: dict[Layout, PairBatch] = {
        layout: build_batch(pairs, "response", layout, collate=collate).to(device)
        for layout in ("shared_prefix", "concatenated")
    }
    section = shape.model_config(mode)
    model = build(section, config, device, dtype)
    found: dict[str, list[dict[str, float]]] = {"a": [], "b": [], "c": []}
    fits = dict.fromkeys(found, True)
    for number in range(rounds + 1):
        for which in "acb" if number % 2 else "bca":
            if not fits[which]:
                continue
            try:
                result = step_of(which, model, batches, device)
            except torch.OutOfMemoryError:
                if which == "a":
                    raise
                fits[which] = False
                continue
            if number:  # the first round warms up
                found[which].append(result)
    tokens = batches["shared_prefix"].input_ids.numel()
    row: dict[str, Any] = {
        "shape": shape.name + " (tiny)" * tiny,
        "dtype": str(dtype).removeprefix("torch."),
        "checkpointing": mode,
        "pairs": shape.pairs,
        "tokens_per_pair": tokens // shape.pairs,
    }
    names = {"a": "ours", "b": "usual", "c": "ours_own_layers"}
    for which, name in names.items():
        for key, unit in (("seconds", "s"), ("peak_mib", "peak_mib"), ("loss", "loss")):
            row[f"{name}_{unit}"] = min(each[key] for each in found[which]) if found[which] else None
    for which in "bc":
        seconds = row[f"{names[which]}_s"]
        row[f"{names[which]}_to_ours_seconds_ratio"] = seconds / row["ours_s"] if seconds else None
    row["ours_tokens_per_s"] = tokens / row["ours_s"]
    return row | planned(shape, section, config, pair, row["ours_s"], row["ours_peak_mib"], dtype, device)


def planned(
    shape: GpuShape,
    section: ModelConfig,
    config: Any,
    pair: PairShape,
    seconds: float,
    peak_mib: float,
    dtype: torch.dtype,
    device: torch.device,
) -> dict[str, Any]:
    """What `orpo-ray plan` expects of (a), and what was reached."""
    one = batch_of(pair, 1, config, "response", "shared_prefix")
    found, least = (
        measure(each, config, dtype, "shared_prefix", one, True, "cuda")
        for each in (section, section.model_copy(update={"gradient_checkpointing": "none"}))
    )
    logits = more_logits(len(one.target_ids), shape.pairs, config, dtype)
    activations = found.with_pairs(shape.pairs, section.gradient_checkpointing != "none", logits)
    unloaded = unloaded_model(section, config, dtype, "shared_prefix")
    weights = Weights.of(unloaded, section, dtype, config.get_text_config().hidden_size)
    held = weights.bytes + weights.trained * weights.element + weights.largest_quantized
    flops = least.work.flops * shape.pairs
    row = {"flops": flops, "kernels": found.work.kernels, "planned_peak_mib": (held + activations.peak) / 2**20}
    gpu = this_gpu(device)
    if gpu is not None:
        row["measured_to_planned_peak_ratio"] = peak_mib / row["planned_peak_mib"]
        time = step_time(found.work, weights, "adamw", Load(0, 1, shape.pairs, shape.pairs), gpu, Rates())
        expected = time.total - time.optimizer
        row |= {"mfu": flops / (seconds * gpu.flops), "planned_s": expected}
        row["measured_to_planned_seconds_ratio"] = seconds / expected
    return row


def this_gpu(device: torch.device) -> Gpu | None:
    """The type of this machine's GPU, if the plan knows it."""
    if device.type != "cuda":
        return None
    return gpu_named(torch.cuda.get_device_name())


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=[shape.name for shape in SHAPES], help="by default all")
    parser.add_argument("--checkpointing", choices=("none", "full"), default="none", help="gradient checkpointing")
    parser.add_argument("--rounds", type=int, default=5, help="steps of each, after one each to warm up")
    parser.add_argument("--tiny", action="store_true", help="small models, also on a CPU")
    parser.add_argument("--flash", help="another flash attention that torch knows and that is installed, such as FA3")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not arguments.tiny:
        parser.error("no GPU on this machine; --tiny runs small models on the CPU")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if arguments.flash is not None:
        torch.nn.attention.activate_flash_attention_impl(arguments.flash)
    rows = []
    for shape in SHAPES:
        if arguments.shapes and shape.name not in arguments.shapes:
            continue
        rows.append(run(shape, arguments.checkpointing, arguments.tiny, arguments.rounds, device, dtype))
        gc.collect()
        if not arguments.json:
            print("\n".join(f"{name:36} {value}" for name, value in rows[-1].items()), end="\n\n", flush=True)
    result = provenance() | {"rows": rows}
    result |= {f"{row['shape']}/{name}": value for row in rows for name, value in row.items() if name.endswith("ratio")}
    print(json.dumps(result) if arguments.json else "\n".join(f"{k:12} {v}" for k, v in provenance().items()))


if __name__ == "__main__":
    main()
