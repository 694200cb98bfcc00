"""`PreferencePair`, and what every format builds one from: messages, parts, images, answers.

Pure functions; nothing is decoded or tokenised here. A value that is not as it should be raises RowError.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from orpo_ray.errors import RowError

PLACEHOLDER = "<image>"  # in formats where images stand inline: one of these per image
Image = dict[str, Any]  # {"bytes": bytes | None, "path": str | None}
Message = dict[str, Any]  # {"role": str, "content": [{"type": "image"} | {"type": "text", "text": str}, ...]}

_ROLES = {"human": "user", "gpt": "assistant"}
_EMPTY_IMAGE = {"bytes": None, "path": None}


@dataclass(frozen=True)
class PreferencePair:
    """One image-text preference, in the one form that the rest of the project knows.

    id: unique and stable, for the user to find the row. images: `{"bytes": ..., "path": ...}` with one of them None,
    in the order of their placeholders. prompt: messages up to the answer, content always a list of parts. chosen,
    rejected: text of the better and the worse answer. source: where the row came from. rejected_images: for rows whose
    rejected side looks at other images (the text of the answers may then be the same), as many as `images`; None where
    both sides see the same.
    """

    id: str
    images: list[Image]
    prompt: list[Message]
    chosen: str
    rejected: str
    source: str = field(default="", compare=False)
    rejected_images: list[Image] | None = None


def make_pair(
    row_id: str,
    source: str,
    images: list[Image],
    prompt: list[Message],
    chosen: str,
    rejected: str,
    rejected_images: list[Image] | None = None,
) -> PreferencePair:
    """The pair of these parts, after the checks that every format shares. Raises RowError.

    images: of the row itself; where it has none, those that the parts of the prompt carry.
    """
    if not chosen.strip() or not rejected.strip():
        raise RowError("empty_response", f"{'rejected' if chosen.strip() else 'chosen'} is empty")
    carried = [part["image"] for message in prompt for part in message["content"] if "image" in part]
    images = images or carried
    if rejected_images == images:
        rejected_images = None
    if chosen == rejected and rejected_images is None:
        raise RowError("identical_responses", f"chosen and rejected are the same: {chosen[:80]!r}")
    if rejected_images is not None and len(rejected_images) != len(images):
        raise RowError("image_count_mismatch", f"{len(rejected_images)} rejected image(s) for {len(images)} image(s)")
    _refuse_empty_prompt(prompt)
    prompt = _place_images(_without_images(prompt), len(images))
    pair = PreferencePair(row_id, images, prompt, chosen, rejected, source, rejected_images)
    _refuse_half_characters(pair)
    return pair


def row_images(row: Mapping[str, Any], names: tuple[str, ...] = ("images", "image")) -> list[Image]:
    """The images of a row, from the first of these columns that has any; null is a row without images."""
    for other in ("videos", "audios"):
        if row.get(other):
            raise RowError("unsupported_media", f"the row has {other}; only images are trained on")
    return next((images for name in names if (images := read_images(row.get(name)))), [])


def read_images(value: Any) -> list[Image]:
    """One image or a list of them."""
    # What writers put where there is no image: null, a struct of nulls (parquet), an empty string (JSON).
    if value is None or value in ("", [], _EMPTY_IMAGE):
        return []
    return [_image(image) for image in (value if isinstance(value, list | tuple) else [value])]


def read_messages(value: Any, name: str, inline: bool = False) -> list[Message]:
    """A list of `{role, content}` or `{from, value}` as messages whose content is a list of parts.

    An image part that brings its own image holds it under `image`, until `make_pair`. inline: `<image>` in a text
    stands for an image. name: of the column, for errors.
    """
    if not isinstance(value, list) or not value:
        raise RowError("malformed_row", f"{name} must be a list of messages, found {shown(value)}")
    return [_message(turn, name, inline) for turn in value]


def user_turn(value: Any, name: str, inline: bool = False) -> Message:
    """A user's message of one string."""
    return {"role": "user", "content": _text_parts(read_text(value, name), inline)}


def read_prompt(value: Any, name: str) -> list[Message]:
    """A prompt that is either a string or a list of messages."""
    return [user_turn(value, name)] if isinstance(value, str) else read_messages(value, name)


def read_answer(value: Any, name: str, inline: bool = False) -> str:
    """The text of an answer: a string, or one assistant message, in a list or not."""
    if value == []:
        return ""
    if isinstance(value, str):
        text = value
    else:
        turns = read_messages([value] if isinstance(value, Mapping) else value, name)
        if len(turns) != 1 or turns[0]["role"] != "assistant":
            roles = [turn["role"] for turn in turns]
            raise RowError("malformed_row", f"{name} must be one assistant message, found roles {shown(roles)}")
        if any(part["type"] == "image" for part in turns[0]["content"]):
            raise RowError("malformed_row", f"{name} holds an image; only prompts may")
        text = "".join(part["text"] for part in turns[0]["content"])
    if inline and PLACEHOLDER in text:
        raise RowError("placeholder_in_text", f"{name} holds {PLACEHOLDER}; only prompts may: {shown(text)}")
    return text


def read_text(value: Any, name: str) -> str:
    """A string, as it is."""
    if not isinstance(value, str):
        raise RowError("malformed_row", f"{name} must be a string, found {shown(value)}")
    return value


def with_system(messages: list[Message], system: Any) -> list[Message]:
    """The messages below a row's `system` text, unless there is none or they begin with a system message."""
    if system is None or messages[0]["role"] == "system" or not read_text(system, "system").strip():
        return messages
    return [{"role": "system", "content": _text_parts(system, inline=False)}, *messages]


def read_records(value: Any, name: str) -> list[Any]:
    """A list of records, also when it comes as a mapping of lists (how `datasets` stores them), whatever its depth."""
    if isinstance(value, list):
        return value
    if not isinstance(value, Mapping):
        raise RowError("malformed_row", f"{name} must be a list or a mapping of lists, found {shown(value)}")
    columns = {key: read_records(column, name) for key, column in value.items() if column is not None}
    if len({len(column) for column in columns.values()}) > 1:
        raise RowError("malformed_row", f"{name} holds lists of different lengths: {shown(value)}")
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def best_and_worst(scored: list[tuple[float, Any]]) -> tuple[Any, Any]:
    """The answers with the highest and the lowest score, the first of each."""
    if len(scored) < 2:
        raise RowError("no_preference", f"a pair takes two rated answers, found {len(scored)}")
    best, worst = max(scored, key=lambda item: item[0]), min(scored, key=lambda item: item[0])
    if best[0] == worst[0]:
        raise RowError("no_preference", f"all {len(scored)} answers are rated the same")
    return best[1], worst[1]


def extract_prompt(chosen: Any, rejected: Any) -> tuple[Any, Any, Any]:
    """Of two whole dialogues (lists of messages, or strings): prompt, chosen, rejected, as TRL splits them.

    The common beginning is the prompt, but for the last element, even if one side is a beginning of the other.
    """
    if not any(isinstance(chosen, kind) and isinstance(rejected, kind) for kind in (str, list)):
        problem = f"without a prompt, chosen and rejected must be dialogues, found {shown(chosen)}, {shown(rejected)}"
        raise RowError("malformed_row", problem)
    if not chosen or not rejected:
        raise RowError("empty_response", f"{'rejected' if chosen else 'chosen'} is empty")
    pairs = enumerate(zip(chosen, rejected, strict=False))
    end = next((index for index, (ours, theirs) in pairs if ours != theirs), None)
    if end is None:
        end = min(len(chosen), len(rejected)) - 1
    elif end and chosen[end - 1] == " ":
        end -= 1
    if not end:
        raise RowError("empty_prompt", "chosen and rejected have no common beginning that could be the prompt")
    return chosen[:end], chosen[end:], rejected[end:]


def shown(value: Any) -> str:
    """A value for an error, at most 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _image(value: Any) -> Image:
    if isinstance(value, Mapping):
        data, path = value.get("bytes"), value.get("path") or value.get("url")
        value = data if isinstance(data, bytes) else path if isinstance(path, str) else value
    if isinstance(value, bytes):
        return {"bytes": value, "path": None}
    if value is None or value in ("", _EMPTY_IMAGE):
        raise RowError("missing_image", "the list of images holds an empty entry")
    if not isinstance(value, str):
        raise RowError("malformed_row", f"an image must be bytes, a path or both in a dict, found {shown(value)}")
    if value[:5].lower() == "data:":
        return {"bytes": _data_uri(value), "path": None}
    return {"bytes": None, "path": value}


def _data_uri(uri: str) -> bytes:
    """The bytes of `data:image/png;base64,...`."""
    head, comma, body = uri.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise RowError("unreadable_image", f"a data URI must be data:<type>;base64,<data>, found {shown(uri)}")
    try:
        return base64.b64decode("".join(body.split()), validate=True)
    except (binascii.Error, ValueError) as error:  # ValueError: letters outside ASCII
        raise RowError("unreadable_image", f"broken base64 in a data URI: {error}") from None


def _message(turn: Any, name: str, inline: bool) -> Message:
    given = turn if isinstance(turn, Mapping) else {}
    role = given.get("role") if given.get("role") is not None else given.get("from")
    content = given.get("content") if given.get("content") is not None else given.get("value")
    if not isinstance(role, str) or content is None:
        raise RowError("malformed_row", f"a message of {name} must have role and content, found {shown(turn)}")
    return {"role": _ROLES.get(role, role), "content": _parts(content, name, inline)}


def _parts(content: Any, name: str, inline: bool) -> list[dict[str, Any]]:
    if isinstance(content, str):
        return _text_parts(content, inline)
    if not isinstance(content, list):
        raise RowError(
            "malformed_row", f"content in {name} must be a string or a list of parts, found {shown(content)}"
        )
    parts: list[dict[str, Any]] = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "image":
            own = next((part[key] for key in ("image", "path", "url") if part.get(key) is not None), None)
            parts.append({"type": "image"} if own is None else {"type": "image", "image": _image(own)})
        elif kind == "image_url":
            parts.append({"type": "image", "image": _image(part.get("image_url"))})
        elif kind == "text" and isinstance(part.get("text"), str):
            parts.extend(_text_parts(part["text"], inline))
        else:
            raise RowError("malformed_row", f"a part in {name} must be an image or a text, found {shown(part)}")
    return parts


def _text_parts(text: str, inline: bool) -> list[dict[str, Any]]:
    """A text as parts: one, or where images stand inline, the pieces between them (white space as it is)."""
    if not inline or PLACEHOLDER not in text:
        return [{"type": "text", "text": text}]
    parts: list[dict[str, Any]] = []
    for index, piece in enumerate(text.split(PLACEHOLDER)):
        if index:
            parts.append({"type": "image"})
        if piece:
            parts.append({"type": "text", "text": piece})
    return parts


def _without_images(messages: list[Message]) -> list[Message]:
    """The messages with bare placeholders, in place of those that carry their image."""
    return [
        {**message, "content": [{"type": "image"} if "image" in part else part for part in message["content"]]}
        for message in messages
    ]


def _place_images(messages: list[Message], count: int) -> list[Message]:
    """Hold placeholders and images to the same number; without placeholders, images go before the first user text."""
    placed = sum(part["type"] == "image" for message in messages for part in message["content"])
    if placed == count:
        return messages
    if placed:
        raise RowError("image_count_mismatch", f"the prompt has {placed} image placeholder(s) for {count} image(s)")
    for index, message in enumerate(messages):
        if message["role"] == "user":
            content = [{"type": "image"}] * count + message["content"]
            return [*messages[:index], {**message, "content": content}, *messages[index + 1 :]]
    raise RowError("malformed_row", "the prompt has images but no user message to put them in")


def _refuse_empty_prompt(prompt: list[Message]) -> None:
    """The message to be answered must say something; a placeholder alone does."""
    last = prompt[-1]
    asked = any(part["type"] == "image" or part["text"].strip() for part in last["content"])
    if not asked or last["role"] == "system":
        raise RowError("empty_prompt", "the prompt is empty")


def _refuse_half_characters(pair: PreferencePair) -> None:
    """JSON can spell half of a character (a lone surrogate); no tokenizer and no file takes it."""
    paths = [image["path"] or "" for image in (*pair.images, *(pair.rejected_images or []))]
    try:
        json.dumps(pair.prompt, ensure_ascii=False).encode()
        "".join((pair.id, pair.chosen, pair.rejected, *paths)).encode()
    except UnicodeEncodeError as error:
        raise RowError("malformed_row", f"the text holds half of a character: {error}") from None
