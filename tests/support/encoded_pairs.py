"""Make encoded pairs from given tokens."""

from __future__ import annotations

import numpy as np

from orpo_ray.data.encoding import EncodedPair

IMAGE = 99


def make(prompt: list[int], chosen: list[int], rejected: list[int], sample_index: int = 0) -> EncodedPair:
    ids = [np.asarray(part, np.int32) for part in (prompt, chosen, rejected)]
    images = {"pixel_values": np.full((1, 3, 2, 2), sample_index % 256, np.uint8)} if IMAGE in prompt else {}
    return EncodedPair(str(sample_index), *ids, ids[0] != IMAGE, images, sample_index)
