"""Finds what would make the host wait for a GPU, without one: on the `meta` device, tensors have no values.

An operation that reads a value, or whose shape depends on values, raises there. Copies from main memory do not, so they
are found here.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

META = torch.device("meta")
_READING = {
    "allclose", "argwhere", "bincount", "cpu", "equal", "is_nonzero", "item", "masked_select", "nonzero", "numpy",
    "tolist", "unique", "unique_consecutive", "__array__", "__bool__", "__float__", "__index__", "__int__",
}  # fmt: skip
_COPYING = {"cpu", "to"}
_MADE_FROM_NUMBERS = (torch.tensor, torch.as_tensor, torch.asarray)


@contextmanager
def copies_to_device() -> Iterator[list[str]]:
    """Yield a list that grows by a line for each copy from main memory to `meta` after which the host would wait."""
    found: list[str] = []
    with _Copies(found), _Constants(found):
        yield found


@contextmanager
def reads_of_values() -> Iterator[list[str]]:
    """Yield a list that grows by a line for each call on a tensor after which the host would wait for a GPU.

    For code whose tensors would be on a GPU. On a CPU, such calls reach no dispatcher. A copy in main memory, and what
    is computed from copies, can be read without a wait.
    """
    found: list[str] = []
    with _Reads(found):
        yield found


def reads_values(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call of Python on tensors reads their values, or returns a shape that depends on them."""
    name = getattr(func, "__name__", None)
    if name == "to":
        # A device as an object may be the one of the tensors: in tests, a CPU.
        return "cpu" in [each for each in (*args[1:], *kwargs.values()) if isinstance(each, str)]
    if name == "__getitem__":
        indices = args[1] if isinstance(args[1], tuple) else (args[1],)
        return any(isinstance(each, torch.Tensor) and each.dtype in (torch.bool, torch.uint8) for each in indices)
    return name in _READING or (name == "where" and len(args) + len(kwargs) == 1)


class _Reads(TorchFunctionMode):
    """Python's calls that read values, or whose result's shape depends on values, unless these were copied before."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found
        self.copies: dict[int, torch.Tensor] = {}
        """Tensors that are in main memory, by their id; kept, so that no other tensor gets the id."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
        of_copies = bool(inputs) and all(id(each) in self.copies for each in inputs)
        reads = reads_values(func, args, kwargs)
        name = getattr(func, "__name__", None)
        if reads and not of_copies:
            self.found.append(f"{name} {_caller()}")
        out = func(*args, **kwargs)
        if reads and name in _COPYING and out is args[0]:
            out = out.clone()  # a copy, as from a GPU; on a CPU there is none
        if of_copies or (reads and name in _COPYING):
            self.copies |= {id(each): each for each in tree_leaves(out) if isinstance(each, torch.Tensor)}
        return out


class _Copies(TorchDispatchMode):
    """Tensors in main memory that an operation copies, or uses together with tensors on `meta`; or that are handed to a
    collective, which between GPUs takes none.
    """

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        inputs = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
        on_host = [each for each in inputs if each.device.type == "cpu" and each.ndim]
        results = [each for each in tree_leaves(out) if isinstance(each, torch.Tensor)]
        copies = on_host and any(each.is_meta for each in (*inputs, *results)) and not kwargs.get("non_blocking")
        if copies or (func.namespace == "c10d" and any(each.device.type == "cpu" for each in inputs)):
            self.found.append(f"{func} {_caller()}")
        return out


class _Constants(TorchFunctionMode):
    """Tensors that are made on `meta` from numbers of Python, which dispatch does not show."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _MADE_FROM_NUMBERS and torch.device(kwargs.get("device") or "cpu").type == "meta":
            self.found.append(f"{func.__name__} {_caller()}")
        return func(*args, **kwargs)


def _caller() -> str:
    """The line outside of torch that led here."""
    frames = [f for f in traceback.extract_stack() if "/torch/" not in f.filename and f.filename != __file__]
    return f"{frames[-1].filename}:{frames[-1].lineno}"
