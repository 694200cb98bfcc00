"""Collect the weights of a trained model on rank 0, for export."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import nn


def consolidated(
    module: nn.Module,
    trained_only: bool,
    gather: Callable[[torch.Tensor], AbstractContextManager[object]] | None = None,
) -> dict[str, torch.Tensor]:
    """Return a module's state dict in the main memory of rank 0, and an empty one on other ranks.

    Args:
        module: the model. Tied weights stay tied.
        trained_only: leave out frozen parameters.
        gather: for sharded weights, a collective context in which one weight is whole.
    """
    buffers = dict(module.named_buffers(remove_duplicate=False))
    parameters = {
        name: parameter
        for name, parameter in module.named_parameters(remove_duplicate=False)
        if parameter.requires_grad or not trained_only
    }
    state: dict[str, torch.Tensor] = {}
    copies: dict[torch.Tensor, torch.Tensor] = {}  # tied weights have one copy

    def keep(name: str, tensor: torch.Tensor) -> None:
        if torch.distributed.get_rank() == 0:
            if tensor not in copies:
                # A gathered weight is released after its context.
                copies[tensor] = tensor.detach().to("cpu", copy=gather is not None)
            state[name] = copies[tensor]

    for name in module.state_dict():
        tensor = parameters.get(name, buffers.get(name))
        if tensor is None:
            continue
        if gather is None:
            keep(name, tensor)
        else:
            with gather(tensor):
                keep(name, tensor)
    return state
