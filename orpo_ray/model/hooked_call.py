"""Calls of a module that run other code than its own `forward`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn

Out = TypeVar("Out")


def call_with(module: nn.Module, forward: Callable[[torch.Tensor], Out], states: torch.Tensor) -> Out:
    """Call a module with its hooks around another `forward`, within which its own one is back in place.

    ZeRO-3 gathers weights in the module's hooks: before the call, and again before the backward pass through whatever
    the call computed.
    """
    replaced = module.__dict__.get("forward")

    def restore() -> None:
        if replaced is None:
            module.__dict__.pop("forward", None)
        else:
            module.forward = replaced

    def once(states: torch.Tensor) -> Out:
        restore()
        return forward(states)

    module.forward = once
    try:
        out: Out = module(states)
    finally:
        restore()
    return out
