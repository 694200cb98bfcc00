"""Run a model without values, with shapes only, to find the memory and the work of a step.

Float tensors have no storage (torch's FakeTensorMode). Integer tensors and masks are real, because models split, index
and loop by them, so that shapes depend on their values.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from orpo_ray.planning.fake_ops import FakeOps
from orpo_ray.planning.work import WorkCounter, tensors_of

aten = torch.ops.aten
# Larger integer tensors are pixels, on which no shape depends, and are not computed.
REAL_ELEMENTS = 2**20
# Smaller float tensors are computed: rotary frequencies, image sizes.
REAL_FLOATS = 2**12
# torch has no formula for what its attention is on a CPU, where the dry run runs.
_AS_ON_CUDA = {
    aten._scaled_dot_product_flash_attention_for_cpu: aten._scaled_dot_product_flash_attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: aten._scaled_dot_product_flash_attention_backward,
}


class Live(TorchDispatchMode):
    """Counts the bytes of all live tensors, and their peak.

    A storage counts once, from the operation that returns it until its last reference is gone, including those of
    autograd.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.work = WorkCounter()
        self._known: weakref.WeakKeyDictionary[torch.UntypedStorage, None] = weakref.WeakKeyDictionary()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Spare each operation a wrapper of torch's compiler, which is used nowhere here."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.add(out)
        return out

    def add(self, tensors: Any) -> None:
        """Count the storages of these tensors that are not counted yet."""
        for tensor in tensors_of(tensors):
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
    """Mode in which float tensors have no storage. Also counts the work of the operations on them."""

    def __init__(self) -> None:
        super().__init__()
        self.fake = FakeOps()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:  # `tensor.device`: the most frequent of all, and no work
            return args[0].fake_device
        inputs = tensors_of((args, kwargs))
        if any(isinstance(each, FakeTensor) for each in inputs):
            out = self._run_fake(func, args, kwargs, inputs)
        elif sum(each.numel() for each in inputs) <= REAL_ELEMENTS and not self._makes_floats(func, inputs, kwargs):
            out = func(*args, **kwargs)
            out = _mapped(self._drop_large_floats, out)
        else:
            out = self._run_fake(func, args, kwargs, inputs)
        self.add(out)
        return out

    def _run_fake(self, func: Any, args: Any, kwargs: Any, inputs: list[torch.Tensor]) -> Any:
        if func is aten._local_scalar_dense.default:
            return 0  # `.item()` of a float; no shape depends on it
        if func in (aten.index.Tensor, aten.index_put_.default, aten.index_put.default):
            args = (args[0], _masks_as_indices(args[1]), *args[2:])
        out = self.fake.run(func, args, kwargs, inputs)
        formula = flop_registry.get(_AS_ON_CUDA.get(func._overloadpacket, func._overloadpacket))
        self.work.add(func, args, kwargs, inputs, out, formula)
        return _mapped(self._integers_as_zeros, out)

    def _makes_floats(self, func: Any, inputs: Any, kwargs: Any) -> bool:
        """Whether the operation creates a float tensor without inputs, such as a weight or a zero gradient."""
        if inputs:
            return False
        dtype = kwargs.get("dtype") or (torch.get_default_dtype() if "arange" not in str(func) else torch.int64)
        return dtype.is_floating_point

    def _drop_large_floats(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_floating_point() and tensor.numel() > REAL_FLOATS:
            return self.fake.mode.from_tensor(tensor)
        return tensor

    @staticmethod
    def _integers_as_zeros(tensor: torch.Tensor) -> torch.Tensor:
        """Replace integers computed from floats (`pixels == 0`) by zeros."""
        if not isinstance(tensor, FakeTensor) or tensor.is_floating_point() or tensor.is_complex():
            return tensor
        return torch.zeros(tensor.shape, dtype=tensor.dtype)


def _mapped(change: Callable[[torch.Tensor], torch.Tensor], out: Any) -> Any:
    """Change the tensors that an operation returns."""
    if isinstance(out, torch.Tensor):
        return change(out)
    return type(out)(_mapped(change, each) for each in out) if isinstance(out, list | tuple) else out


def _masks_as_indices(indices: Any) -> Any:
    """Convert masks to indices while their values are known: they determine the shape of the result."""
    converted: list[torch.Tensor | None] = []
    for index in indices:
        if index is not None and index.dtype == torch.bool and not isinstance(index, FakeTensor):
            converted += index.nonzero(as_tuple=True)
        else:
            converted.append(index)
    return converted


@contextmanager
def dry_run() -> Iterator[DryRun]:
    """Run the code inside without values; yields the mode, which counts memory and work."""
    mode = DryRun()
    with mode:
        yield mode
