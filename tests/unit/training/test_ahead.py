"""An iterator that runs one item ahead in a thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
import torch

from orpo_ray.data.packing import build_batch
from orpo_ray.errors import UserError
from orpo_ray.training.ahead import on_device, one_ahead, pinned
from support.encoded_pairs import IMAGE, make

CPU = torch.device("cpu")


def threads_ahead() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("one-ahead")]


def wait_for_the_threads_to_end() -> None:
    for thread in threads_ahead():
        thread.join(timeout=10)
    assert not threads_ahead()


def test_items_come_in_order_and_each_is_made_while_the_one_before_is_in_use() -> None:
    made: list[int] = []
    second_made = threading.Event()

    def items() -> Iterator[int]:
        for number in range(4):
            made.append(number)
            if number == 1:
                second_made.set()
            yield number

    ahead = one_ahead(items(), CPU)
    assert made == []  # not before the first is wanted
    assert next(ahead) == 0
    assert second_made.wait(timeout=10)
    time.sleep(0.1)
    assert made == [0, 1]  # and not more than one ahead
    assert list(ahead) == [1, 2, 3]
    wait_for_the_threads_to_end()


def test_an_error_comes_where_its_item_would_have_come() -> None:
    def items() -> Iterator[int]:
        yield 0
        raise UserError("the processor cannot be loaded", field="model.id", fix="check the name")

    ahead = one_ahead(items(), CPU)
    assert next(ahead) == 0
    with pytest.raises(UserError, match="the processor cannot be loaded"):
        next(ahead)
    wait_for_the_threads_to_end()


def test_closing_ends_the_thread() -> None:
    ahead = one_ahead(iter(range(10**9)), CPU)
    next(ahead)
    assert threads_ahead()
    ahead.close()
    wait_for_the_threads_to_end()


def test_batches_arrive_unchanged_on_a_cpu() -> None:
    batches = [build_batch([make([5, IMAGE], [7, 8], [9], index)], "response", "shared_prefix") for index in range(3)]
    arrived = list(on_device(pinned(batches, CPU), CPU))
    assert [batch.sample_indices for batch in arrived] == [(0,), (1,), (2,)]
    for batch, source in zip(arrived, batches, strict=True):
        torch.testing.assert_close(batch.input_ids, source.input_ids)
        torch.testing.assert_close(batch.images["pixel_values"], source.images["pixel_values"])
    assert list(on_device([], CPU)) == []
