"""Run several adapters of a peft model side by side, each on its own copy of a row.

The frozen layer computes all copies at once. Each adapter's two small matrices compute its own copy.

Legend: K adapters, T tokens of a copy, I and O sizes of a layer's input and output, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from orpo_ray.errors import OrpoRayError


class AdapterStack:
    """Which of a model's adapters run. All adapted layers ask it.

    Args:
        model: peft's wrapper around a model. Its adapted layers get another forward pass, which takes rows of K * T
            tokens only.

    Raises:
        OrpoRayError: a layer's adapter is more than two matrices.
    """

    def __init__(self, model: nn.Module) -> None:
        from peft.tuners.lora import LoraLayer

        self._active: tuple[str, ...] = ()
        self._factors: dict[Any, torch.Tensor] = {}
        self._layers: list[Any] = [module for module in model.modules() if isinstance(module, LoraLayer)]
        for layer in self._layers:
            if layer.lora_variant or not layer.lora_A or any(second.bias is not None for second in _linears(layer)):
                raise OrpoRayError(f"{type(layer).__name__} is no plain LoRA layer, so it cannot have several adapters")
        for layer in self._layers:
            layer.adapter_stack = self
            layer.forward = MethodType(_stacked, layer)
            for linear in _linears(layer):
                linear.weight.requires_grad_(True)

    def use(self, names: Sequence[str]) -> None:
        """Run these adapters from now on: the k-th on copy k. A backward pass must come before the next change."""
        self._active = tuple(names)

    def drop(self, name: str) -> None:
        """Free an adapter's weights, with their gradients and hooks."""
        for layer in self._layers:
            del layer.lora_A[name], layer.lora_B[name]

    @property
    def active(self) -> tuple[str, ...]:
        """The adapters that run."""
        return self._active

    def factors(self, scaling: dict[str, float], like: torch.Tensor) -> torch.Tensor:
        """Each active adapter's scale: [K, 1, 1], of the type and on the device of another tensor."""
        values = tuple(scaling[name] for name in self._active)
        key = (values, like.dtype, like.device)
        if key not in self._factors:
            self._factors[key] = torch.tensor(values, dtype=like.dtype, device=like.device).view(-1, 1, 1)
        return self._factors[key]


def _linears(layer: Any) -> list[nn.Linear]:
    return [*layer.lora_A.values(), *layer.lora_B.values()]


def _stacked(self: Any, x: torch.Tensor) -> torch.Tensor:
    """Forward pass of a layer with the active adapters: [..., K * T, I] -> [..., K * T, O], T of each after another."""
    stack: AdapterStack = self.adapter_stack
    names = stack.active
    result = self.base_layer(x)
    weights = [[linears[name].weight for name in names] for linears in (self.lora_A, self.lora_B)]
    rank = max(len(weight) for weight in weights[0])
    # Zeros beyond an adapter's own rank add nothing, and their gradient is dropped.
    first = torch.stack([functional.pad(w, (0, 0, 0, rank - len(w))) for w in weights[0]])  # [K, R, I]
    second = torch.stack([functional.pad(w, (0, rank - w.shape[1])) for w in weights[1]])  # [K, O, R]
    copies = x.reshape(len(names), -1, x.shape[-1]).to(first.dtype)
    inner = torch.bmm(copies, first.mT) * stack.factors(self.scaling, first)  # [K, T, R]
    if result.dtype != inner.dtype:
        return result + torch.bmm(inner, second.mT).to(result.dtype).view_as(result)
    return torch.baddbmm(result.reshape(len(names), -1, result.shape[-1]), inner, second.mT).view_as(result)
