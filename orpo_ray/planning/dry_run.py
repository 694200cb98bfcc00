"""Runs a model with no numbers in it: shapes and storages only, to see what memory and arithmetic a step takes.

Floats are tensors without storage (torch's FakeTensorMode). Integers and masks are real: models split, index and loop
by them, so that they must be right for the shapes to be.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten
# More elements than that are not computed for real: pixels, never what shapes depend on.
REAL_ELEMENTS = 2**20
# Real floats up to this many stay so: rotary frequencies, sizes of images.
REAL_FLOATS = 2**12


class Live(TorchDispatchMode):
    """Bytes of tensors that are alive, and most so far: of every storage that an operation returned.

    A storage counts once, from the operation that made it until nobody holds it, autograd included.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.flops = 0
        self._known: weakref.WeakKeyDictionary[torch.UntypedStorage, None] = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.add(out)
        return out

    def add(self, tensors: Any) -> None:
        """Count the storages of these tensors, if they are new."""
        for tensor in tree_flatten(tensors)[0]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage not in self._known:
                    self._known[storage] = None
                    size = storage.nbytes()
                    self.now += size
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._freed, size)

    def _freed(self, size: int) -> None:
        self.now -= size


class DryRun(Live):
    """A mode under which floats have no storage; also adds up the floating-point operations of matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = [each for each in tree_flatten((args, kwargs))[0] if isinstance(each, torch.Tensor)]
        if any(isinstance(each, FakeTensor) for each in inputs):
            out = self._without_numbers(func, args, kwargs)
        elif sum(each.numel() for each in inputs) <= REAL_ELEMENTS and not self._makes_floats(func, inputs, kwargs):
            with unset_fake_temporarily():
                out = func(*args, **kwargs)
            out = tree_map_only(torch.Tensor, self._forget_if_large, out)
        else:
            out = self._without_numbers(func, args, kwargs)
        self.add(out)
        return out

    def _without_numbers(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func is aten._local_scalar_dense.default:
            return 0  # a number read off a float: nobody's shapes depend on it
        if func in (aten.index.Tensor, aten.index_put_.default, aten.index_put.default):
            args = (args[0], _places(args[1]), *args[2:])
        out = func(*args, **kwargs)
        if (formula := flop_registry.get(func._overloadpacket)) is not None:
            with unset_fake_temporarily():  # it may read the lengths of sequences
                self.flops += formula(*args, **kwargs, out_val=out)
        return tree_map_only(FakeTensor, self._real_if_whole, out)

    def _makes_floats(self, func: Any, inputs: Any, kwargs: Any) -> bool:
        """Whether a float tensor comes of nothing: a weight, a zero gradient."""
        if inputs:
            return False
        dtype = kwargs.get("dtype") or (torch.get_default_dtype() if "arange" not in str(func) else torch.int64)
        return dtype.is_floating_point

    def _forget_if_large(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_floating_point() and tensor.numel() > REAL_FLOATS:
            return self.fake.from_tensor(tensor)
        return tensor

    @staticmethod
    def _real_if_whole(tensor: FakeTensor) -> torch.Tensor:
        """Whole numbers that come of floats (`pixels == 0`) become zeros."""
        if tensor.is_floating_point() or tensor.is_complex():
            return tensor
        with unset_fake_temporarily():
            return torch.zeros(tensor.shape, dtype=tensor.dtype)


def _places(indices: Any) -> Any:
    """Masks as places: how many elements a mask picks is not known without its numbers."""
    places: list[torch.Tensor | None] = []
    for index in indices:
        if index is not None and index.dtype == torch.bool and not isinstance(index, FakeTensor):
            with unset_fake_temporarily():
                places += index.nonzero(as_tuple=True)
        else:
            places.append(index)
    return places


@contextmanager
def dry_run() -> Iterator[DryRun]:
    """Everything made and run inside has no numbers."""
    mode = DryRun()
    with mode.fake, mode:
        yield mode
