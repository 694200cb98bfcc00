"""Copies from main memory to a device after which the host does not wait."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a tensor to a device. Towards CUDA, only a copy from pinned memory lets the host go on."""
    if device.type == "cpu" or tensor.device.type != "cpu":
        return tensor.to(device)
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


class PinnedConstants(TorchFunctionMode):
    """Within it, `torch.tensor(numbers, device=...)` in code that is not ours does not make the host wait."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Make the tensor on the host, and copy it."""
        kwargs = kwargs or {}
        if func is not torch.tensor or kwargs.get("device") is None:
            return func(*args, **kwargs)
        device = torch.device(kwargs["device"])
        return to_device(torch.tensor(*args, **kwargs | {"device": "cpu"}), device)
