"""Encoded pairs go through Arrow and come back equal, without their tensors being copied."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from orpo_ray.data.bad_rows import BadRow
from orpo_ray.data.encoded_columns import from_arrow, to_arrow
from orpo_ray.data.encoding import EncodedPair
from orpo_ray.processing.prompts import EncodedPrompt

BAD = BadRow(5, "e", "pairs.jsonl:line 5", "too_long", "120 tokens")


def make_pair(
    name: str, prompt: int, images: dict[str, np.ndarray], second: EncodedPrompt | None = None
) -> EncodedPair:
    ids = np.arange(prompt, dtype=np.int32)
    return EncodedPair(name, ids, ids[:3] + 7, ids[:1] + 9, ids % 2 == 0, images, 0, second, truncated=prompt % 4)


def three_pairs() -> list[EncodedPair]:
    pixels = np.arange(2 * 3 * 5 * 7, dtype=np.uint8).reshape(2, 3, 5, 7)
    other = EncodedPrompt(np.arange(4, dtype=np.int32), np.ones(4, bool), {"pixel_values": pixels[:1]})
    return [
        make_pair("a", 5, {"pixel_values": pixels, "image_grid_thw": np.array([[1, 2, 3]])}),
        make_pair("b", 3, {}),
        make_pair("c", 7, {"pixel_values": pixels[:, :, ::2], "mask": np.ones((2, 3), bool)}, other),
    ]


def assert_same(found: EncodedPair | BadRow, pair: EncodedPair, sample_index: int) -> None:
    assert isinstance(found, EncodedPair)
    assert (found.id, found.sample_index, found.truncated) == (pair.id, sample_index, pair.truncated)
    for name in ("prompt_ids", "chosen_ids", "rejected_ids", "prompt_is_text"):
        np.testing.assert_array_equal(getattr(found, name), getattr(pair, name), strict=True)
    assert (found.rejected_prompt is None) == (pair.rejected_prompt is None)
    sides = [(found.images, pair.images)]
    if found.rejected_prompt is not None and pair.rejected_prompt is not None:
        np.testing.assert_array_equal(found.rejected_prompt.ids, pair.rejected_prompt.ids, strict=True)
        np.testing.assert_array_equal(found.rejected_prompt.is_text, pair.rejected_prompt.is_text, strict=True)
        sides.append((found.rejected_prompt.images, pair.rejected_prompt.images))
    for mine, theirs in sides:
        assert list(mine) == list(theirs)
        for name in mine:
            np.testing.assert_array_equal(mine[name], theirs[name], strict=True)


@pytest.mark.parametrize("first", [0, 1, 3])
def test_pairs_and_bad_rows_come_back_equal_from_any_slice(first: int) -> None:
    pairs = three_pairs()
    array = to_arrow([3, 5, 6, 8], [pairs[0], BAD, pairs[1], pairs[2]])
    found = from_arrow(array[first:])
    expected = {3: pairs[0], 5: BAD, 6: pairs[1], 8: pairs[2]}
    assert list(found) == [3, 5, 6, 8][first:]
    for sample_index, item in found.items():
        wanted = expected[sample_index]
        if isinstance(wanted, BadRow):
            assert item == wanted
        else:
            assert_same(item, wanted, sample_index)


def test_only_bad_rows() -> None:
    assert from_arrow(to_arrow([5], [BAD])) == {5: BAD}


def test_arrays_are_aligned_views_of_the_arrow_buffers() -> None:
    array = to_arrow([0, 1, 2], three_pairs())
    sink = pa.BufferOutputStream()
    table = pa.table({"rows": array})
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    stored = sink.getvalue()  # as the object store holds it
    found = from_arrow(pa.ipc.open_stream(stored).read_all()["rows"].chunk(0))
    for pair, source in zip(found.values(), three_pairs(), strict=True):
        assert_same(pair, source, pair.sample_index)
        assert isinstance(pair, EncodedPair)
        for value in (pair.prompt_ids, pair.chosen_ids, pair.prompt_is_text, *pair.images.values()):
            address = value.__array_interface__["data"][0]
            assert stored.address <= address < stored.address + stored.size
            assert value.flags.aligned
            assert not value.flags.owndata
