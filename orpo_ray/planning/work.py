"""The work of a micro-batch: matrix products by their sizes, attention, memory traffic and kernels.

A `WorkCounter` collects it from the operations of a dry run. `step_time.py` turns it into seconds on a GPU.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

aten = torch.ops.aten
# Operations that start no kernel although their schemas declare no view.
_FREE = {
    aten.detach.default, aten.alias.default, aten._unsafe_view.default, aten.empty.memory_format,
    aten.empty_like.default, aten.new_empty.default, aten.empty_strided.default, aten.new_empty_strided.default,
}  # fmt: skip


@dataclass(frozen=True)
class Matmul:
    """A product [m, k] x [k, n], `batch` times."""

    batch: int
    m: int
    n: int
    k: int
    grows: Literal["m", "k", "batch"]
    """The size that is proportional to the pairs of a micro-batch: the rows where a weight is multiplied, the inner
    size where a weight's gradient is computed, and the batch elsewhere.
    """

    @property
    def flops(self) -> int:
        """FLOPs of one such product."""
        return 2 * self.batch * self.m * self.n * self.k

    @property
    def weight(self) -> int:
        """Elements of the weight that is multiplied, 0 if there is none."""
        return self.n * self.k if self.grows == "m" else 0

    def with_pairs(self, pairs: int) -> Matmul:
        """Return the product for a micro-batch with `pairs` times as many pairs."""
        sizes = {"batch": self.batch, "m": self.m, "k": self.k}
        sizes[self.grows] *= pairs
        return Matmul(sizes["batch"], sizes["m"], self.n, sizes["k"], self.grows)


@dataclass(frozen=True)
class Work:
    """The work of a forward and backward pass of one pair, recomputation included."""

    matmuls: Mapping[Matmul, int] = field(default_factory=dict)
    """How often each product is computed."""
    attention_flops: int = 0
    """FLOPs of fused attention kernels; causal masks are not subtracted, as usual."""
    moved: int = 0
    """Bytes that other operations read and write and that grow with the pairs: activations."""
    moved_once: int = 0
    """Bytes that other operations read and write once per micro-batch: accumulated gradients of weights."""
    kernels: int = 0
    """Operations that start a kernel."""
    exchanged: int = 0
    """Bytes of all-to-alls in a group (`scaling.sequence_parallel`), the worker's own part included."""

    @property
    def flops(self) -> int:
        """FLOPs of matrix products and attention."""
        return sum(matmul.flops * count for matmul, count in self.matmuls.items()) + self.attention_flops

    def plus(self, other: Work, times: int = 1) -> Work:
        """Return this work and `times` the other."""
        matmuls = Counter(self.matmuls)
        for matmul, count in other.matmuls.items():
            matmuls[matmul] += times * count
        return Work(
            {matmul: count for matmul, count in matmuls.items() if count},
            self.attention_flops + times * other.attention_flops,
            self.moved + times * other.moved,
            self.moved_once + times * other.moved_once,
            self.kernels + times * other.kernels,
            self.exchanged + times * other.exchanged,
        )


class WorkCounter:
    """Adds up the work of operations as they run."""

    def __init__(self) -> None:
        self._matmuls: Counter[Matmul] = Counter()
        self._attention = self._moved = self._moved_once = self._kernels = self._exchanged = 0
        self._weights: set[tuple[int, ...]] = set()

    def watch(self, model: torch.nn.Module) -> None:
        """Take the shapes of a model's weights, by which their products and gradients are recognized."""
        self._weights = {_shape(parameter) for parameter in model.parameters() if parameter.ndim >= 2}

    def add(
        self,
        func: Any,
        args: Any,
        kwargs: Any,
        inputs: list[torch.Tensor],
        out: Any,
        flops: Callable[..., int] | None,
    ) -> None:
        """Count an operation.

        Args:
            func: the operation.
            args: its arguments.
            kwargs: its named arguments.
            inputs: the tensors among both.
            out: its result.
            flops: torch's formula for its FLOPs, if it has one.
        """
        if func.is_view or func in _FREE:
            return
        self._kernels += 1
        if flops is None:
            self._move(func, inputs, out)
            return
        count = flops(*args, **kwargs, out_val=out)
        matmul = self._matmul(func, args, out, count)
        if matmul is None:
            self._attention += count
        else:
            self._matmuls[matmul] += 1

    def exchange(self, parts: torch.Tensor) -> None:
        """Count an all-to-all."""
        self._kernels += 1
        self._exchanged += parts.nbytes

    def total(self) -> Work:
        """Return what was counted so far."""
        counts = (self._attention, self._moved, self._moved_once, self._kernels, self._exchanged)
        return Work(dict(self._matmuls), *counts)

    def _matmul(self, func: Any, args: Any, out: Any, flops: int) -> Matmul | None:
        packet = func._overloadpacket
        if packet in (aten.mm, aten.addmm):
            a, b = args[-2:] if packet is aten.addmm else args[:2]
            (m, k), n = a.shape, b.shape[1]
            is_gradient = _shape(b) not in self._weights and _shape(out) in self._weights
            return Matmul(1, m, n, k, "k" if is_gradient else "m")
        if packet in (aten.bmm, aten.baddbmm):
            a, b = args[1:3] if packet is aten.baddbmm else args[:2]
            batch, m, k = a.shape
            return Matmul(batch, m, b.shape[2], k, "batch")
        if "convolution" in str(packet):
            # As a product with one row per output position. Backward takes the output's gradient first.
            output = args[0] if "backward" in str(packet) else out
            channels = output.shape[1]
            rows = output.numel() // channels
            return Matmul(1, rows, channels, max(1, flops // (2 * rows * channels)), "m")
        return None

    def _move(self, func: Any, inputs: list[torch.Tensor], out: Any) -> None:
        tensors = inputs + tensors_of(out)
        if func in (aten.embedding.default, aten.index_select.default, aten.gather.default, aten.index.Tensor):
            tensors = [out, out]  # reads only the rows that it returns
        for tensor in tensors:
            if _shape(tensor) in self._weights:
                self._moved_once += tensor.nbytes
            else:
                self._moved += tensor.nbytes


def tensors_of(value: Any) -> list[torch.Tensor]:
    """Return the tensors in nested lists, tuples and mappings. Several times faster than torch's own function."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, list | tuple):
        return []
    return [tensor for each in value for tensor in tensors_of(each)]


def _shape(tensor: torch.Tensor) -> tuple[int, ...]:
    """The sizes of a tensor, the same for its transpose."""
    return tuple(sorted(tensor.shape))
