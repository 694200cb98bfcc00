"""The next step is made while this one trains: an iterator that runs ahead in a thread, and copies on a side stream."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

import torch

from orpo_ray.data.packing import PairBatch

T = TypeVar("T")


def one_ahead(items: Iterable[T], device: torch.device, waits: bool = False) -> Generator[T]:
    """Yield the same items, each made in a thread while the one before is in use.

    An error in the thread is raised where its item would have come. Closing the iterator ends the thread, which
    finishes the item that it is making.

    Args:
        items: an iterable that only this thread uses.
        device: of CUDA calls in the thread.
        waits: whether closing waits for the end of the thread, which holds whatever makes the items.
    """
    source, end = iter(items), object()

    def make() -> T | object:
        if device.type == "cuda":
            torch.cuda.set_device(device)  # a new thread would use the first device
        return next(source, end)

    pool = ThreadPoolExecutor(1, thread_name_prefix="one-ahead")
    try:
        following = pool.submit(make)
        while (item := following.result()) is not end:
            following = pool.submit(make)
            yield item  # type: ignore[misc]
    finally:
        pool.shutdown(wait=waits, cancel_futures=True)


def pinned(batches: Sequence[PairBatch], device: torch.device) -> list[PairBatch]:
    """Put batches into pinned memory if they will be copied to a GPU: only from there can a copy run by itself."""
    return [batch.map(torch.Tensor.pin_memory) for batch in batches] if device.type == "cuda" else list(batches)


def on_device(batches: Sequence[PairBatch], device: torch.device) -> Iterator[PairBatch]:
    """Yield batches on the device. A GPU receives each on a side stream while it computes the one before."""
    if device.type != "cuda":
        yield from (batch.to(device) for batch in batches)
        return
    side, main = _side_stream(device), torch.cuda.current_stream(device)

    def copied(batch: PairBatch) -> PairBatch:
        with torch.cuda.stream(side):
            return batch.map(lambda tensor: tensor.to(device, non_blocking=True))

    def used(tensor: torch.Tensor) -> torch.Tensor:
        tensor.record_stream(main)  # its memory is not reused before the main stream is done with it
        return tensor

    following = copied(batches[0]) if batches else None
    for number in range(len(batches)):
        main.wait_stream(side)
        assert following is not None
        batch = following.map(used)
        following = copied(batches[number + 1]) if number + 1 < len(batches) else None
        yield batch


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all steps: the allocator keeps free memory for each stream apart."""
    return torch.cuda.Stream(device)
