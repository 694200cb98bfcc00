"""Recipe -> DeepSpeed engine: its config, AdamW, the schedule, and what keeps CPU runs from compiling anything."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import nn

from orpo_ray.config.recipe import Recipe
from orpo_ray.config.schema import OptimConfig
from orpo_ray.model.loading import without_adapters


def deepspeed_config(recipe: Recipe, dtype: torch.dtype, hidden_size: int) -> dict[str, Any]:
    """The engine's config. Steps and their number of micro-batches are the loop's own, so both are 1 here."""
    clips_itself = recipe.deepspeed.zero_stage > 0 or dtype != torch.float32
    return {
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


class Engine:
    """DeepSpeed's engine with the three things the loop needs of it: forward, backward, step."""

    def __init__(self, model: nn.Module, recipe: Recipe, num_steps: int, num_workers: int) -> None:
        import deepspeed

        _compile_nothing(deepspeed)
        config = without_adapters(model.model).config  # type: ignore[arg-type]
        # Of what is trained: 4-bit weights are bytes.
        dtype = next(parameter.dtype for parameter in model.parameters() if parameter.requires_grad)
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers() if buffer.dtype == torch.float32}
        optimizer = adamw(model, recipe.optim)
        self._grad_norm = _ClipAndKeepNorm(model, recipe.optim.max_grad_norm)
        if recipe.deepspeed.zero_stage == 0 and dtype == torch.float32:
            # Here DeepSpeed clips without saying what the norm was.
            optimizer.register_step_pre_hook(self._grad_norm)
        deepspeed.init_distributed(dist_init_required=False)
        self.ds, _, _, self.scheduler = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            lr_scheduler=schedule(optimizer, recipe.optim, num_steps),
            config=deepspeed_config(recipe, dtype, config.get_text_config().hidden_size),
            dist_init_required=False,
        )
        if recipe.deepspeed.zero_stage == 0 and dtype != torch.float32:
            # Here DeepSpeed has stepped once with gradients of zero, to have all memory taken: Adam would count that
            # step, and the first real one would be a quarter smaller than on the other stages.
            optimizer.state.clear()
        if num_workers == 1 and recipe.deepspeed.zero_stage == 0:
            # Nobody to add gradients up with; DeepSpeed would copy all of them into one buffer and back.
            self.ds.enable_backward_allreduce = False
        # The engine casts buffers too; rotary frequencies in bfloat16 misplace every token after the first hundreds.
        for name, buffer in buffers.items():
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, buffer.to(next(model.parameters()).device))
        self.num_workers = num_workers

    def forward(self, batch: Any) -> Any:
        """One forward of the wrapped model."""
        return self.ds(batch)

    def backward(self, loss: torch.Tensor) -> None:
        """Accumulate a micro-batch's gradient. DeepSpeed averages over workers; the loss is a part of a sum."""
        self.ds.backward(loss * self.num_workers)

    def step(self) -> float:
        """Reduce, clip, update; returns the global gradient norm before clipping."""
        if not self.ds.enable_backward_allreduce:
            # As its reduction does: what had no gradient in this step (the vision part, without images) has zeros, and
            # AdamW's momentum moves it on, whatever the number of workers.
            for parameter in self.ds.module.parameters():
                if parameter.requires_grad and parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
        self.ds.step()
        norm = self.ds.get_global_grad_norm()
        return float(self._grad_norm.last if norm is None else norm)

    @property
    def learning_rate(self) -> float:
        """The learning rate that the next step will use."""
        return float(self.ds.optimizer.param_groups[0]["lr"])


def adamw(model: nn.Module, optim: OptimConfig) -> torch.optim.Optimizer:
    """AdamW over the trained parameters, moments in 32 or 8 bits; biases and norms do not decay."""
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


def schedule(optimizer: torch.optim.Optimizer, optim: OptimConfig, num_steps: int) -> Any:
    """transformers' linear, cosine or constant schedule after a linear warm-up."""
    from transformers import get_scheduler

    warmup = math.ceil(optim.warmup * num_steps) if optim.warmup < 1 else round(optim.warmup)
    name = {"constant": "constant_with_warmup"}.get(optim.schedule, optim.schedule)
    return get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=num_steps)


class _ClipAndKeepNorm:
    """Clips the gradients just before an optimizer's step and keeps what their norm was."""

    def __init__(self, model: nn.Module, max_norm: float) -> None:
        self.model, self.max_norm, self.last = model, max_norm, 0.0

    def __call__(self, *_: Any) -> None:
        norm = torch.nn.utils.clip_grad_norm_(self._with_gradient(), self.max_norm or math.inf)
        self.last = float(norm)

    def _with_gradient(self) -> Iterator[torch.Tensor]:
        return (parameter for parameter in self.model.parameters() if parameter.grad is not None)


def _compile_nothing(deepspeed: Any) -> None:
    """On a CPU its shared-memory collective would be compiled first, for about a minute; gloo needs none of it."""
    if not torch.cuda.is_available():
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
