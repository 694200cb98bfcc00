"""Arbitrary rows are encoded or bad rows, in bounded time and memory."""

from __future__ import annotations

import io
import resource
import time
from collections import Counter
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from orpo_ray.config.field_types import FORMATS
from orpo_ray.data.encoding import EncodedPair, PairEncoder
from orpo_ray.data.formats import to_pair
from orpo_ray.errors import RowError
from orpo_ray.processing.processor import load_processor
from support.format_rows import ROWS
from support.row_values import broken_rows

SECONDS = 10
MORE_MEMORY = 300 << 20  # bytes that no row, nor all of them, may add to the process
MAX_LENGTH = 256
OUTCOMES: Counter[str] = Counter()
HUGE = st.sampled_from(["ab " * 1_000_000, "\U0001f469" * 1_000_000, "a" * 16_000, "\n" * 3_000_000])


class AnyImage:
    """A folder that has an image of every name."""

    def __init__(self) -> None:
        buffer = io.BytesIO()
        Image.new("RGB", (64, 64)).save(buffer, "PNG")
        self.data = buffer.getvalue()

    def read(self, path: str, at_most: int) -> bytes:
        return self.data


@pytest.fixture(scope="module")
def tiny() -> PairEncoder:
    return PairEncoder(load_processor("orpo-ray/tiny-smolvlm", None), MAX_LENGTH, truncate=True)


@st.composite
def rows(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    """A format, and a row of it with arbitrary values, some with a text of megabytes."""
    name = draw(st.sampled_from(FORMATS))
    row = draw(broken_rows(name)) if draw(st.booleans()) else ROWS[name]
    texts = [column for column, value in row.items() if isinstance(value, str)]
    if texts and draw(st.integers(0, 4)) == 4:
        row = row | {draw(st.sampled_from(texts)): draw(HUGE | st.text(max_size=200))}
    return name, row


def check(encoder: PairEncoder, name: str, row: dict[str, Any]) -> None:
    started, memory = time.thread_time(), peak_bytes()
    try:
        found = encoder.encode_many([to_pair(row, name, {}, "1")], [AnyImage()])[0]
    except RowError as bad:
        found = bad
    assert time.thread_time() - started < SECONDS
    assert peak_bytes() - memory < MORE_MEMORY
    if isinstance(found, EncodedPair):
        assert found.row_length <= MAX_LENGTH
        OUTCOMES["encoded"] += 1
        return
    assert found.reason
    assert found.detail
    OUTCOMES[found.reason] += 1


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def check_many(encoder: PairEncoder, count: int, derandomize: bool = False) -> None:
    OUTCOMES.clear()
    memory = peak_bytes()
    too_long = "plain", ROWS["plain"] | {"prompt": "ab " * 1_000_000}  # few examples may happen to be
    settings(max_examples=count, deadline=None, derandomize=derandomize)(
        example(too_long)(given(rows())(lambda row: check(encoder, *row)))
    )()
    assert peak_bytes() - memory < MORE_MEMORY
    # Otherwise this would test the formats only.
    assert OUTCOMES["encoded"] > 0.02 * count
    assert OUTCOMES["too_long"]


def test_any_row_is_encoded_or_a_bad_row(tiny: PairEncoder) -> None:
    check_many(tiny, 300, derandomize=True)


@pytest.mark.nightly
@pytest.mark.parametrize("part", range(10))
def test_many_rows_are_encoded_or_bad_rows(tiny: PairEncoder, part: int) -> None:
    check_many(tiny, 1_000)
