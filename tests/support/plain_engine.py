"""An `Engine` with torch's AdamW, in one process."""

from __future__ import annotations

import torch
from torch import nn

from orpo_ray.config.recipe import Recipe
from orpo_ray.data.packing import PairBatch
from orpo_ray.objective.logps import PairLogps


class PlainEngine:
    """One worker, no sharding, a linear schedule after a linear warm-up."""

    def __init__(self, model: nn.Module, recipe: Recipe, num_steps: int, num_workers: int) -> None:
        assert num_workers == 1
        assert recipe.optim.schedule == "linear"
        self.model, self.optim, self.num_steps, self.steps_done = model, recipe.optim, num_steps, 0
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in trained if p.ndim > 1], "weight_decay": self.optim.weight_decay},
                {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
            ],
            betas=(self.optim.adam_beta1, self.optim.adam_beta2),
            eps=self.optim.adam_epsilon,
            foreach=False,
            fused=False,
        )

    @property
    def learning_rate(self) -> float:
        """Rises to its peak within `optim.warmup` steps, then falls to 0 at the last one."""
        warmup = round(self.optim.warmup)
        if self.steps_done < warmup:
            return self.optim.learning_rate * self.steps_done / warmup
        return self.optim.learning_rate * (self.num_steps - self.steps_done) / (self.num_steps - warmup)

    def forward(self, batch: PairBatch) -> PairLogps:
        """Run the model."""
        logps: PairLogps = self.model(batch)
        return logps

    def backward(self, loss: torch.Tensor) -> None:
        """Add a gradient."""
        loss.backward()

    def step(self) -> float:
        """Clip, update, clear; return the norm before clipping."""
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = float(torch.cat([gradient.flatten() for gradient in gradients]).double().norm())
        if norm > self.optim.max_grad_norm:
            for gradient in gradients:
                gradient *= self.optim.max_grad_norm / norm
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps_done += 1
        return norm

    def consolidated_weights(self, trained_only: bool) -> dict[str, torch.Tensor]:
        """Return the weights."""
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        return {
            name: tensor
            for name, tensor in self.model.state_dict().items()
            if name not in parameters or parameters[name].requires_grad or not trained_only
        }
