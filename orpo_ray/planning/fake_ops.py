"""Operations on tensors without values (torch's FakeTensor). Results are remembered by the shapes of the inputs.

A model repeats the same operations in every layer. torch finds the result of each in Python, by rules of the operation
that take most of a millisecond, and its own cache takes half of that.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

_CPU = torch.device("cpu")
_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)


class _NotRemembered(Exception):
    """An operation whose result cannot be told from the shapes of its inputs, or that is too rare to care."""


@dataclass(frozen=True)
class _Result:
    """How to make one result of an operation."""

    argument: int | None
    """The input that the result is, or shares its memory with; None if it has its own."""
    is_argument: bool
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype


# Results by operation and inputs, of all runs in this process: a plan runs a model several times.
_known: dict[Any, list[_Result | None]] = {}


class FakeOps:
    """Runs operations on fake tensors of one mode, all of which are on the CPU."""

    def __init__(self) -> None:
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)

    def run(self, func: Any, args: Any, kwargs: Any, inputs: list[torch.Tensor]) -> Any:
        """Run an operation as under the mode.

        Args:
            func: the operation.
            args: its arguments.
            kwargs: its named arguments.
            inputs: the tensors among both.
        """
        try:
            key = (func, *_keys(args), *_keys(kwargs.items()))
        except _NotRemembered:
            key = None
        if key in _known:
            return self._made(func, _known[key], inputs)
        with self.mode:
            out = func(*args, **kwargs)
        if key is not None:
            with suppress(_NotRemembered):
                _known[key] = [_described(each, inputs) for each in _as_list(out)]
        return out

    def _made(self, func: Any, results: list[_Result | None], inputs: list[torch.Tensor]) -> Any:
        made = [None if result is None else self._tensor(result, inputs) for result in results]
        returns = func._schema.returns
        if len(returns) == 1:
            return made if isinstance(returns[0].type, torch.ListType) else made[0]
        return tuple(made)

    def _tensor(self, result: _Result, inputs: list[torch.Tensor]) -> torch.Tensor:
        if result.is_argument:
            assert result.argument is not None
            return inputs[result.argument]
        if result.argument is None:
            meta = torch.empty_strided(result.shape, result.stride, dtype=result.dtype, device="meta")
        else:
            storage = inputs[result.argument].untyped_storage()
            meta = torch.empty(0, dtype=result.dtype, device="meta")
            meta.set_(storage, result.offset, result.shape, result.stride)
        return FakeTensor(self.mode, meta, _CPU)


def _described(out: Any, inputs: list[torch.Tensor]) -> _Result | None:
    """Describe a result. Raises _NotRemembered."""
    if out is None:
        return None
    if (
        not isinstance(out, FakeTensor)
        or out.constant is not None
        or out.fake_device != _CPU
        or out.layout != torch.strided
    ):
        raise _NotRemembered
    argument, is_argument = None, False
    for place, tensor in enumerate(inputs):
        if out is tensor:
            argument, is_argument = place, True
            break
        if isinstance(tensor, FakeTensor) and out.untyped_storage() is tensor.untyped_storage():
            argument = place
            break
    return _Result(argument, is_argument, out.shape, out.stride(), int(out.storage_offset()), out.dtype)


def _keys(values: Any) -> list[Any]:
    return [_key(value) for value in values]


def _key(value: Any) -> Any:
    """What the result's shape can depend on. Raises _NotRemembered."""
    kind = type(value)
    if kind is FakeTensor:
        return (value.dtype, value.shape, value.stride(), value.storage_offset())
    if kind in _PLAIN:
        return (kind, value)  # the types tell 1 from True and 1.0
    if isinstance(value, torch.Tensor):
        return (None, value.dtype, value.shape, value.stride())
    if isinstance(value, list | tuple):
        return tuple(map(_key, value))
    raise _NotRemembered


def _as_list(out: Any) -> list[Any]:
    return list(out) if isinstance(out, list | tuple) else [out]
