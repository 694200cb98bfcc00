"""Count what a worker does: collectives with their bytes, and waits for values on the device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten


@dataclass(frozen=True)
class Collective:
    """One call."""

    name: str
    """torch's name of the operation, such as `allreduce_`."""
    dtype: torch.dtype
    bytes: int


class Counter(TorchDispatchMode):
    """While active, records every collective of this process, and counts values that are read from tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.collectives: list[Collective] = []
        self.reads = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        space, _, name = func._schema.name.partition("::")
        if space == "c10d":
            tensors = [each for each in tree_flatten((args, kwargs))[0] if isinstance(each, torch.Tensor)]
            size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
            self.collectives += [Collective(name, tensor.dtype, size) for tensor in tensors[:1]]
        self.reads += name == "_local_scalar_dense"
        return func(*args, **(kwargs or {}))
