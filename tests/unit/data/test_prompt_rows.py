"""Rows with an image, a prompt and perhaps an answer."""

from __future__ import annotations

from typing import Any

import pytest

from orpo_ray.data.prompt_rows import PromptRow, detect_prompt_format, to_prompt_row
from orpo_ray.errors import RowError, UserError
from orpo_ray.tiny_models.easy_vqa import easy_vqa_rows

IMAGE = b"not decoded here"
CONTENT = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
USER = [{"role": "user", "content": CONTENT}]
ANSWERED = [{"role": "user", "content": CONTENT}, {"role": "assistant", "content": "A cat."}]
ROWS: dict[str, dict[str, Any]] = {
    "prompt": {"image": IMAGE, "prompt": "What is it?", "answer": "A cat."},
    "question": {"image": IMAGE, "question": "What is it?", "answer": "A cat."},
    "messages": {"images": [IMAGE], "messages": ANSWERED},
    "conversations": {
        "image": IMAGE,
        "conversations": [{"from": "human", "value": "<image>What is it?"}, {"from": "gpt", "value": "A cat."}],
    },
    "instruction": {"images": [IMAGE], "instruction": "What is it?", "input": "", "output": "A cat."},
}


def read(row: dict[str, Any], requested: str = "auto", **renames: str) -> PromptRow:
    return to_prompt_row(row, detect_prompt_format(row, [row], renames, requested, "f"), renames, "f:1")


@pytest.mark.parametrize("name", ROWS)
def test_each_layout_is_detected_and_read(name: str) -> None:
    row = ROWS[name]
    assert detect_prompt_format(row, [row], {}, "auto", "f") == name
    found = read(row)
    assert found == read(row, name) == PromptRow("f:1", [{"bytes": IMAGE, "path": None}], USER, "A cat.", "f:1")


@pytest.mark.parametrize("name", ROWS)
def test_an_answer_may_be_missing(name: str) -> None:
    row = {key: value for key, value in ROWS[name].items() if key not in ("answer", "output")}
    if name in ("messages", "conversations"):
        row[name] = row[name][:-1]
    assert read(row).answer is None
    assert read(row).prompt == USER


def test_a_row_of_pairs_gives_its_chosen_answer() -> None:
    row = easy_vqa_rows("train")[0]
    assert detect_prompt_format(row, [row], {}, "auto", "f") == "pair:trl"
    found = read(row)
    assert (found.id, found.answer, found.prompt) == (row["id"], row["chosen"], row["prompt"])
    assert read({"ask": "?", **ROWS["prompt"], "prompt": None, "id": 3}, prompt="ask").prompt[0]["role"] == "user"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"image": IMAGE, "question": " "}, "empty_prompt"),
        ({"image": IMAGE, "question": 3}, "malformed_row"),
        ({"images": [IMAGE] * 3, "question": "<image><image> ?"}, "image_count_mismatch"),
        ({"messages": [{"role": "assistant", "content": "A cat."}]}, "empty_prompt"),
        ({"messages": []}, "malformed_row"),
        ({"image": IMAGE, "prompt": "\ud800?"}, "malformed_row"),
        ({"image": IMAGE, "prompt": "?", "answer": "\ud800"}, "malformed_row"),
        ({"image": IMAGE, "prompt": "?", "tools": "[1]"}, "unread_column"),
        ({"prompt": "?", "videos": ["a.mp4"]}, "unsupported_media"),
        ({"prompt": "?", "chosen": "a", "rejected": "b", "videos": [["1.png"]]}, "unsupported_media"),
        (
            {"messages": [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "?"}]}]},
            "unsupported_media",
        ),
    ],
)
def test_rows_that_cannot_be_used(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(RowError) as found:
        read(row)
    assert found.value.reason == reason


def test_wrong_requests_are_one_message() -> None:
    with pytest.raises(UserError, match=r"lack a column of format messages: messages; the columns are: image, prompt"):
        detect_prompt_format(["image", "prompt"], [], {}, "messages", "f")
    with pytest.raises(UserError, match="unknown row format; the columns are: image, text"):
        detect_prompt_format(["image", "text"], [{"image": IMAGE, "text": "x"}], {}, "auto", "f")
    with pytest.raises(UserError, match=r"synthesize\.columns\.prompt: no column 'ask'"):
        detect_prompt_format(["image"], [], {"prompt": "ask"}, "prompt", "f")
    with pytest.raises(UserError, match="lack columns of format plain: chosen, rejected"):
        detect_prompt_format(["image", "prompt"], [], {}, "plain", "f")


def test_an_adapter_returns_any_of_the_layouts(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "prompt_adapter.py").write_text(
        "def to_row(row):\n    return {'image': row['i'], 'question': row['q']} if row['q'] else {'x': 1}\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    found = read({"i": IMAGE, "q": "What?", "id": 7}, "prompt_adapter:to_row")
    assert (found.id, found.prompt[0]["content"][1]["text"]) == ("7", "What?")
    with pytest.raises(RowError, match="adapter_failed"):
        read({"i": IMAGE, "q": ""}, "prompt_adapter:to_row")
