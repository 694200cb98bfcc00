"""Positions with three axes (time, height, width) of Qwen2.5-VL's and Qwen3-VL's tokens, computed on the host.

The models' `get_rope_index` does the same from images' sizes that it reads back from the device, one number at a time.

Legend: T tokens of a row, L tokens of a sequence.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import cycle

import numpy as np

from orpo_ray.data.collate_images import TokenRows


def rope_positions(rows: TokenRows, grids: np.ndarray, merge: int) -> np.ndarray:
    """Compute the positions of a batch.

    Args:
        rows: in either layout.
        grids: int64 [n, 3], the size of each image in patches: time, height, width.
        merge: patches per side of what becomes one token.

    Returns:
        int64 [3, rows, T].
    """
    # The rows of rejected answers may have the images of the chosen ones, which are stored once.
    sizes = cycle((grids // [1, merge, merge]).tolist())
    if not rows.branches:
        return np.stack([_sequence(each, sizes) for each in rows.is_image], axis=1)
    positions = np.empty((3, rows.width), np.int64)
    for branch in rows.branches:
        own = _sequence(rows.is_image[0, branch.start : branch.end], sizes)
        if branch.context:  # what continues it is at the position of this branch, one position on all axes
            own += positions[:, branch.context[-1][1], None]
        positions[:, branch.start : branch.end] = own
    return positions[:, None]


def _sequence(is_image: np.ndarray, sizes: Iterator[Sequence[int]]) -> np.ndarray:
    """Positions of one sequence, int64 [3, L], whose images are the next ones of `sizes`, in tokens."""
    length = len(is_image)
    out = np.empty((3, length), np.int64)
    column = position = 0
    for image in np.flatnonzero(is_image).tolist():
        if image < column:
            continue  # within the last image
        out[:, column:image] = np.arange(position, position + image - column)
        position += image - column
        time, height, width = next(sizes)
        end = image + time * height * width
        out[:, image:end] = position + np.indices((time, height, width)).reshape(3, -1)
        column, position = end, position + max(height, width)
    out[:, column:] = np.arange(position, position + length - column)
    return out
