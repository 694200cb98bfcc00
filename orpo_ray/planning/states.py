"""Bytes that a worker holds between steps, by ZeRO stage: weights, gradients, optimizer states.

Stage 0 is `training/replicated_engine.py`. For the others, the formulas follow DeepSpeed 0.19.8 with the config of
`training/deepspeed_engine.py`; comments name the files in DeepSpeed.
tests/integration/test_planning_states.py compares the results with the storages of real engines.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from typing import Any, Literal

import torch

from orpo_ray.config.schema import ModelConfig
from orpo_ray.model.families.registry import family_of
from orpo_ray.planning.depth import LAYERS_RUN, depths, is_deep, with_depth

Stage = Literal[0, 1, 2, 3]
STAGES: tuple[Stage, ...] = (0, 1, 2, 3)
# Defaults of DeepSpeed, in elements: size of a ZeRO-3 sub-group, and maximum of weights that ZeRO-3 keeps gathered
# (zero/config.py: sub_group_size, max_live_parameters).
SUB_GROUP, MAX_LIVE = 1_000_000_000, 1_000_000_000
# Elements of the smallest reduce bucket, unless there are fewer weights to reduce: 64 MiB in float32, enough to use a
# link fully.
MIN_BUCKET = 2**24
# bitsandbytes: weights per scale, scales per second-level scale, moments per scale, and elements of the smallest tensor
# with 8-bit moments.
BLOCK, BLOCK_OF_SCALES, MOMENT_BLOCK, MIN_8BIT = 64, 256, 256, 4096


_PEFT = "base_model.model."  # what names of parameters begin with in a model with adapters


@dataclass(frozen=True)
class Weight:
    """Sizes of one parameter."""

    elements: int
    bytes: int
    """Bytes as stored, with quantization scales."""
    trained: bool
    is_matrix: bool
    """Whether it has at least two dimensions; such parameters have weight decay."""
    quantized: bool = False


@dataclass(frozen=True)
class Offload:
    """What a worker keeps in main memory instead of its GPU, at the ZeRO stages that can."""

    optimizer: bool = False
    """Optimizer states and masters, and at stage 3 the gradients (`deepspeed.offload_optimizer`)."""
    weights: bool = False
    """Its part of the weights, at stage 3 (`deepspeed.offload_param`)."""

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The ZeRO stages at which a recipe can say so."""
        least = 3 if self.weights else 1 if self.optimizer else 0
        return tuple(stage for stage in STAGES if stage >= least)

    def apply(self, found: States, stage: Stage, shards: int) -> States:
        """Move bytes from a worker's GPU to its main memory.

        Args:
            found: the bytes without offloading.
            stage: ZeRO stage.
            shards: bytes of the worker's part of the weights, at stage 3.
        """
        optimizer = found.optimizer if self.optimizer and stage else 0
        gradients = found.gradients if self.optimizer and stage == 3 else 0
        weights = shards if self.weights and stage == 3 else 0
        return replace(
            found,
            weights=found.weights - weights,
            gradients=found.gradients - gradients,
            optimizer=found.optimizer - optimizer,
            step=0 if optimizer else found.step,  # the step is in main memory too
            start=found.start - weights,
            host=optimizer + gradients + weights,
        )


@dataclass(frozen=True)
class States:
    """Bytes on one worker."""

    weights: int
    gradients: int
    optimizer: int
    """Optimizer states and float32 master weights."""
    buffers: int
    """Buffers of the engine during the backward pass."""
    step: int
    """Temporary memory of the optimizer step, after activations are freed."""
    start: int
    """The most while the model is loaded."""
    host: int = 0
    """In main memory; all others are on the GPU."""


@dataclass(frozen=True)
class Weights:
    """Sizes of all parameters of a model. Tied parameters count once."""

    each: tuple[Weight, ...]
    element: int
    """Bytes per element of an unquantized weight."""
    hidden: int
    """Hidden size of the language model."""

    @classmethod
    def of(cls, model: torch.nn.Module, model_config: ModelConfig, dtype: torch.dtype, hidden: int) -> Weights:
        """Collect the sizes of a model that is ready to train, on any device (also `meta`)."""
        packed = _quantized_names(model, model_config)
        each = []
        for name, parameter in model.named_parameters():
            elements, quantized = parameter.numel(), name in packed
            size = _packed_bytes(elements, model_config) if quantized else elements * dtype.itemsize
            each.append(Weight(elements, size, parameter.requires_grad, parameter.ndim >= 2, quantized))
        return cls(tuple(each), dtype.itemsize, hidden)

    @classmethod
    def of_deep(
        cls, build: Callable[[Any], torch.nn.Module], model_config: ModelConfig, config: Any, dtype: torch.dtype
    ) -> Weights:
        """Collect the sizes of a model that is not built whole, since that takes seconds: of few of its layers.

        Args:
            build: returns a model that is ready to train, from a config in transformers.
            model_config: `model` section of the recipe.
            config: the model's config in transformers.
            dtype: of the weights.
        """
        hidden, family = config.get_text_config().hidden_size, family_of(config)
        if not is_deep(config):
            return cls.of(build(config), model_config, dtype, hidden)
        few, deeper = (build(with_depth(config, layers, layers)) for layers in (LAYERS_RUN, LAYERS_RUN + 1))
        known = {name for name, _ in few.named_parameters()}
        names = [name for name, _ in deeper.named_parameters()]
        sizes = cls.of(deeper, model_config, dtype, hidden).each
        language, vision = depths(config)
        each: list[Weight] = []
        # What the deeper model has in addition is the last layer of each part. It is repeated where it is.
        for is_new, run in groupby(zip(names, sizes, strict=True), key=lambda weight: weight[0] not in known):
            weights = list(run)
            is_language = weights[0][0].removeprefix(_PEFT).startswith(family.language)
            times = (language if is_language else vision) - LAYERS_RUN if is_new else 1
            each += [weight for _, weight in weights] * times
        return cls(tuple(each), dtype.itemsize, hidden)

    @cached_property
    def total(self) -> int:
        """Number of parameters."""
        return sum(weight.elements for weight in self.each)

    @cached_property
    def trained(self) -> int:
        """Number of trained parameters."""
        return sum(weight.elements for weight in self.each if weight.trained)

    @cached_property
    def bytes(self) -> int:
        """Bytes of all parameters, unsharded."""
        return sum(weight.bytes for weight in self.each)

    @cached_property
    def largest_quantized(self) -> int:
        """Bytes of the largest 4-bit weight when dequantized; bitsandbytes dequantizes one at a time (MatMul4Bit)."""
        return max((weight.elements * self.element for weight in self.each if weight.quantized), default=0)


def reduce_bucket(hidden: int, trained: int) -> int:
    """Return the elements of gradients that ZeRO reduces at a time: a matrix of the language model, or all it trains.

    Args:
        hidden: hidden size of the language model.
        trained: elements of all trained weights.
    """
    return min(max(hidden**2, MIN_BUCKET), trained)


def states(weights: Weights, stage: Stage, workers: int, optimizer: str, offload: Offload | None = None) -> States:
    """Return the bytes on each worker.

    Args:
        weights: sizes of the parameters.
        stage: ZeRO stage.
        workers: number of workers.
        optimizer: the recipe's `optim.optimizer`.
        offload: what is in main memory; by default, nothing.
    """
    found = _on_gpu(weights, stage, workers, optimizer)
    shards = sum(-(-weight.bytes // workers) for weight in weights.each)
    return found if offload is None else offload.apply(found, stage, shards)


def _on_gpu(weights: Weights, stage: Stage, workers: int, optimizer: str) -> States:
    trained, element = weights.trained, weights.element
    whole = weights.bytes
    shard = -(-trained // workers) if stage else trained
    is_float32 = element == 4
    # float32 copies of bf16 weights. ZeRO clones its shard even of float32 weights (zero/stage_1_and_2.py and
    # stage3.py: `single_partition_of_fp32_groups`, `fp32_partitioned_groups_flat`).
    masters = 4 * shard if stage or not is_float32 else 0
    held = masters + _moment_bytes(weights, stage, shard, optimizer)
    if stage == 0 or (stage == 1 and not is_float32):
        # A float32 buffer of all gradients, which is reduced in the step: at stage 0 in place, at stage 1 in a copy
        # (bf16_optimizer.py; engine.py: allreduce_no_retain).
        return States(whole, 4 * trained, held, 0, 4 * trained if stage else 0, whole)
    bucket = reduce_bucket(weights.hidden, trained)
    # While a bucket is reduced, there is a copy in float32 (`communication_data_type`).
    copy = 0 if is_float32 else 4 * bucket
    if stage < 3:
        # Gradients fill one bucket while the other is reduced, at stage 2 (`overlap_comm`). Reducing flattens a bucket
        # (stage_1_and_2.py: setup_buckets, allreduce_bucket).
        buffers = (stage + 1) * bucket * element + copy
        # bf16 gradients are added up in a float32 buffer of the shard, which the step uses as it is
        # (_build_compact_grad_partition_buffer); float32 gradients are kept as they are and flattened in the step.
        if not is_float32:
            return States(whole, 4 * shard, held, buffers, 0, whole)
        gradients = 4 * (trained if stage == 1 else _gradient_elements_at_stage_2(weights, workers))
        return States(whole, gradients, held, buffers, 4 * shard, whole)
    # Reducing joins the shards of a bucket by worker (stage3.py: reduce_scatter_coalesced).
    buffers = bucket * (element + 4) + copy
    # A shard of each weight, and small weights unsharded in addition (param_persistence_threshold).
    small = sum(weight.bytes for weight in weights.each if weight.elements <= 10 * weights.hidden)
    gathered = min(whole, MAX_LIVE * element)
    step = 4 * min(shard, SUB_GROUP)  # the step flattens the gradients of a sub-group
    shards = sum(-(-weight.bytes // workers) for weight in weights.each)
    # Weights are divided one by one while they are loaded. Next to 4-bit ones, others may stay whole until the end
    # (training/quantized_loading.py).
    start = shards + max(weight.elements for weight in weights.each) * element
    if any(weight.quantized for weight in weights.each):
        others = sum(weight.bytes for weight in weights.each if not weight.quantized)
        start = min(whole, max(start, shards + others))
    return States(shards + small, 4 * shard, held, buffers + gathered, step, start)


def _moment_bytes(weights: Weights, stage: Stage, shard: int, optimizer: str) -> int:
    """Return the bytes of both moments of Adam for a shard of `shard` elements."""
    if optimizer == "adamw":
        return 8 * shard
    if optimizer == "paged_adamw_8bit":
        return 0  # can be moved to CPU memory
    # ZeRO passes one flat tensor per group to the optimizer, stage 0 each parameter separately.
    large = shard if stage else sum(w.elements for w in weights.each if w.trained and w.elements >= MIN_8BIT)
    return 2 * (large + 4 * -(-large // MOMENT_BLOCK)) + 8 * (shard - large)


def _gradient_elements_at_stage_2(weights: Weights, workers: int) -> int:
    """Return the elements of gradients that the worker with the most keeps at stage 2, over both parameter groups.

    The gradient of a parameter on the border of two shards is kept completely on both workers (stage_1_and_2.py:
    get_flat_partition takes a narrow view).
    """
    held = [0] * workers
    for is_matrix in (True, False):
        sizes = [weight.elements for weight in weights.each if weight.trained and weight.is_matrix == is_matrix]
        shard, offset = -(-sum(sizes) // workers), 0
        for size in sizes:
            for worker in range(offset // shard, (offset + size - 1) // shard + 1):
                held[worker] += size
            offset += size
    return max(held)


def _packed_bytes(elements: int, model_config: ModelConfig) -> int:
    """Return the bytes of a 4-bit weight: half a byte per element, plus scales (8 bits with double quantization).

    As in bitsandbytes' QuantState: absmax, code (16 float32), and with double quantization offset and state2 (256
    float32).
    """
    assert model_config.quantization is not None
    blocks = -(-elements // BLOCK)
    scales = 4 * blocks
    if model_config.quantization.use_double_quant:
        scales = blocks + 4 * -(-blocks // BLOCK_OF_SCALES) + 4 * 256 + 4
    return -(-elements // 2) + scales + 4 * 16


def _quantized_names(model: Any, model_config: ModelConfig) -> set[str]:
    """Return the names of the parameters that are loaded in 4 bits."""
    if model_config.quantization is None:
        return set()
    from transformers.quantizers.quantizers_utils import should_convert_module

    from orpo_ray.model.loading import without_adapters
    from orpo_ray.model.quantization import quantization_config

    base = without_adapters(model)
    dtype = next(model.parameters()).dtype
    config = quantization_config(model_config.quantization, family_of(base.config), dtype)
    packed: set[int] = set()
    for name, module in base.named_modules():
        linear = getattr(module, "base_layer", module)  # wrapped by an adapter
        plain = name.removesuffix(".base_layer")
        is_base_linear = isinstance(linear, torch.nn.Linear) and ".lora_" not in name
        if is_base_linear and should_convert_module(plain, config.llm_int8_skip_modules):
            packed.add(id(linear.weight))
    return {name for name, parameter in model.named_parameters() if id(parameter) in packed}
