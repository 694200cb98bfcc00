"""What families add to the collation of images, worked by hand; and that families can be sent between processes."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from orpo_ray.model.families.cross_attention import CROSS_MASK, IDEFICS, IMAGES_PER_ROW
from orpo_ray.model.families.idefics3 import IDEFICS3
from orpo_ray.model.families.llava_like import LLAVA
from orpo_ray.model.families.registry import FAMILIES
from support.pairs_by_hand import text_rows


def test_an_answer_sees_what_the_last_token_of_its_prompt_sees() -> None:
    """Rows of 4 tokens: two images in a prompt of 3, no image, one image in a prompt of 1."""
    two = {
        "pixel_values": np.zeros((2, 3, 1, 1), np.uint8),
        "image_attention_mask": np.asarray([[1, 0], [0, 0], [0, 1]]),
    }
    one = {"pixel_values": np.ones((1, 3, 1, 1), np.uint8), "image_attention_mask": np.asarray([[1]])}
    out = IDEFICS.collate([two, {}, one], text_rows(3, 4))
    assert out["pixel_values"][:, 0, 0, 0].tolist() == [0, 0, 1]
    assert out[IMAGES_PER_ROW].tolist() == [2, 0, 1]
    assert out[CROSS_MASK].tolist() == [
        [[1, 0], [0, 0], [0, 1], [0, 1]],
        [[0, 0], [0, 0], [0, 0], [0, 0]],
        [[1, 0], [1, 0], [1, 0], [1, 0]],
    ]


def test_only_families_with_a_padding_mask_add_one() -> None:
    sizes = [{"pixel_values": np.ones((1, 3, *size), np.uint8)} for size in ((2, 1), (1, 2))]
    assert set(IDEFICS3.collate(sizes, text_rows(1, 4))) == {"pixel_values", "pixel_attention_mask"}
    assert set(LLAVA.collate(sizes, text_rows(1, 4))) == {"pixel_values"}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_and_its_collate_can_be_pickled(name: str) -> None:
    family = pickle.loads(pickle.dumps(FAMILIES[name]))
    assert family == FAMILIES[name]
    assert type(family) is type(FAMILIES[name])
    assert pickle.loads(pickle.dumps(family.collate)).__self__ == family
