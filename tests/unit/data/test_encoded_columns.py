"""Encoded pairs go through Arrow and come back equal, without their tensors being copied."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from orpo_ray.data.encoded_columns import from_arrow, num_bytes, tensor_ids, to_arrow
from orpo_ray.data.encoding import EncodedPair
from orpo_ray.processing.prompts import EncodedPrompt


def make_pair(
    name: str,
    prompt: int,
    images: dict[str, np.ndarray],
    second: EncodedPrompt | None = None,
    other: EncodedPrompt | None = None,
) -> EncodedPair:
    ids = np.arange(prompt, dtype=np.int32)
    return EncodedPair(name, ids, ids[:3] + 7, ids[:1] + 9, ids % 2 == 0, images, 0, second, other, prompt % 4)


def three_pairs() -> list[EncodedPair]:
    pixels = np.arange(2 * 3 * 5 * 7, dtype=np.uint8).reshape(2, 3, 5, 7)
    other = EncodedPrompt(np.arange(4, dtype=np.int32), np.ones(4, bool), {"pixel_values": pixels[:1]})
    return [
        make_pair("a", 5, {"pixel_values": pixels, "image_grid_thw": np.array([[1, 2, 3]])}),
        make_pair("b", 3, {}, None, other),
        make_pair(
            "c",
            7,
            {"pixel_values": pixels[:, :, ::2], "mask": np.ones((2, 3), bool)},
            other,
            EncodedPrompt(other.ids + 1, ~other.is_text, {}),
        ),
    ]


def assert_same(found: EncodedPair, pair: EncodedPair, sample_index: int) -> None:
    assert (found.id, found.sample_index, found.truncated) == (pair.id, sample_index, pair.truncated)
    for name in ("prompt_ids", "chosen_ids", "rejected_ids", "prompt_is_text"):
        np.testing.assert_array_equal(getattr(found, name), getattr(pair, name), strict=True)
    sides = [(found.images, pair.images)]
    for side in ("rejected_prompt", "other_prompt"):
        mine, theirs = getattr(found, side), getattr(pair, side)
        assert (mine is None) == (theirs is None)
        if mine is not None:
            np.testing.assert_array_equal(mine.ids, theirs.ids, strict=True)
            np.testing.assert_array_equal(mine.is_text, theirs.is_text, strict=True)
            sides.append((mine.images, theirs.images))
    for mine, theirs in sides:
        assert list(mine) == list(theirs)
        for name in mine:
            np.testing.assert_array_equal(mine[name], theirs[name], strict=True)


@pytest.mark.parametrize("first", [0, 1, 3])
def test_pairs_come_back_equal_from_any_slice(first: int) -> None:
    sample_indices, pairs = [3, 6, 8], three_pairs()
    found = from_arrow(to_arrow(sample_indices, pairs)[first:])
    for mine, sample_index, pair in zip(found, sample_indices[first:], pairs[first:], strict=True):
        assert_same(mine, pair, sample_index)


def test_the_bytes_of_a_pair_are_those_of_its_tensors() -> None:
    """Prompt of 5 int32 and 5 bool, answers of 3 and 1, 210 pixels, one grid of 3 int64."""
    pair = three_pairs()[0]
    assert num_bytes(pair) == 4 * 5 + 5 + 4 * 3 + 4 * 1 + 210 + 3 * 8


def test_arrays_are_aligned_views_of_the_arrow_buffers() -> None:
    array = to_arrow([0, 1, 2], three_pairs())
    sink = pa.BufferOutputStream()
    table = pa.table({"rows": array})
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    stored = sink.getvalue()  # as the object store holds it
    found = from_arrow(pa.ipc.open_stream(stored).read_all()["rows"].chunk(0))
    for pair, source in zip(found, three_pairs(), strict=True):
        assert_same(pair, source, pair.sample_index)
        for value in (pair.prompt_ids, pair.chosen_ids, pair.prompt_is_text, *pair.images.values()):
            address = value.__array_interface__["data"][0]
            assert stored.address <= address < stored.address + stored.size
            assert value.flags.aligned
            assert not value.flags.owndata


@pytest.mark.parametrize("first", [0, 1, 2])
def test_pairs_of_a_row_share_the_bytes_of_their_tensors(first: int) -> None:
    """As the encoder makes them, and read from a slice whose pixels lie before it."""
    row, _, other = three_pairs()
    pairs = [row, replace(row, id="a2", chosen_ids=row.chosen_ids + 1), other]
    assert num_bytes(pairs[1], tensor_ids(row)) == pairs[1].chosen_ids.nbytes
    apart = [row, replace(pairs[1], images={name: value.copy() for name, value in row.images.items()}), other]
    array = to_arrow([4, 4, 5], pairs)
    saved = to_arrow([4, 4, 5], apart).nbytes - array.nbytes
    assert saved >= 210
    found = from_arrow(array[first:])
    for mine, sample_index, pair in zip(found, [4, 4, 5][first:], pairs[first:], strict=True):
        assert_same(mine, pair, sample_index)
    if first == 0:
        assert np.shares_memory(found[0].images["pixel_values"], found[1].images["pixel_values"])
