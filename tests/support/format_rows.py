"""Rows of all formats, with the columns of real datasets, and functions to convert them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from orpo_ray.data.formats import detect_format, to_pair
from orpo_ray.data.pairs import PreferencePair
from orpo_ray.errors import RowError

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


def detected(*rows: dict[str, Any], requested: str = "auto") -> str:
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
LLAMAFACTORY_V1 = {
    "images": ["a.png"],
    "chosen_messages": [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "value": "what is it?"}], "loss_weight": 0.0},
        {"role": "assistant", "content": [{"type": "text", "value": "a cat"}], "loss_weight": 1.0},
    ],
    "rejected_messages": [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "value": "what is it?"}], "loss_weight": 0.0},
        {"role": "assistant", "content": [{"type": "text", "value": "a dog"}], "loss_weight": 1.0},
    ],
}
ROWS: dict[str, dict[str, Any]] = {
    "trl": CONVERSATIONAL,
    "plain": PLAIN,
    "sharegpt": SHAREGPT,
    "alpaca": ALPACA,
    "swift": SWIFT,
    "llamafactory-v1": LLAMAFACTORY_V1,
    "rlaif-v": RLAIF_V,
    "rlhf-v": RLHF_V,
    "vlfeedback": VLFEEDBACK,
    "mmpr": MMPR,
    "nemo-rl": NEMO_RL,
}
