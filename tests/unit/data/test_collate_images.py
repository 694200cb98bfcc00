"""How the image tensors of several prompts are joined, worked by hand."""

from __future__ import annotations

import numpy as np

from orpo_ray.data.collate_images import concatenate_images

SMALL = {"pixel_values": np.full((1, 3, 2, 1), 7, np.uint8)}
WIDE = {"pixel_values": np.full((2, 3, 1, 3), 9, np.uint8)}


def test_images_of_one_size_are_put_one_after_another_without_a_mask() -> None:
    second = {"pixel_values": np.full((2, 3, 2, 1), 8, np.uint8)}
    out = concatenate_images([SMALL, {}, second], 10, "mask")
    assert list(out) == ["pixel_values"]
    assert out["pixel_values"][:, 0, 0, 0].tolist() == [7, 8, 8]


def test_images_of_different_sizes_are_padded_and_a_mask_says_where() -> None:
    out = concatenate_images([SMALL, WIDE], 10, "mask")
    assert out["pixel_values"].dtype == np.uint8
    assert out["pixel_values"][0, 2].tolist() == [[7, 0, 0], [7, 0, 0]]
    assert out["pixel_values"][2, 0].tolist() == [[9, 9, 9], [0, 0, 0]]
    assert out["mask"].tolist() == [
        [[1, 0, 0], [1, 0, 0]],
        [[1, 1, 1], [0, 0, 0]],
        [[1, 1, 1], [0, 0, 0]],
    ]


def test_an_image_that_has_a_mask_gives_the_others_one() -> None:
    masked = SMALL | {"mask": np.asarray([[[1], [0]]])}
    assert concatenate_images([SMALL, masked], 10, "mask")["mask"].tolist() == [[[1], [1]], [[1], [0]]]


def test_without_a_mask_s_name_there_is_only_padding() -> None:
    assert list(concatenate_images([SMALL, WIDE], 10)) == ["pixel_values"]
