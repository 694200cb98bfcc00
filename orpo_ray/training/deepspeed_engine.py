"""The DeepSpeed engine: its config, AdamW, and the learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from orpo_ray.config.recipe import Recipe
from orpo_ray.config.schema import OptimConfig
from orpo_ray.data.packing import PairBatch
from orpo_ray.model.loading import without_adapters
from orpo_ray.objective.logps import PairLogps

_TAG = "engine"  # the folder of the engine's state in a checkpoint


def deepspeed_config(recipe: Recipe, dtype: torch.dtype, hidden_size: int) -> dict[str, Any]:
    """Return the DeepSpeed config of a recipe.

    Args:
        recipe: the resolved recipe.
        dtype: the type of the trained weights.
        hidden_size: of the language model; decides which weights ZeRO-3 leaves whole.
    """
    clips_itself = recipe.deepspeed.zero_stage > 0 or dtype != torch.float32
    return {
        # The training loop builds steps from micro-batches itself.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,  # a step has as many micro-batches as its pairs need
        "gradient_clipping": recipe.optim.max_grad_norm if clips_itself else 0.0,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "zero_optimization": {
            "stage": recipe.deepspeed.zero_stage,
            "overlap_comm": False,  # not with managed_gradient_accumulation off
            "stage3_gather_16bit_weights_on_model_save": True,
            "stage3_param_persistence_threshold": 10 * hidden_size,
        },
    }


class DeepSpeedEngine:
    """Implements `Engine` with DeepSpeed and ZeRO.

    Args:
        model: the `PairModel` to train, on this worker's device.
        recipe: the resolved recipe.
        num_steps: number of steps of the whole run, for the schedule.
        num_workers: number of workers that train together.
    """

    def __init__(self, model: nn.Module, recipe: Recipe, num_steps: int, num_workers: int) -> None:
        import deepspeed

        _compile_nothing(deepspeed)
        config = without_adapters(model.model).config  # type: ignore[arg-type]
        # From a trained weight: 4-bit weights are stored as bytes.
        dtype = next(parameter.dtype for parameter in model.parameters() if parameter.requires_grad)
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers() if buffer.dtype == torch.float32}
        optimizer = adamw(model, recipe.optim)
        self._grad_norm = _ClipAndKeepNorm(model, recipe.optim.max_grad_norm)
        if recipe.deepspeed.zero_stage == 0 and dtype == torch.float32:
            # In this case DeepSpeed clips without reporting the norm.
            optimizer.register_step_pre_hook(self._grad_norm)
        deepspeed.init_distributed(dist_init_required=False)
        if recipe.deepspeed.zero_stage == 3:
            _gather_head_at_once(deepspeed, model)
        self.deepspeed, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            lr_scheduler=schedule(optimizer, recipe.optim, num_steps),
            config=deepspeed_config(recipe, dtype, config.get_text_config().hidden_size),
            dist_init_required=False,
        )
        if recipe.deepspeed.zero_stage == 0 and dtype != torch.float32:
            # In this case DeepSpeed has already stepped once, with zero gradients, to allocate its memory. Adam would
            # count that step, and the first real step would be a quarter smaller than on the other stages.
            optimizer.state.clear()
        if num_workers == 1 and recipe.deepspeed.zero_stage == 0:
            # There is nothing to reduce; DeepSpeed would copy all gradients into one buffer and back.
            self.deepspeed.enable_backward_allreduce = False
        # DeepSpeed casts buffers too. Rotary frequencies in bfloat16 give wrong positions after a few hundred tokens.
        for name, buffer in buffers.items():
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, buffer.to(next(model.parameters()).device))
        self._num_workers, self._stage = num_workers, recipe.deepspeed.zero_stage

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next step."""
        return float(self.deepspeed.optimizer.param_groups[0]["lr"])

    def forward(self, batch: PairBatch) -> PairLogps:
        """Run the model on a micro-batch; ZeRO-3 gathers the weights layer by layer."""
        logps: PairLogps = self.deepspeed(batch)
        return logps

    def backward(self, loss: torch.Tensor) -> None:
        """Add a micro-batch's gradient."""
        # DeepSpeed averages over workers, and the step's gradient is a sum.
        self.deepspeed.backward(loss * self._num_workers)

    def step(self) -> float:
        """Reduce and clip the gradient, update the weights; return the norm before clipping."""
        if not self.deepspeed.enable_backward_allreduce:
            # The skipped reduction would have set missing gradients (of the vision module in a step without images) to
            # zero, and AdamW's momentum still moves those weights. Do the same, for any number of workers.
            for parameter in self.deepspeed.module.parameters():
                if parameter.requires_grad and parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
        self.deepspeed.step()
        norm = self.deepspeed.get_global_grad_norm()
        return float(self._grad_norm.last if norm is None else norm)

    def save(self, folder: Path) -> None:
        """Write this worker's shard of the state."""
        (folder / _TAG).mkdir(parents=True)
        self.deepspeed.save_checkpoint(str(folder), tag=_TAG, exclude_frozen_parameters=True)

    def load(self, folder: Path) -> None:
        """Load the state; above ZeRO stage 0 it needs the stage and the number of workers that wrote it."""
        self.deepspeed.load_checkpoint(str(folder), tag=_TAG, load_module_strict=False)

    def consolidated_weights(self, trained_only: bool) -> dict[str, torch.Tensor]:
        """Gather the weights, one at a time, into the main memory of rank 0."""
        import deepspeed

        module, sharded = self.deepspeed.module, self._stage == 3
        buffers = dict(module.named_buffers(remove_duplicate=False))
        parameters = {
            name: parameter
            for name, parameter in module.named_parameters(remove_duplicate=False)
            if parameter.requires_grad or not trained_only
        }
        if sharded:
            self.deepspeed.optimizer.checkpoint_event_prologue()
        state: dict[str, torch.Tensor] = {}
        copies: dict[torch.Tensor, torch.Tensor] = {}  # tied weights have one copy
        for name in module.state_dict():
            tensor = parameters.get(name, buffers.get(name))
            if tensor is None:
                continue
            with deepspeed.zero.GatheredParameters([tensor], enabled=sharded):
                if torch.distributed.get_rank() == 0:
                    if tensor not in copies:
                        # A gathered weight is released after this block.
                        copies[tensor] = tensor.detach().to("cpu", copy=sharded)
                    state[name] = copies[tensor]
        if sharded:
            self.deepspeed.optimizer.checkpoint_event_epilogue()
        return state


def adamw(model: nn.Module, optim: OptimConfig) -> torch.optim.Optimizer:
    """Return AdamW over the trained parameters, with moments in 32 or 8 bits. Biases and norms do not decay."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": optim.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    present = [group for group in groups if group["params"]]
    options: dict[str, Any] = {
        "lr": optim.learning_rate,
        "betas": (optim.adam_beta1, optim.adam_beta2),
        "eps": optim.adam_epsilon,
    }
    if optim.optimizer == "adamw":
        return torch.optim.AdamW(present, fused=True, **options)
    from bitsandbytes.optim.adamw import AdamW8bit, PagedAdamW8bit

    kind: Any = AdamW8bit if optim.optimizer == "adamw_8bit" else PagedAdamW8bit
    return cast(torch.optim.Optimizer, kind(present, **options))


def schedule(optimizer: torch.optim.Optimizer, optim: OptimConfig, num_steps: int) -> LambdaLR:
    """Return transformers' linear, cosine or constant schedule, after a linear warm-up.

    The formulas are written here because importing transformers' own also imports peft and bitsandbytes, which takes
    seconds of every start.
    """
    warmup = math.ceil(optim.warmup * num_steps) if optim.warmup < 1 else round(optim.warmup)

    def factor(step: int) -> float:
        if step < warmup:
            return step / max(1, warmup)
        if optim.schedule == "constant":
            return 1.0
        if optim.schedule == "linear":
            return max(0.0, (num_steps - step) / max(1, num_steps - warmup))
        return max(0.0, 0.5 * (1.0 + math.cos(math.pi * ((step - warmup) / max(1, num_steps - warmup)))))

    return LambdaLR(optimizer, factor)


class _ClipAndKeepNorm:
    """Optimizer hook: clips the gradient just before a step and keeps its norm."""

    def __init__(self, model: nn.Module, max_norm: float) -> None:
        self.model, self.max_norm, self.last = model, max_norm, 0.0

    def __call__(self, *_: Any) -> None:
        norm = torch.nn.utils.clip_grad_norm_(self._with_gradient(), self.max_norm or math.inf)
        self.last = float(norm)

    def _with_gradient(self) -> Iterator[torch.Tensor]:
        return (parameter for parameter in self.model.parameters() if parameter.grad is not None)


def _gather_head_at_once(deepspeed: Any, model: nn.Module) -> None:
    """Gather an output head with modules inside, such as adapters, as one: they run once for each chunk of targets, and
    workers have different numbers of chunks."""
    head = without_adapters(model.model).get_output_embeddings()  # type: ignore[arg-type]
    if next(head.children(), None) is not None:
        deepspeed.utils.set_z3_leaf_module(head, True)


def _compile_nothing(deepspeed: Any) -> None:
    """Keep DeepSpeed from looking for kernels that it could compile, which takes seconds of compiler runs.

    Of the result it would use its shared-memory collective on a CPU, and compile that for a minute; gloo suffices.
    """
    vars(deepspeed.ops)["__compatible_ops__"] = {}
