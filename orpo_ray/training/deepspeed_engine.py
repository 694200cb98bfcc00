"""The engine that shards the training state: DeepSpeed's ZeRO stages 1 to 3."""

from __future__ import annotations

import re
from collections.abc import Collection
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import nn

from orpo_ray.config.recipe import Recipe
from orpo_ray.data.packing import PairBatch
from orpo_ray.model.loading import without_adapters
from orpo_ray.model.whole_shape import whole_shape
from orpo_ray.objective.logps import PairLogps
from orpo_ray.training.consolidated import consolidated
from orpo_ray.training.deepspeed_config import check_config, deepspeed_config
from orpo_ray.training.divergence import all_finite
from orpo_ray.training.optimizer import adamw, schedule, state_bytes
from orpo_ray.training.resharding import load_resharded, num_writers

_TAG = "engine"  # the folder of the engine's state in a checkpoint
_SHARD = re.compile(r"zero_pp_rank_(\d+)_mp_rank_00_(model|optim)_states\.pt$")


class DeepSpeedEngine:
    """Implements `Engine` with DeepSpeed and ZeRO 1 to 3.
    The arguments are those of `make_engine`.
    """

    def __init__(self, model: nn.Module, recipe: Recipe, num_steps: int, num_workers: int) -> None:
        import deepspeed

        prepare_deepspeed(recipe.scaling.timeout_s)
        config = without_adapters(model.model).config  # type: ignore[arg-type]
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers() if buffer.dtype == torch.float32}
        optimizer = adamw(trained, recipe.optim)
        if recipe.deepspeed.zero_stage == 3:
            _gather_head_at_once(deepspeed, model)
        num_trained = sum(whole_shape(parameter).numel() for parameter in trained)
        dtype = trained[0].dtype  # of a trained weight: 4-bit weights are stored as bytes
        engine_config = deepspeed_config(recipe, dtype, config.get_text_config().hidden_size, num_trained)
        check_config(engine_config, recipe)
        self.deepspeed, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            lr_scheduler=schedule(optimizer, recipe.optim, num_steps),
            config=engine_config,
            dist_init_required=False,
        )
        # DeepSpeed casts buffers too. Rotary frequencies in bfloat16 give wrong positions after a few hundred tokens.
        for name, buffer in buffers.items():
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, buffer.to(next(model.parameters()).device))
        self._num_workers, self._stage = num_workers, recipe.deepspeed.zero_stage
        self._state_bytes = state_bytes(-(-num_trained // num_workers), recipe.optim)
        self._trained_bytes = num_trained * dtype.itemsize

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next step."""
        return float(self.deepspeed.optimizer.param_groups[0]["lr"])

    @property
    def checkpoint_bytes(self) -> int:
        """This worker's part of the float32 weights and the optimizer states; the trained weights where whole."""
        is_whole = self._stage < 3 and self.deepspeed.global_rank == 0
        return self._state_bytes + (self._trained_bytes if is_whole else 0)

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
        self.deepspeed.step()
        return float(self.deepspeed.get_global_grad_norm())

    def has_finite_weights(self) -> bool:
        """Look at the trained weights; ZeRO-3's are the shards of all workers."""
        trained = (weight for weight in self.deepspeed.module.parameters() if weight.requires_grad)
        shards = (getattr(weight, "ds_tensor", weight) for weight in trained)
        finite = torch.tensor(float(all_finite(shards)), device=self.deepspeed.device)
        torch.distributed.all_reduce(finite, torch.distributed.ReduceOp.MIN)
        return bool(finite)

    def save(self, folder: Path) -> None:
        """Write this worker's shard of the state."""
        (folder / _TAG).mkdir(parents=True)
        self.deepspeed.save_checkpoint(str(folder), tag=_TAG, exclude_frozen_parameters=True)

    def load(self, folder: Path) -> None:
        """Load the state, whatever the number of workers that wrote it; it needs the stage that did."""
        if num_writers(folder / _TAG) == self._num_workers:
            self.deepspeed.load_checkpoint(str(folder), tag=_TAG, load_module_strict=False)
        else:
            load_resharded(self.deepspeed, folder / _TAG)

    def files_to_load(self, files: Collection[str], num_writers: int) -> list[str]:
        """Leave out the other workers' shards if as many workers wrote the checkpoint; see `LoadsPart`."""
        if num_writers != self._num_workers:
            return list(files)
        unsharded, own = {"0_model"}, {f"{self.deepspeed.global_rank}_{kind}" for kind in ("model", "optim")}
        shards = {file: _SHARD.search(file) for file in files}
        return [file for file, found in shards.items() if found is None or "_".join(found.groups()) in unsharded | own]

    def consolidated_weights(self, trained_only: bool) -> dict[str, torch.Tensor]:
        """Gather the weights, one at a time, into the main memory of rank 0."""
        import deepspeed

        if self._stage < 3:
            return consolidated(self.deepspeed.module, trained_only)
        self.deepspeed.optimizer.checkpoint_event_prologue()
        state = consolidated(
            self.deepspeed.module, trained_only, lambda tensor: deepspeed.zero.GatheredParameters([tensor])
        )
        self.deepspeed.optimizer.checkpoint_event_epilogue()
        return state


def _gather_head_at_once(deepspeed: Any, model: nn.Module) -> None:
    """Gather an output head with modules inside, such as adapters, as one: they run once for each chunk of targets, and
    workers have different numbers of chunks."""
    head = without_adapters(model.model).get_output_embeddings()  # type: ignore[arg-type]
    if next(head.children(), None) is not None:
        deepspeed.utils.set_z3_leaf_module(head, True)


def prepare_deepspeed(timeout_s: float) -> None:
    """Let DeepSpeed use the process group that exists, and keep it from compiling kernels.

    Looking for kernels that it could compile takes seconds of compiler runs. Of the result it would use its
    shared-memory collective on a CPU, and compile that for a minute; gloo suffices.

    Args:
        timeout_s: how long a collective waits for a worker that lags behind.
    """
    import deepspeed
    from torch.distributed.distributed_c10d import _set_pg_timeout

    vars(deepspeed.ops)["__compatible_ops__"] = {}
    deepspeed.init_distributed(dist_init_required=False)
    # ZeRO has its own group of all workers, with torch's default timeout: 10 minutes between GPUs.
    _set_pg_timeout(timedelta(seconds=timeout_s), deepspeed.utils.groups._get_data_parallel_group())
