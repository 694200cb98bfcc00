"""Detection of formats, renamed columns, and the user's own adapters."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orpo_ray.data.formats import detect_format, to_pair
from orpo_ray.data.row_adapter import load_adapter
from orpo_ray.errors import RowError, UserError
from support.format_rows import (
    A_PNG,
    CONVERSATIONAL,
    IMAGE,
    SWIFT,
    TEXT,
    bad,
    detected,
    message,
    pair_of,
    turn,
)


def test_renamed_columns() -> None:
    renames = {"chosen": "good", "rejected": "poor", "prompt": "q"}
    assert detect_format(["q", "good", "poor"], [], renames, "auto", "f") == "trl"
    pair = to_pair({"q": "hi", "good": "x", "poor": "y"}, "trl", renames, "f:1")
    assert (pair.chosen, pair.rejected) == ("x", "y")
    renames = {"conversations": "messages", "chosen": "best", "rejected": "worst"}
    row = {"messages": [message("user", "hi")], "best": message("assistant", "x"), "worst": message("assistant", "y")}
    assert detect_format(row, [row], renames, "auto", "f") == "sharegpt"
    assert to_pair(row, "sharegpt", renames, "f:1").chosen == "x"


def test_a_renamed_column_replaces_one_of_that_name() -> None:
    renames = {"chosen": "good"}
    for row in ({"good": "x", "chosen": "other"}, {"chosen": "other", "good": "x"}):
        assert to_pair({"prompt": "hi", "rejected": "y"} | row, "trl", renames, "f:1").chosen == "x"
    both = to_pair({"q": "hi", "rejected": "y"}, "trl", {"prompt": "q", "chosen": "q"}, "f:1")
    assert (both.prompt[0]["content"][0]["text"], both.chosen) == ("hi", "hi")


@pytest.mark.parametrize(
    ("renames", "requested", "expected"),
    [
        ({"images": "nope"}, "auto", "no column 'nope'"),
        ({"imgs": "a"}, "auto", "no column 'imgs'"),
        ({"question": "a"}, "trl", "no column 'question'"),
    ],
)
def test_a_rename_that_matches_nothing_is_refused(renames: dict[str, str], requested: str, expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        detect_format(["prompt", "chosen", "rejected", "a"], [], renames, requested, "f")


@pytest.mark.parametrize(
    ("row", "requested", "expected"),
    [
        ({"chosen": "x", "answer": "y"}, "auto", "the columns are: answer, chosen; .*trl lacks rejected, prompt"),
        # A prompt column with another name must not be ignored.
        ({"query": "hi", "chosen": "x", "rejected": "y"}, "auto", "trl lacks prompt"),
        ({"image": "a.png", "text": "a caption"}, "auto", "rlhf-v lacks the expected values"),
        ({"messages": []}, "auto", "swift lacks rejected_response or rejected_messages or rejected_images"),
        (
            {"prompt": "hi", "chosen": "x"},
            "sharegpt",
            "format sharegpt: conversations, rejected; the columns are: chosen, prompt",
        ),
        ({"messages": []}, "swift", "format swift: rejected_response or rejected_messages or rejected_images"),
        ({"chosen": "x"}, "trl", "format trl: rejected"),
    ],
)
def test_errors_name_present_and_missing_columns(row: Any, requested: str, expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        detected(row, requested=requested)


@pytest.mark.parametrize("field", ["id", "prompt", "chosen", "image"])
def test_a_lone_surrogate_is_a_bad_row(field: str) -> None:
    row = {"id": "1", "prompt": "p", "chosen": "x", "rejected": "y", "image": "a.png"}
    assert bad(row | {field: "\ud83d"}) == "malformed_row"


def test_a_lone_surrogate_in_a_rejected_image_path() -> None:
    assert bad(SWIFT | {"rejected_images": ["\ud83d"]}, "swift") == "malformed_row"


@pytest.fixture
def adapters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Modules with adapters in the working directory."""
    (tmp_path / "own_adapters.py").write_text(
        "from orpo_ray.errors import RowError\n"
        "def good(row):\n"
        "    return {'prompt': row.pop('q'), 'chosen': row['a'], 'rejected': row['b'], 'image': 'a.png'}\n"
        "def other(row):\n    return {'question': '<image>' + row['q'], **good(row)}\n"
        "def broken(row):\n    return 1 / 0\n"
        "def picky(row):\n    raise RowError('too_dull', 'seen before')\n"
        "def leaves(row):\n    raise SystemExit(3)\n"
        "def nothing(row):\n    return None\n"
        "def unknown(row):\n    return {1: 2, 'chosen': 'x'}\n"
        "constant = 3\n"
    )
    (tmp_path / "broken_adapters.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    load_adapter.cache_clear()
    yield
    load_adapter.cache_clear()
    sys.modules.pop("own_adapters", None)


@pytest.mark.usefixtures("adapters")
def test_a_users_adapter() -> None:
    name, renames = "own_adapters:good", {"q": "query"}
    row = {"id": 3, "query": "what is it?", "a": "x", "b": "y"}
    assert detect_format(row, [row], renames, name, "f") == name
    pair = to_pair(row, name, renames, "f:1")
    assert (pair.id, pair.prompt, pair.chosen) == ("3", [turn("user", IMAGE, TEXT)], "x")
    assert to_pair(row, "own_adapters:other", renames, "f:1").images == [A_PNG]
    assert row["query"] == "what is it?"


@pytest.mark.usefixtures("adapters")
@pytest.mark.parametrize(
    ("function", "reason", "expected"),
    [
        ("broken", "adapter_failed", "ZeroDivisionError: division by zero"),
        ("leaves", "adapter_failed", "SystemExit: 3"),
        ("picky", "too_dull", "seen before"),
        ("nothing", "adapter_failed", "must return a mapping of columns, found None"),
        ("unknown", "adapter_failed", "unknown row format; the columns are: 1, chosen"),
    ],
)
def test_failures_of_an_adapter_are_bad_rows(function: str, reason: str, expected: str) -> None:
    with pytest.raises(RowError, match=expected) as error:
        pair_of({"q": "hi"}, f"own_adapters:{function}")
    assert error.value.reason == reason


@pytest.mark.usefixtures("adapters")
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("own_adapters:nope", "own_adapters has no function nope"),
        ("own_adapters:constant", "own_adapters has no function constant"),
        ("broken_adapters:good", "ZeroDivisionError"),
        ("no_such_module:good", "ModuleNotFoundError: No module named 'no_such_module'"),
    ],
)
def test_an_adapter_that_cannot_be_imported(name: str, expected: str) -> None:
    with pytest.raises(UserError, match=expected) as error:
        detect_format(["q"], [], {}, name, "f")
    assert error.value.field == "data.format"


def test_deep_nesting_is_a_bad_row() -> None:
    deep: Any = []
    for _ in range(5000):
        deep = [deep]
    assert bad(CONVERSATIONAL | {"prompt": deep}) == "malformed_row"
