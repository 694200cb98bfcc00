"""What encoding tasks yield: facts for the feed, and blocks with the pairs for the workers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from orpo_ray.data.bad_rows import BadRow
from orpo_ray.data.balance import PairSize
from orpo_ray.data.encoded_columns import from_arrow, num_bytes
from orpo_ray.streaming.feed import encoded_blocks
from orpo_ray.streaming.pipeline import rows_of_blocks
from support.encoded_pairs import IMAGE, make

PAIRS = [make([5, IMAGE, 6], [7] * length, [9], length) for length in (3, 4, 6)]
BAD = BadRow(5, "e", "pairs.jsonl:line 5", "too_long", "120 tokens")


@pytest.mark.parametrize(
    ("bytes_per_block", "places"), [(1, [0, 1, 2]), (2 * num_bytes(PAIRS[1]), [0, 0, 1]), (10**9, [0, 0, 0])]
)
def test_facts_come_before_the_blocks_that_hold_the_pairs(bytes_per_block: int, places: list[int]) -> None:
    items = [PAIRS[0], PAIRS[1], BAD, PAIRS[2]]
    facts, *blocks = encoded_blocks([3, 4, 5, 6], items, bytes_per_block)
    assert [table.num_rows for table in (facts, *blocks)] == [1] * (2 + places[-1])
    assert len({table.schema for table in (facts, *blocks)}) == 1
    (found,) = facts["facts"].to_pylist()
    assert [fact["sample_index"] for fact in found] == [3, 4, 5, 6]
    assert BadRow(**found[2]["bad"]) == BAD
    good = [fact for fact in found if fact["bad"] is None]
    assert [fact["block"] for fact in good] == places
    for fact, pair in zip(good, PAIRS, strict=True):
        assert PairSize.from_numbers(fact["size"]) == PairSize.of(pair)
        (rows,) = rows_of_blocks(blocks[fact["block"]])
        assert from_arrow(rows)[fact["place"]].chosen_ids.tolist() == pair.chosen_ids.tolist()


def test_rows_that_are_all_bad_make_no_block() -> None:
    (facts,) = encoded_blocks([5], [BAD], 1)
    assert [BadRow(**fact["bad"]) for fact in facts["facts"].to_pylist()[0]] == [BAD]


def test_pairs_of_a_row_are_in_one_block_as_long_as_what_they_add_fits() -> None:
    """What they share counts once."""
    others = [replace(PAIRS[0], chosen_ids=PAIRS[0].chosen_ids + number) for number in (1, 2)]
    room = num_bytes(PAIRS[0]) + 2 * others[0].chosen_ids.nbytes
    facts, *blocks = encoded_blocks([3, 3, 3, 4], [PAIRS[0], *others, PAIRS[1]], room)
    (found,) = facts["facts"].to_pylist()
    assert [(fact["sample_index"], fact["block"], fact["place"]) for fact in found] == [
        (3, 0, 0), (3, 0, 1), (3, 0, 2), (4, 1, 0)
    ]  # fmt: skip
    assert len(blocks) == 2
