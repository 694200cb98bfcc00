"""Raw rows -> pairs, on rows of the shapes that TRL's vision datasets have."""

from __future__ import annotations

from typing import Any

import pytest

from orpo_ray.data.formats import recognise, to_pair
from orpo_ray.errors import BadRow, UserError

TEXT = {"type": "text", "text": "what is it?"}
IMAGE = {"type": "image"}


def pair_of(row: dict[str, Any]) -> Any:
    return to_pair(row, "trl", {}, "file:1")


def bad(row: dict[str, Any]) -> str:
    with pytest.raises(BadRow) as error:
        pair_of(row)
    return error.value.reason


# The shape of HuggingFaceH4/rlaif-v_formatted.
CONVERSATIONAL = {
    "images": [{"bytes": b"png", "path": "a.png"}],
    "prompt": [{"role": "user", "content": [{"type": "image", "text": None}, TEXT]}],
    "chosen": [{"role": "assistant", "content": [{"type": "text", "text": "a cat"}]}],
    "rejected": [{"role": "assistant", "content": [{"type": "text", "text": "a dog"}]}],
}


def test_conversational() -> None:
    pair = pair_of(CONVERSATIONAL)
    assert pair.prompt == [{"role": "user", "content": [IMAGE, TEXT]}]
    assert (pair.chosen, pair.rejected, pair.id) == ("a cat", "a dog", "file:1")
    assert pair.images == [{"bytes": b"png", "path": None}]


def test_strings_put_images_before_the_first_user_text() -> None:
    pair = pair_of({"id": 7, "image": "a.png", "prompt": "what is it?", "chosen": "x", "rejected": "y"})
    assert pair.prompt == [{"role": "user", "content": [IMAGE, TEXT]}]
    assert pair.id == "7"
    assert pair.images == [{"bytes": None, "path": "a.png"}]


def test_images_go_to_the_first_user_turn_not_to_the_system_prompt() -> None:
    prompt = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "what is it?"}]
    pair = pair_of({"images": [b"1", b"2"], "prompt": prompt, "chosen": "x", "rejected": "y"})
    assert [len(turn["content"]) for turn in pair.prompt] == [1, 3]
    assert pair.prompt[1]["content"] == [IMAGE, IMAGE, TEXT]


def test_text_only() -> None:
    assert pair_of({"prompt": "hi", "chosen": "x", "rejected": "y"}).images == []


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"chosen": ""}, "empty_response"),
        ({"rejected": " \n"}, "empty_response"),
        ({"rejected": []}, "empty_response"),
        ({"rejected": CONVERSATIONAL["chosen"]}, "identical_responses"),
        ({"images": []}, "image_count_mismatch"),
        ({"images": [b"1", b"2"]}, "image_count_mismatch"),
        ({"images": [None]}, "missing_image"),
        ({"images": [3]}, "malformed_row"),
        ({"prompt": None}, "malformed_row"),
        ({"prompt": ""}, "empty_prompt"),
        ({"prompt": [{"role": "user"}]}, "malformed_row"),
        ({"prompt": [{"role": "user", "content": [{"type": "video"}]}]}, "malformed_row"),
        ({"chosen": [{"role": "user", "content": "x"}]}, "malformed_row"),
        ({"chosen": [{"role": "assistant", "content": [IMAGE]}]}, "malformed_row"),
        ({"chosen": 5}, "malformed_row"),
    ],
)
def test_each_defect_has_its_reason(change: dict[str, Any], reason: str) -> None:
    assert bad(CONVERSATIONAL | change) == reason


def test_renamed_columns() -> None:
    renames = {"chosen": "good", "rejected": "poor", "prompt": "q"}
    assert recognise(["q", "good", "poor"], renames, "auto", "f") == "trl"
    pair = to_pair({"q": "hi", "good": "x", "poor": "y"}, "trl", renames, "f:1")
    assert (pair.chosen, pair.rejected) == ("x", "y")


def test_a_rename_puts_the_column_of_that_name_out_of_place_whatever_their_order() -> None:
    renames = {"chosen": "good"}
    for row in ({"good": "x", "chosen": "other"}, {"chosen": "other", "good": "x"}):
        assert to_pair({"prompt": "hi", "rejected": "y"} | row, "trl", renames, "f:1").chosen == "x"
    both = to_pair({"q": "hi", "rejected": "y"}, "trl", {"prompt": "q", "chosen": "q"}, "f:1")
    assert (both.prompt[0]["content"][0]["text"], both.chosen) == ("hi", "hi")


@pytest.mark.parametrize(("renames", "said"), [({"images": "nope"}, "no column 'nope'"), ({"imgs": "a"}, "'imgs'")])
def test_a_rename_that_matches_nothing_is_refused(renames: dict[str, str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        recognise(["prompt", "chosen", "rejected", "a"], renames, "auto", "f")


@pytest.mark.parametrize("field", ["id", "prompt", "chosen", "image"])
def test_half_a_character_is_a_bad_row(field: str) -> None:
    row = {"id": "1", "prompt": "p", "chosen": "x", "rejected": "y", "image": "a.png"}
    assert bad(row | {field: "\ud83d"}) == "malformed_row"


def test_an_empty_list_of_images_beside_an_image() -> None:
    assert len(pair_of({"images": [], "image": "a.png", "prompt": "p", "chosen": "x", "rejected": "y"}).images) == 1


def test_an_unknown_layout_names_what_is_missing() -> None:
    with pytest.raises(UserError, match=r"lack the column\(s\) prompt, rejected; they have: answer, chosen"):
        recognise(["chosen", "answer"], {}, "auto", "file.jsonl")
