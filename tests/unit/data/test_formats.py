"""Raw rows become pairs; the rows have the columns of real data sets."""

from __future__ import annotations

import base64
import copy
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orpo_ray.config.schema import FORMATS
from orpo_ray.data import formats
from orpo_ray.data.formats import detect_format, to_pair
from orpo_ray.data.pairs import PreferencePair, extract_prompt
from orpo_ray.data.row_adapter import load_adapter
from orpo_ray.errors import RowError, UserError

TEXT = {"type": "text", "text": "what is it?"}
IMAGE = {"type": "image"}
A_PNG = {"bytes": None, "path": "a.png"}
B_PNG = {"bytes": None, "path": "b.png"}


def pair_of(row: dict[str, Any], format_name: str = "trl") -> PreferencePair:
    return to_pair(row, format_name, {}, "file:1")


def bad(row: dict[str, Any], format_name: str = "trl") -> str:
    with pytest.raises(RowError) as error:
        pair_of(row, format_name)
    return error.value.reason


def recognised(*rows: dict[str, Any], requested: str = "auto") -> str:
    return detect_format(dict.fromkeys(name for row in rows for name in row), rows, {}, requested, "file.jsonl")


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def turn(role: str, *parts: Any) -> dict[str, Any]:
    return {"role": role, "content": [text(part) if isinstance(part, str) else part for part in parts]}


def message(role: str, words: str) -> dict[str, str]:
    return {"role": role, "content": words}


def rated(**ratings: Any) -> dict[str, Any]:
    return {aspect: {"Rating": rating, "Rationale": "because"} for aspect, rating in ratings.items()}


# As in HuggingFaceH4/rlaif-v_formatted.
CONVERSATIONAL = {
    "images": [{"bytes": b"png", "path": "a.png"}],
    "prompt": [{"role": "user", "content": [{"type": "image", "text": None}, TEXT]}],
    "chosen": [{"role": "assistant", "content": [{"type": "text", "text": "a cat"}]}],
    "rejected": [{"role": "assistant", "content": [{"type": "text", "text": "a dog"}]}],
}
PLAIN = {"image": "a.png", "prompt": "<image>\nwhat is it?", "chosen": "a cat", "rejected": "a dog"}
SHAREGPT = {
    "conversations": [
        {"from": "human", "value": "<image>what is it?"},
        {"from": "gpt", "value": "an animal"},
        {"from": "human", "value": "and in <image>?"},
    ],
    "chosen": {"from": "gpt", "value": "a cat"},
    "rejected": {"from": "gpt", "value": "a dog"},
    "images": ["a.png", "b.png"],
    "system": "be brief",
}
ALPACA = {
    "instruction": "what is it?",
    "input": "look at <image>",
    "chosen": "a cat",
    "rejected": "a dog",
    "images": ["a.png"],
    "system": "be brief",
    "history": [["hi", "hello"]],
}
SWIFT = {
    "messages": [message("system", "be brief"), message("user", "<image>what is it?"), message("assistant", "a cat")],
    "rejected_response": "a dog",
    "images": ["a.png"],
}
RLAIF_V = {
    "ds_name": "RLAIF-V",
    "image": {"bytes": b"png", "path": None},
    "question": "what is it?",
    "chosen": "a cat",
    "rejected": "a dog",
    "origin_dataset": "VQAv2",
    "origin_split": '{"model": "llava", "type": "question_answering"}',
    "idx": 7,
    "image_path": "rlaif/7.jpg",
}
RLHF_V = {
    "ds_name": "RLHF-V",
    "image": {"bytes": b"png", "path": None},
    "text": json.dumps({"question": "what is it?", "chosen": "a cat", "rejected": "a dog"}),
    "origin_dataset": "COCO",
    "origin_split": "{}",
    "idx": 8,
    "image_path": "rlhf/8.jpg",
}
VLFEEDBACK = {
    "id": "v-9",
    "prompt": "what is it?",
    "models": ["llava", "qwen", "gpt", "blip"],
    "img_path": "a.png",
    "completions": {
        "annotations": [
            rated(Helpfulness="3", **{"Ethical Considerations": "5", "Visual Faithfulness": "4"}),
            rated(Helpfulness="5", **{"Ethical Considerations": "N/A", "Visual Faithfulness": "5"}),
            rated(Helpfulness="1", **{"Ethical Considerations": "5", "Visual Faithfulness": "1"}),
            rated(Helpfulness="5", **{"Ethical Considerations": "5", "Visual Faithfulness": "5"}),
        ],
        "model": ["llava", "qwen", "gpt", "blip"],
        "response": ["an animal", "a cat", "a dog", "a kitten"],
    },
}
MMPR = {
    "image": ["a.png", "b.png"],
    "question": "Image-1: <image>\nImage-2: <image>\nwhich?",
    "chosen": "a cat",
    "rejected": "a dog",
}
NEMO_RL = {
    "context": [message("system", "be brief"), message("user", "what is it?")],
    "completions": [
        {"rank": 1, "completion": [message("assistant", "an animal")]},
        {"rank": 2, "completion": [message("assistant", "a dog")]},
        {"rank": 0, "completion": [message("assistant", "a cat")]},
    ],
    "image": "a.png",
}
ROWS: dict[str, dict[str, Any]] = {
    "trl": CONVERSATIONAL,
    "plain": PLAIN,
    "sharegpt": SHAREGPT,
    "alpaca": ALPACA,
    "swift": SWIFT,
    "rlaif-v": RLAIF_V,
    "rlhf-v": RLHF_V,
    "vlfeedback": VLFEEDBACK,
    "mmpr": MMPR,
    "nemo-rl": NEMO_RL,
}


def test_every_format_has_a_reader_and_a_row_here() -> None:
    assert sorted(formats._FORMATS) == sorted(FORMATS) == sorted(ROWS)


@pytest.mark.parametrize("name", FORMATS)
def test_each_format_is_detected_and_gives_the_same_answers(name: str) -> None:
    assert recognised(ROWS[name]) == recognised(ROWS[name], requested=name) == name
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
        ({"prompt": [{"role": "user", "content": [{"type": "video"}]}]}, "malformed_row"),
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
    assert recognised(row) == recognised(row | {"score": 3}) == recognised(row, requested="trl") == "trl"
    pair = pair_of(row | {"images": ["a.png"]})
    assert pair.prompt == [turn("user", IMAGE, "hi"), turn("assistant", "hello"), turn("user", "what is it?")]
    assert (pair.chosen, pair.rejected) == ("x", "y")
    # As in HuggingFaceH4/ultrafeedback_binarized.
    assert pair_of(row | {"prompt": "what is it?"}).prompt == pair_of(row).prompt
    # As in Anthropic/hh-rlhf.
    strings = {"chosen": "\n\nHuman: hi\n\nAssistant: hello", "rejected": "\n\nHuman: hi\n\nAssistant: no"}
    assert recognised(strings) == "trl"
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
    assert recognised(without_images) == recognised(CONVERSATIONAL | {"image": "a.png"}) == "trl"
    assert recognised(PLAIN | {"image": None, "prompt": None}, PLAIN) == "plain"


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
    assert recognised(bare) == "alpaca"
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
    assert recognised(row) == "swift"
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
        recognised(row, requested=requested)


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


WORDS = st.sampled_from(["", " ", "x", "<image>", "\ud83d", "data:,", "user", "image", '{"question": "x"}']) | st.text()
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | WORDS | st.binary(max_size=4)
KEYS = st.sampled_from(["role", "content", "from", "value", "type", "text", "image", "bytes", "path", "rank", "Rating"])
JSON_LIKE = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS | WORDS, inner, max_size=3), max_leaves=8
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the path of every value in a row, at any depth."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, inner in items for place in places(inner, (*path, key)))]


@st.composite
def broken_rows(draw: st.DrawFn, name: str) -> dict[str, Any]:
    """A valid row with arbitrary values in up to three places, or in all columns."""
    columns = [column for column in formats._columns_of(name) if draw(st.booleans())]
    if draw(st.booleans()):
        return {column: draw(JSON_LIKE) for column in columns}
    row = copy.deepcopy(ROWS[name])
    for _ in range(draw(st.integers(1, 3))):
        *above, last = draw(st.sampled_from(places(row)[1:] or [("id",)]))
        inner = row
        for key in above:
            inner = inner[key]
        inner[last] = draw(JSON_LIKE)
    return row


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_row_is_a_pair_or_a_bad_row(name: str, data: st.DataObject) -> None:
    row = data.draw(broken_rows(name))
    try:
        pair = pair_of(row, name)
    except RowError:
        return
    parts = [part for message in pair.prompt for part in message["content"]]
    assert sum(part == IMAGE for part in parts) == len(pair.images)
    assert all(isinstance(part["text"], str) for part in parts if part != IMAGE)
    assert pair.chosen.strip()
    assert pair.rejected.strip()
    assert pair.chosen != pair.rejected or pair.rejected_images
    json.dumps([pair.prompt, pair.chosen, pair.rejected], ensure_ascii=False).encode()
