"""Batches that a side stream copies to the device arrive whole, and their memory is not reused too early."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from orpo_ray.data.packing import build_batch
from orpo_ray.training.ahead import on_device, pinned
from support.encoded_pairs import IMAGE, make

pytestmark = pytest.mark.gpu


def test_batches_arrive_whole_while_the_device_computes(device: torch.device) -> None:
    rng = np.random.default_rng(0)
    pixels = [rng.integers(0, 256, (64, 3, 128, 128), dtype=np.uint8) for _ in range(8)]
    pairs = [replace(make([5, IMAGE], [7], [9], i), images={"pixel_values": each}) for i, each in enumerate(pixels)]
    batches = [build_batch([pair], "response", "shared_prefix") for pair in pairs]
    size = 4096 if device.type == "cuda" else 64
    busy = torch.rand(size, size, device=device)
    sums = []
    for batch in on_device(pinned(batches, device), device):
        assert batch.input_ids.device.type == device.type
        for _ in range(10):  # the copies of later batches overtake this
            busy = busy @ busy / size
        sums.append(batch.images["pixel_values"].sum())
    assert [int(each) for each in sums] == [int(each.sum()) for each in pixels]
