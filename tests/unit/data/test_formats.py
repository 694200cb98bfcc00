"""Rows of each format become pairs or bad rows."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest

from orpo_ray.config.field_types import FORMATS
from orpo_ray.data import formats
from orpo_ray.data.row_values import extract_prompt
from support.format_rows import (
    A_PNG,
    ALPACA,
    B_PNG,
    CONVERSATIONAL,
    IMAGE,
    MMPR,
    NEMO_RL,
    PLAIN,
    RLAIF_V,
    RLHF_V,
    ROWS,
    SHAREGPT,
    SWIFT,
    TEXT,
    VLFEEDBACK,
    bad,
    detected,
    message,
    pair_of,
    rated,
    turn,
)


def test_every_format_has_a_reader_and_a_row_here() -> None:
    assert sorted(formats._FORMATS) == sorted(FORMATS) == sorted(ROWS)


@pytest.mark.parametrize("name", FORMATS)
def test_each_format_is_detected_and_gives_the_same_answers(name: str) -> None:
    assert detected(ROWS[name]) == detected(ROWS[name], requested=name) == name
    pair = pair_of(ROWS[name], name)
    assert (pair.chosen, pair.rejected, pair.rejected_images) == ("a cat", "a dog", None)


def test_conversational() -> None:
    pair = pair_of(CONVERSATIONAL)
    assert pair.prompt == [{"role": "user", "content": [IMAGE, TEXT]}]
    assert (pair.chosen, pair.rejected, pair.id) == ("a cat", "a dog", "file:1")
    assert pair.images == [{"bytes": b"png", "path": None}]


def test_strings_put_images_before_the_first_user_text() -> None:
    pair = pair_of({"id": 7, "image": "a.png", "prompt": "what is it?", "chosen": "x", "rejected": "y"})
    assert pair.prompt == [{"role": "user", "content": [IMAGE, TEXT]}]
    assert pair.id == "7"
    assert pair.images == [A_PNG]


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
        ({"images": None, "image": 0}, "malformed_row"),
        ({"videos": ["a.mp4"]}, "unsupported_media"),
        ({"prompt": None}, "malformed_row"),
        ({"prompt": ""}, "empty_prompt"),
        ({"prompt": []}, "malformed_row"),
        ({"prompt": [message("system", "be brief")]}, "empty_prompt"),
        ({"prompt": [message("user", "hi"), message("assistant", "hello"), message("user", " ")]}, "empty_prompt"),
        ({"prompt": [{"role": "user"}]}, "malformed_row"),
        ({"prompt": [{"role": 5, "content": "hi"}]}, "malformed_row"),
        ({"images": [], "prompt": [{"role": "user", "content": [{"type": "video"}]}]}, "video_count_mismatch"),
        ({"prompt": [{"role": "user", "content": [{"type": "audio"}]}]}, "malformed_row"),
        ({"prompt": [message("assistant", "hi")]}, "malformed_row"),
        ({"chosen": [{"role": "user", "content": "x"}]}, "malformed_row"),
        ({"chosen": [{"role": "assistant", "content": [IMAGE]}]}, "malformed_row"),
        ({"chosen": 5}, "malformed_row"),
    ],
)
def test_each_defect_has_its_reason(change: dict[str, Any], reason: str) -> None:
    assert bad(CONVERSATIONAL | change) == reason


def test_prompts_with_several_turns() -> None:
    turns = [message("user", "hi"), message("assistant", "hello"), message("user", "what is it?")]
    pair = pair_of({"prompt": turns, "chosen": "x", "rejected": "y", "image": "a.png"})
    assert pair.prompt == [turn("user", IMAGE, "hi"), turn("assistant", "hello"), turn("user", "what is it?")]


DIALOGUE = [message("user", "hi"), message("assistant", "hello"), message("user", "what is it?")]


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [
        ([*DIALOGUE, message("assistant", "x")], [*DIALOGUE, message("assistant", "y")]),
        ([*DIALOGUE, message("assistant", "x")], [*DIALOGUE[:2], message("user", "and now?")]),
        ([*DIALOGUE, message("assistant", "x")], [*DIALOGUE, message("assistant", "x")]),
        (DIALOGUE, [*DIALOGUE, message("assistant", "x")]),
        ("\n\nHuman: hi\n\nAssistant: hello", "\n\nHuman: hi\n\nAssistant: no"),
        ("Q: hi A: yes", "Q: hi A: no"),
        ("Q: hi A: yes", "Q: hi A: yes, so"),
        ("Q: hi A: yes", "Q: hi A: yes"),
    ],
)
def test_implicit_prompts_are_split_as_in_trl(chosen: Any, rejected: Any) -> None:
    from trl.data_utils import extract_prompt as trl_extract_prompt

    prompt, ours, theirs = extract_prompt(chosen, rejected)
    assert {"prompt": prompt, "chosen": ours, "rejected": theirs} == trl_extract_prompt(
        {"chosen": chosen, "rejected": rejected}
    )


def test_implicit_rows() -> None:
    row = {"chosen": [*DIALOGUE, message("assistant", "x")], "rejected": [*DIALOGUE, message("assistant", "y")]}
    assert detected(row) == detected(row | {"score": 3}) == detected(row, requested="trl") == "trl"
    pair = pair_of(row | {"images": ["a.png"]})
    assert pair.prompt == [turn("user", IMAGE, "hi"), turn("assistant", "hello"), turn("user", "what is it?")]
    assert (pair.chosen, pair.rejected) == ("x", "y")
    # As in HuggingFaceH4/ultrafeedback_binarized.
    assert pair_of(row | {"prompt": "what is it?"}).prompt == pair_of(row).prompt
    # As in Anthropic/hh-rlhf.
    strings = {"chosen": "\n\nHuman: hi\n\nAssistant: hello", "rejected": "\n\nHuman: hi\n\nAssistant: no"}
    assert detected(strings) == "trl"
    assert pair_of(strings).prompt == [turn("user", "\n\nHuman: hi\n\nAssistant:")]
    assert bad({"chosen": "x", "rejected": "y"}) == "empty_prompt"
    assert bad({"chosen": "", "rejected": "y"}) == "empty_response"
    assert bad({"chosen": "x", "rejected": ["y"]}) == "malformed_row"


def test_images_inside_message_parts() -> None:
    parts = [
        {"type": "image", "image": b"1", "text": None},
        {"type": "image", "image": {"bytes": None, "path": "a.png"}},
        {"type": "image_url", "image_url": {"url": "https://host/b.png"}},
        {"type": "image_url", "image_url": "data:image/png;base64," + base64.b64encode(b"2").decode()},
        TEXT,
    ]
    row = {"prompt": [{"role": "user", "content": parts}], "chosen": "x", "rejected": "y"}
    pair = pair_of(row)
    assert pair.prompt == [turn("user", IMAGE, IMAGE, IMAGE, IMAGE, TEXT)]
    assert [image["bytes"] for image in pair.images] == [b"1", None, None, b"2"]
    assert [image["path"] for image in pair.images] == [None, "a.png", "https://host/b.png", None]
    own = pair_of(row | {"images": ["1.png", "2.png", "3.png", "4.png"]})
    assert [image["path"] for image in own.images] == ["1.png", "2.png", "3.png", "4.png"]
    parts.append(IMAGE)
    assert bad(row) == "image_count_mismatch"
    parts[-1] = {"type": "image_url"}
    assert bad(row) == "missing_image"


@pytest.mark.parametrize(
    ("given", "found"),
    [
        (b"png", {"bytes": b"png", "path": None}),
        ({"bytes": b"png", "path": "a.png"}, {"bytes": b"png", "path": None}),
        ({"bytes": None, "path": "a.png"}, A_PNG),
        ("data:image/png;base64,cG5n", {"bytes": b"png", "path": None}),
        ({"path": "DATA:image/png;charset=x;BASE64,cG\n5n"}, {"bytes": b"png", "path": None}),
        ("file:///tmp/a.png", {"bytes": None, "path": "file:///tmp/a.png"}),
        ("https://host/a.png", {"bytes": None, "path": "https://host/a.png"}),
    ],
)
def test_ways_to_give_an_image(given: Any, found: dict[str, Any]) -> None:
    assert pair_of(PLAIN | {"image": given}, "plain").images == [found]


@pytest.mark.parametrize("uri", ["data:image/png;base64,cG5", "data:image/png;base64,é", "data:image/png,x", "data:"])
def test_invalid_data_uris(uri: str) -> None:
    assert bad(PLAIN | {"image": uri}, "plain") == "unreadable_image"


@pytest.mark.parametrize("nothing", [None, "", [], {"bytes": None, "path": None}])
@pytest.mark.parametrize("name", ["trl", "plain", "mmpr"])
def test_text_only_rows(name: str, nothing: Any) -> None:
    row = {"image": nothing, "prompt": "hi", "question": "hi", "chosen": "x", "rejected": "y"}
    assert pair_of(row, name).images == []


def test_an_empty_images_column_with_an_image_column() -> None:
    assert len(pair_of({"images": [], "image": "a.png", "prompt": "p", "chosen": "x", "rejected": "y"}).images) == 1


def test_plain() -> None:
    pair = pair_of(PLAIN, "plain")
    assert (pair.prompt, pair.images) == ([turn("user", IMAGE, "\nwhat is it?")], [A_PNG])
    assert pair_of(PLAIN | {"prompt": "what is it?"}, "plain").prompt == [turn("user", IMAGE, "what is it?")]
    two = pair_of(PLAIN | {"prompt": "<image> or <image>", "image": None, "images": ["a.png", "b.png"]}, "plain")
    assert two.prompt == [turn("user", IMAGE, " or ", IMAGE)]
    assert bad(PLAIN | {"image": ["a.png", "b.png"]}, "plain") == "image_count_mismatch"
    assert bad(PLAIN | {"image": None}, "plain") == "image_count_mismatch"
    assert bad(PLAIN | {"prompt": [message("user", "hi")]}, "plain") == "malformed_row"


def test_image_marks_in_plain_and_trl() -> None:
    assert pair_of(PLAIN, "trl").prompt == [turn("user", IMAGE, "<image>\nwhat is it?")]
    without_images = {name: value for name, value in PLAIN.items() if name != "image"}
    assert detected(without_images) == detected(CONVERSATIONAL | {"image": "a.png"}) == "trl"
    assert detected(PLAIN | {"image": None, "prompt": None}, PLAIN) == "plain"


def test_sharegpt() -> None:
    pair = pair_of(SHAREGPT, "sharegpt")
    assert pair.prompt == [
        turn("system", "be brief"),
        turn("user", IMAGE, "what is it?"),
        turn("assistant", "an animal"),
        turn("user", "and in ", IMAGE, "?"),
    ]
    assert pair.images == [A_PNG, B_PNG]
    openai = [message("system", "be exact"), message("user", "which?")]
    row = SHAREGPT | {"conversations": openai, "chosen": message("assistant", "a cat")}
    assert pair_of(row, "sharegpt").prompt == [turn("system", "be exact"), turn("user", IMAGE, IMAGE, "which?")]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"images": ["a.png"]}, "image_count_mismatch"),
        ({"conversations": SHAREGPT["conversations"][:2]}, "malformed_row"),
        ({"conversations": [{"from": "observation", "value": "{}"}]}, "malformed_row"),
        ({"conversations": [{"from": "human", "value": ""}], "images": []}, "empty_prompt"),
        ({"chosen": {"from": "human", "value": "a cat"}}, "malformed_row"),
        ({"chosen": {"from": "gpt", "value": "<image>"}}, "placeholder_in_text"),
        ({"system": 3}, "malformed_row"),
    ],
)
def test_each_defect_of_sharegpt_has_its_reason(change: dict[str, Any], reason: str) -> None:
    assert bad(SHAREGPT | change, "sharegpt") == reason


def test_alpaca() -> None:
    pair = pair_of(ALPACA, "alpaca")
    assert pair.prompt == [
        turn("system", "be brief"),
        turn("user", "hi"),
        turn("assistant", "hello"),
        turn("user", "what is it?\nlook at ", IMAGE),
    ]
    bare = {name: ALPACA[name] for name in ("instruction", "chosen", "rejected")}
    assert detected(bare) == "alpaca"
    assert pair_of(bare | {"input": "", "system": "", "history": None}, "alpaca").prompt == [turn("user", TEXT)]
    assert bad(bare | {"instruction": "", "history": [["hi", "hello"]]}, "alpaca") == "empty_prompt"
    assert bad(bare | {"history": [["hi"]]}, "alpaca") == "malformed_row"


def test_swift() -> None:
    pair = pair_of(SWIFT, "swift")
    assert pair.prompt == [turn("system", "be brief"), turn("user", IMAGE, "what is it?")]
    assert pair.images == [A_PNG]
    assert pair_of(SWIFT | {"images": "a.png", "rejected_response": [message("assistant", "a dog")]}, "swift") == pair
    other = [*SWIFT["messages"][:-1], message("assistant", "a dog")]
    assert pair_of(SWIFT | {"rejected_response": None, "rejected_messages": other}, "swift") == pair
    with_column = SWIFT | {"messages": SWIFT["messages"][1:], "system": "be brief"}
    assert pair_of(with_column, "swift") == pair


def test_swift_rows_whose_rejected_side_has_other_images() -> None:
    row = {"messages": SWIFT["messages"], "images": ["a.png"], "rejected_images": ["b.png"]}
    assert detected(row) == "swift"
    pair = pair_of(row, "swift")
    assert (pair.images, pair.rejected_images, pair.chosen, pair.rejected) == ([A_PNG], [B_PNG], "a cat", "a cat")
    assert pair_of(row | {"rejected_response": "a dog"}, "swift").rejected_images == [B_PNG]
    same = row | {"rejected_images": {"path": "a.png"}}
    assert bad(same, "swift") == "identical_responses"
    assert pair_of(same | {"rejected_response": "a dog"}, "swift").rejected_images is None
    assert bad(row | {"rejected_images": ["b.png", "c.png"]}, "swift") == "image_count_mismatch"
    assert bad(row | {"rejected_images": None}, "swift") == "malformed_row"
    other = [message("user", "<image>what?"), message("assistant", "a dog")]
    assert bad(row | {"rejected_messages": other}, "swift") == "malformed_row"
    assert bad(row | {"messages": SWIFT["messages"][:-1]}, "swift") == "malformed_row"


def test_rlaif_v_and_rlhf_v() -> None:
    for row, name, row_id in ((RLAIF_V, "rlaif-v", "7"), (RLHF_V, "rlhf-v", "8")):
        pair = pair_of(row, name)
        assert (pair.id, pair.prompt, pair.images[0]["bytes"]) == (row_id, [turn("user", IMAGE, TEXT)], b"png")
    for broken in ("what is it?", "[1]", "{}", None, 3):
        assert bad(RLHF_V | {"text": broken}, "rlhf-v") == "malformed_row"
    assert pair_of(RLHF_V | {"text": json.loads(str(RLHF_V["text"]))}, "rlhf-v").chosen == "a cat"


def test_mmpr() -> None:
    pair = pair_of(MMPR, "mmpr")
    assert pair.prompt == [turn("user", "Image-1: ", IMAGE, "\nImage-2: ", IMAGE, "\nwhich?")]
    assert pair.images == [A_PNG, B_PNG]
    assert pair_of(MMPR | {"image": "a.png", "question": "which?"}, "mmpr").prompt == [turn("user", IMAGE, "which?")]
    assert bad(MMPR | {"image": "a.png"}, "mmpr") == "image_count_mismatch"


def test_vlfeedback_takes_the_first_best_and_the_first_worst_by_mean_rating() -> None:
    pair = pair_of(VLFEEDBACK, "vlfeedback")
    assert (pair.id, pair.prompt, pair.images) == ("v-9", [turn("user", IMAGE, TEXT)], [A_PNG])
    columns = VLFEEDBACK["completions"]
    records = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    assert pair_of(VLFEEDBACK | {"completions": records}, "vlfeedback") == pair
    aspects = {name: [one[name] for one in columns["annotations"]] for name in columns["annotations"][0]}
    assert pair_of(VLFEEDBACK | {"completions": columns | {"annotations": aspects}}, "vlfeedback") == pair
    flat = {name: {"Rating": [one["Rating"] for one in ones]} for name, ones in aspects.items()}
    assert pair_of(VLFEEDBACK | {"completions": columns | {"annotations": flat}}, "vlfeedback") == pair
    with_bytes = pair_of(VLFEEDBACK | {"image": {"bytes": b"png", "path": None}}, "vlfeedback")
    assert with_bytes.images == [{"bytes": b"png", "path": None}]


@pytest.mark.parametrize(
    ("ratings", "reason"),
    [
        (["5", "N/A", None, "nan"], "no_preference"),
        (["4", 4, "4.0", "N/A"], "no_preference"),
        (["5", "1", "3"], "malformed_row"),
    ],
)
def test_vlfeedback_rows_without_a_preference(ratings: list[Any], reason: str) -> None:
    annotations = [rated(Helpfulness=rating) for rating in ratings]
    completions = VLFEEDBACK["completions"] | {"annotations": annotations}
    assert bad(VLFEEDBACK | {"completions": completions}, "vlfeedback") == reason


def test_nemo_rl() -> None:
    pair = pair_of(NEMO_RL, "nemo-rl")
    assert pair.prompt == [turn("system", "be brief"), turn("user", IMAGE, "what is it?")]
    own = [{"role": "user", "content": [{"type": "image", "image": "b.png"}, TEXT]}]
    assert pair_of(NEMO_RL | {"image": None, "context": own}, "nemo-rl").images == [B_PNG]
    same = [{"rank": 1, "completion": "a cat"}, {"rank": 1, "completion": "a dog"}]
    assert bad(NEMO_RL | {"completions": same}, "nemo-rl") == "no_preference"
    for rank in (None, "first", float("nan"), True):
        unranked = [{"rank": rank, "completion": "a cat"}, same[1]]
        assert bad(NEMO_RL | {"completions": unranked}, "nemo-rl") == "malformed_row"


@pytest.mark.parametrize("format_name", ["swift", "sharegpt", "alpaca", "trl", "llamafactory-v1"])
def test_columns_that_change_the_meaning_and_are_not_read_make_a_bad_row(format_name: str) -> None:
    tools = json.dumps([{"name": "search"}])
    assert bad(ROWS[format_name] | {"tools": tools}, format_name) == "unread_column"
    for empty in (None, "", "[]", []):
        assert pair_of(ROWS[format_name] | {"tools": empty}, format_name) == pair_of(ROWS[format_name], format_name)
    for media in ("videos", "audios"):
        assert bad(ROWS[format_name] | {media: ["a.mp4"]}, format_name) == "unsupported_media"


def test_boxes_of_ms_swift_are_not_dropped_without_a_word() -> None:
    boxes = {"ref": ["a cat"], "bbox": [[1, 2, 3, 4]]}
    assert bad(ROWS["swift"] | {"objects": boxes}, "swift") == "unread_column"
    assert pair_of(ROWS["plain"] | {"objects": boxes}, "plain").chosen == "a cat"  # another dataset's own annotation


def test_llamafactory_v1_is_recognized_and_read() -> None:
    row = ROWS["llamafactory-v1"]
    assert detected(row) == "llamafactory-v1"
    pair = pair_of(row, "llamafactory-v1")
    assert (pair.chosen, pair.rejected, pair.images) == ("a cat", "a dog", [{"bytes": None, "path": "a.png"}])
    assert pair.prompt == [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it?"}]}]
    other = [{"role": "user", "content": [{"type": "text", "value": "else?"}]}, row["rejected_messages"][1]]
    assert bad(row | {"rejected_messages": other}, "llamafactory-v1") == "malformed_row"
    assert bad(row | {"rejected_messages": "x"}, "llamafactory-v1") == "malformed_row"
