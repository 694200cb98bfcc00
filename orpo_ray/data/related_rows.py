"""Rows that share an image or a prompt one after another, so that they are trained on in one step, as trees.

The order depends on the rows of the window alone, which seed and epoch decide. So it is the same for any number of
workers and after a resume.
"""

from __future__ import annotations

import json
from collections.abc import Hashable
from dataclasses import replace

from orpo_ray.data.bad_rows import BadRow
from orpo_ray.data.other_images import RootOf, WindowPairs, image_fingerprint


def grouped(pairs: WindowPairs, root_of: RootOf) -> WindowPairs:
    """Move rows with the same images behind the first of them, those with the same prompt next to each other.

    Rows that share nothing keep their order, which is that of all rows if none shares anything.

    Args:
        pairs: all rows of a window.
        root_of: folder that a shard's image paths are relative to.

    Returns:
        The rows of the window at its sample indices, in the order of these.
    """
    sample_indices = sorted(pairs)
    first: dict[Hashable, int] = {}  # where the first row with these images is, or with these images and this prompt
    order: list[tuple[int, int, int]] = []
    for sample_index in sample_indices:
        shard, pair = pairs[sample_index]
        if isinstance(pair, BadRow):
            order.append((sample_index, sample_index, sample_index))
            continue
        prompt = json.dumps(pair.prompt)
        images = tuple(image_fingerprint(image, root_of(shard)) for image in pair.images) or prompt
        own = first.setdefault(images, sample_index), first.setdefault((images, prompt), sample_index)
        order.append((*own, sample_index))
    found: WindowPairs = {}
    for sample_index, (*_, before) in zip(sample_indices, sorted(order), strict=True):
        shard, pair = pairs[before]
        found[sample_index] = (
            shard,
            replace(pair, sample_index=sample_index) if isinstance(pair, BadRow) else pair,
        )
    return found
