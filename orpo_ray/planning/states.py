"""What a worker holds of a model between steps, in bytes: weights, gradients, optimizer states, by ZeRO stage.

Counted as DeepSpeed 0.19.8 holds it with the config of `training/deepspeed.py`; its own files are named beside each.
tests/integration/test_planning_states.py compares each with the storages of real engines.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from orpo_ray.config.schema import ModelConfig

Stage = Literal[0, 1, 2, 3]
STAGES: tuple[Stage, ...] = (0, 1, 2, 3)
# DeepSpeed's defaults, which the recipe leaves alone: elements of a reduce bucket, of a ZeRO-3 sub-group, and of the
# weights that ZeRO-3 keeps gathered (zero/config.py: reduce_bucket_size, sub_group_size, max_live_parameters).
BUCKET, SUB_GROUP, MAX_LIVE = 500_000_000, 1_000_000_000, 1_000_000_000
# bitsandbytes: weights that share a scale, scales that share one, moments that share one, and the smallest tensor
# whose moments it holds in 8 bits.
BLOCK, BLOCK_OF_SCALES, MOMENT_BLOCK, MIN_8BIT = 64, 256, 256, 4096


@dataclass(frozen=True)
class Weight:
    """One parameter. elements: of it. bytes: as it is stored, scales included. is_matrix: 2 axes or more; it decays."""

    elements: int
    bytes: int
    trained: bool
    is_matrix: bool
    quantized: bool = False


@dataclass(frozen=True)
class States:
    """Bytes on one worker. buffers: what the engine adds around a backward. step: more, while the optimizer steps, when
    activations are gone. start: the weights as they are loaded, whole, before the engine divides them.
    """

    weights: int
    gradients: int
    optimizer: int
    buffers: int
    step: int
    start: int


@dataclass(frozen=True)
class Weights:
    """All parameters of a model, tied ones once, in its order. element: bytes of one that is not quantised."""

    each: tuple[Weight, ...]
    element: int
    hidden: int

    @classmethod
    def of(cls, model: torch.nn.Module, section: ModelConfig, dtype: torch.dtype, hidden: int) -> Weights:
        """Of a model on any device (`meta` will do) that is ready to train."""
        packed = _quantized_names(model, section)
        each = []
        for name, parameter in model.named_parameters():
            elements, quantized = parameter.numel(), name in packed
            size = _packed_bytes(elements, section) if quantized else elements * dtype.itemsize
            each.append(Weight(elements, size, parameter.requires_grad, parameter.ndim >= 2, quantized))
        return cls(tuple(each), dtype.itemsize, hidden)

    @property
    def total(self) -> int:
        """Parameters in all."""
        return sum(weight.elements for weight in self.each)

    @property
    def trained(self) -> int:
        """Parameters that are trained."""
        return sum(weight.elements for weight in self.each if weight.trained)

    @property
    def bytes(self) -> int:
        """Of all of them, whole."""
        return sum(weight.bytes for weight in self.each)

    @property
    def largest_quantized(self) -> int:
        """Bytes of the largest packed weight as it is multiplied: one at a time is (bitsandbytes' MatMul4Bit)."""
        return max((weight.elements * self.element for weight in self.each if weight.quantized), default=0)


def states(weights: Weights, stage: Stage, workers: int, optimizer: str) -> States:
    """What each of `workers` holds. optimizer: the recipe's `optim.optimizer`."""
    trained, element = weights.trained, weights.element
    whole = weights.bytes
    share = -(-trained // workers) if stage else trained
    # float32 masters beside bf16 weights: at stage 0 FP16_UnfusedOptimizer makes them (fp16/unfused_optimizer.py), as
    # the recipe's AdamW is torch's and not DeepSpeed's fused one. ZeRO clones its part even of float32 weights
    # (zero/stage_1_and_2.py and stage3.py: `single_partition_of_fp32_groups`, `fp32_partitioned_groups_flat`).
    masters = 4 * share if stage or element != 4 else 0
    held = masters + _moments(weights, stage, share, optimizer)
    bucket = BUCKET * element
    if stage == 0:
        # Unfused: all gradients once more in float32, beside the others (`step`, "copying gradients to fp32").
        step = 4 * trained if element != 4 else 0
        # engine.py, allreduce_no_retain: gradients travel in one flat copy of at most a bucket, after backward.
        travel = min(trained, BUCKET) * element if workers > 1 else 0
        return States(whole, element * trained, held, 0, max(step, travel), whole)
    # The bucket is made whole however small the model is (stage_1_and_2.py: setup_buckets; stage3.py: `bucket.buffer`).
    if stage < 3:
        gradients = element * (trained if stage == 1 else _held_gradients(weights, workers))
        # `step` flattens a group's part, then turns it into float32; bucket and activations are gone by then.
        step = share * (element + 4 if element != 4 else 4)
        return States(whole, gradients, held, bucket, step, whole)
    # Each weight's part, and small ones whole besides (param_persistence_threshold).
    small = sum(weight.bytes for weight in weights.each if weight.elements <= 10 * weights.hidden)
    gathered = min(whole, MAX_LIVE * element)
    step = min(share, SUB_GROUP) * (element + 4 if element != 4 else 4)
    parts = sum(-(-weight.bytes // workers) for weight in weights.each)
    return States(parts + small, element * share, held, bucket + gathered, step, whole)


def _moments(weights: Weights, stage: Stage, share: int, optimizer: str) -> int:
    """Adam's two, of this worker's part."""
    if optimizer == "adamw":
        return 8 * share
    if optimizer == "paged_adamw_8bit":
        return 0  # may leave for the CPU's memory
    # ZeRO hands over one flat tensor a group, stage 0 each parameter by itself.
    large = share if stage else sum(w.elements for w in weights.each if w.trained and w.elements >= MIN_8BIT)
    return 2 * (large + 4 * -(-large // MOMENT_BLOCK)) + 8 * (share - large)


def _held_gradients(weights: Weights, workers: int) -> int:
    """Elements of the gradients that the fullest worker keeps at stage 2: its parts of both groups.

    A parameter that lies across the border of two parts is kept whole on both sides (stage_1_and_2.py:
    get_flat_partition takes a narrow view of it).
    """
    held = [0] * workers
    for is_matrix in (True, False):
        sizes = [weight.elements for weight in weights.each if weight.trained and weight.is_matrix == is_matrix]
        part, place = -(-sum(sizes) // workers), 0
        for size in sizes:
            for worker in range(place // part, (place + size - 1) // part + 1):
                held[worker] += size
            place += size
    return max(held)


def _packed_bytes(elements: int, section: ModelConfig) -> int:
    """A weight in 4 bits: two in a byte, a scale a block; double quantisation holds the scales in 8 bits.

    bitsandbytes' QuantState: absmax, code (16 float32), and with double quantisation offset and a state2 (256 float32).
    """
    assert section.quantization is not None
    blocks = -(-elements // BLOCK)
    scales = 4 * blocks
    if section.quantization.use_double_quant:
        scales = blocks + 4 * -(-blocks // BLOCK_OF_SCALES) + 4 * 256 + 4
    return -(-elements // 2) + scales + 4 * 16


def _quantized_names(model: Any, section: ModelConfig) -> set[str]:
    """Names of the parameters that are loaded in 4 bits."""
    if section.quantization is None:
        return set()
    from transformers.quantizers.quantizers_utils import should_convert_module

    from orpo_ray.model.families.registry import family_of
    from orpo_ray.model.loading import without_adapters
    from orpo_ray.model.quantization import quantization_config

    base = without_adapters(model)
    dtype = next(model.parameters()).dtype
    config = quantization_config(section.quantization, family_of(base.config), dtype)
    packed: set[int] = set()
    for name, module in base.named_modules():
        linear = getattr(module, "base_layer", module)  # inside of an adapter
        plain = name.removesuffix(".base_layer")
        taken = isinstance(linear, torch.nn.Linear) and ".lora_" not in name
        if taken and should_convert_module(plain, config.llm_int8_skip_modules):
            packed.add(id(linear.weight))
    return {name for name, parameter in model.named_parameters() if id(parameter) in packed}
