"""The engine without sharding (ZeRO stage 0): every worker holds the whole training state.

Torch alone suffices. DeepSpeed's stage 0 adds up bfloat16 gradients in bfloat16 and waits for the device once for each
parameter of a step.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils._pytree import tree_map_only

from orpo_ray.config.recipe import Recipe
from orpo_ray.data.packing import PairBatch
from orpo_ray.errors import UserError
from orpo_ray.objective.logps import PairLogps
from orpo_ray.training.consolidated import consolidated
from orpo_ray.training.divergence import all_finite
from orpo_ray.training.optimizer import adamw, follow_recipe, schedule, state_bytes

_FOLDER, _STATE_FILE = "engine", "replicated.pt"  # in a checkpoint
_REDUCED_AT_ONCE = 2**28  # elements of one all-reduce
_ALIGNMENT = 4  # elements: AdamW's fused kernel wants gradients that begin at a multiple of 16 bytes


class ReplicatedEngine:
    """Implements `Engine` without sharding.

    Weights that are not float32 have a float32 copy, which AdamW updates. Gradients are added up in one float32 buffer.
    The first arguments are those of `make_engine`.

    Args:
        trained: the weights to train, by their names in checkpoints; by default all that require a gradient.

    Attributes:
        updates: number of updates that this engine has made.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        num_steps: int,
        num_workers: int,
        trained: Mapping[str, nn.Parameter] | None = None,
    ) -> None:
        self._model, self._num_workers, self._is_part = model, num_workers, trained is not None
        self._max_norm = recipe.optim.max_grad_norm or math.inf
        if num_workers > 1:
            _copy_from_rank_0(model)
        if trained is None:
            trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        self._trained = trained
        self._masters = {
            name: weight if weight.dtype == torch.float32 else nn.Parameter(weight.detach().float())
            for name, weight in self._trained.items()
        }
        self._gradients = _gradient_buffer(list(self._masters.values()))
        for name, weight in self._trained.items():
            if self._masters[name] is not weight:
                weight.register_post_accumulate_grad_hook(_Accumulate(self._masters[name]))
        self._state_bytes = state_bytes(sum(weight.numel() for weight in self._trained.values()), recipe.optim)
        self._optim = recipe.optim
        self.optimizer = adamw(list(self._masters.values()), recipe.optim)
        self._schedule = schedule(self.optimizer, recipe.optim, num_steps)
        self.updates = 0
        self._updating, self._is_whole = threading.Lock(), True
        self._updated = torch.cuda.Event() if self._gradients.is_cuda else None

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next step."""
        return float(self.optimizer.param_groups[0]["lr"])

    @property
    def checkpoint_bytes(self) -> int:
        """The float32 weights and the optimizer states, on rank 0."""
        return self._state_bytes if dist.get_rank() == 0 else 0

    def forward(self, batch: PairBatch) -> PairLogps:
        """Run the model on a micro-batch."""
        logps: PairLogps = self._model(batch)
        return logps

    def backward(self, loss: torch.Tensor) -> None:
        """Add a micro-batch's gradient."""
        loss.backward()

    def step(self) -> float:
        """Reduce and clip the gradient, update the weights; return the norm before clipping."""
        norm = float(self.reduce_gradient())
        self.update_weights(norm)
        return norm

    def reduce_gradient(self) -> torch.Tensor:
        """Reduce and clip the gradient; return the norm before clipping, on the device. See `ReducesApart`."""
        if self._num_workers > 1:
            for part in self._gradients.split(_REDUCED_AT_ONCE):
                dist.all_reduce(part)
        return nn.utils.clip_grad_norm_(self._masters.values(), self._max_norm)

    def update_weights(self, norm: float) -> None:
        """Update the weights unless the norm is not finite, and clear the gradient."""
        if math.isfinite(norm):
            self._update()
        self._gradients.zero_()

    def has_finite_weights(self) -> bool:
        """Look at the trained weights, which are equal on all workers."""
        return all_finite(self._masters.values())

    def save(self, folder: Path) -> None:
        """Write the state, which is equal on all workers, on rank 0."""
        (folder / _FOLDER).mkdir(parents=True)
        if dist.get_rank() == 0:
            torch.save(self._state(), folder / _FOLDER / _STATE_FILE)

    def save_alone(self, folder: Path, updates: int) -> bool:
        """Write the state in another thread, without the other workers; see `SavesAlone`."""
        with ExitStack() as held:
            held.enter_context(self._updating)
            if not self._is_whole or self.updates != updates:
                return False
            with _beside(self._updated, self._gradients.device):
                state = tree_map_only(torch.Tensor, lambda tensor: tensor.detach().cpu(), self._state())
            if not all_finite(state["weights"].values()):
                return False
            (folder / _FOLDER).mkdir(parents=True)
            torch.save(state, folder / _FOLDER / _STATE_FILE)
            held.pop_all()
            return True

    def load(self, folder: Path) -> None:
        """Load the state, whatever the number of workers that wrote it."""
        path = folder / _FOLDER / _STATE_FILE
        if not path.exists():
            raise UserError(
                "the run's checkpoint has no state of an unsharded engine; an earlier version of orpo-ray wrote it",
                field="name",
                fix="finish the run with that version, or start a new run under another name (name=...)",
            )
        state = torch.load(path, map_location="cpu", weights_only=True)
        with torch.no_grad():
            for name, master in self._masters.items():
                master.copy_(state["weights"][name])
            for name, buffer in self._model.named_buffers():
                buffer.copy_(state["buffers"][name])
        self._update_weights()
        self.optimizer.load_state_dict(state["optimizer"])
        self._schedule.load_state_dict(state["schedule"])
        follow_recipe(self.optimizer, self._schedule, self._optim)

    def consolidated_weights(self, trained_only: bool) -> dict[str, torch.Tensor]:
        """Copy the weights into the main memory of rank 0."""
        if self._is_part and trained_only:
            return {name: weight.detach().cpu() for name, weight in self._trained.items()}
        return consolidated(self._model, trained_only)

    def _state(self) -> dict[str, Any]:
        return {
            "weights": {name: weight.detach() for name, weight in self._masters.items()},
            "buffers": dict(self._model.named_buffers()),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self._schedule.state_dict(),
        }

    def _update(self) -> None:
        """Make an update as a whole, as seen by `save_alone`."""
        with self._updating:
            self._is_whole = False
            self.optimizer.step()
            self._schedule.step()
            self._update_weights()
            if self._updated is not None:
                self._updated.record()
            self.updates += 1
            self._is_whole = True

    @torch.no_grad()
    def _update_weights(self) -> None:
        """Round the float32 copies into the weights that the model computes with."""
        pairs = [(w, self._masters[n]) for n, w in self._trained.items() if self._masters[n] is not w]
        if pairs:
            torch._foreach_copy_([weight for weight, _ in pairs], [master for _, master in pairs])


class _Accumulate:
    """Hook of a weight that is not float32: adds its gradient to that of its float32 copy, and frees it."""

    def __init__(self, master: torch.Tensor) -> None:
        self._master = master

    def __call__(self, weight: torch.Tensor) -> None:
        assert self._master.grad is not None
        assert weight.grad is not None
        self._master.grad.add_(weight.grad)
        weight.grad = None


def _gradient_buffer(weights: list[torch.Tensor]) -> torch.Tensor:
    """Return a zeroed buffer that holds all gradients; each weight's `grad` becomes a view of it.

    A reduction is one collective without copies. A weight that a step does not use (of the vision module in a step
    without images) has a zero gradient, so AdamW's momentum still moves it, for any number of workers.
    """
    sizes = [-(-weight.numel() // _ALIGNMENT) * _ALIGNMENT for weight in weights]
    buffer = torch.zeros(sum(sizes), dtype=torch.float32, device=weights[0].device)
    for weight, view in zip(weights, buffer.split(sizes), strict=True):
        weight.grad = view[: weight.numel()].view_as(weight)
    return buffer


def _copy_from_rank_0(model: nn.Module) -> None:
    """Weights that a model's files lack are drawn at random by each worker."""
    for tensor in (*model.parameters(), *model.buffers()):
        dist.broadcast(tensor.data, 0)


@contextmanager
def _beside(event: torch.cuda.Event | None, device: torch.device) -> Iterator[None]:
    """Let this thread's CUDA calls wait for an event only, and not for what was queued after it. None on CPUs."""
    if event is None:
        yield
        return
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_event(event)
        with torch.cuda.stream(stream):
            yield
