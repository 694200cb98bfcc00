"""Readers of the values of a row, which all formats use: images, messages, answers.

Images are not decoded and texts not tokenized here. Functions raise RowError for values that cannot be used.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from typing import Any

from orpo_ray.data.pairs import Image, Message
from orpo_ray.errors import RowError, preview

PLACEHOLDER = "<image>"  # position of an image, in formats with inline images

_ROLES = {"human": "user", "gpt": "assistant"}
_EMPTY_IMAGE = {"bytes": None, "path": None}


def row_images(row: Mapping[str, Any], names: tuple[str, ...] = ("images", "image")) -> list[Image]:
    """Read the images of a row from the first of these columns that has any; an empty list if none has."""
    if row.get("audios"):
        raise RowError("unsupported_media", "the row has audios; only images and frames of videos are supported")
    return next((images for name in names if (images := read_images(row.get(name)))), [])


def refuse_unread(row: Mapping[str, Any], *names: str) -> None:
    """Refuse a row with a value in a column that changes what the texts mean, and that is not read. Raises RowError."""
    for name in names:
        if row.get(name) not in (None, "", "[]", "{}", [], {}):
            raise RowError(
                "unread_column", f"{name} is not read; remove the column if it does not matter: {preview(row[name])}"
            )


def read_images(value: Any) -> list[Image]:
    """Read one image or a list of images."""
    # Missing images are written as null, a struct of nulls (parquet) or an empty string (JSON).
    if value is None or value in ("", [], _EMPTY_IMAGE):
        return []
    return [_image(image) for image in (value if isinstance(value, list | tuple) else [value])]


def read_messages(value: Any, name: str, inline: bool = False) -> list[Message]:
    """Read a list of `{role, content}` or `{from, value}` as messages whose content is a list of parts.

    Args:
        value: the column's value.
        name: the column's name, for error messages.
        inline: whether `<image>` in a text marks the position of an image.

    Returns:
        Messages. An image part that contains its image has it under the key `image`, until `make_pair` collects it.
    """
    if not isinstance(value, list) or not value:
        raise RowError("malformed_row", f"{name} must be a list of messages, found {preview(value)}")
    return [_message(turn, name, inline) for turn in value]


def user_turn(value: Any, name: str, inline: bool = False) -> Message:
    """Make a user message from a string."""
    return {"role": "user", "content": _text_parts(read_text(value, name), inline)}


def read_prompt(value: Any, name: str) -> list[Message]:
    """Read a prompt that is a string or a list of messages."""
    return [user_turn(value, name)] if isinstance(value, str) else read_messages(value, name)


def read_answer(value: Any, name: str, inline: bool = False) -> str:
    """Read the text of an answer: a string, an assistant message, or a list with one assistant message."""
    if value == []:
        return ""
    if isinstance(value, str):
        text = value
    else:
        turns = read_messages([value] if isinstance(value, Mapping) else value, name)
        if len(turns) != 1 or turns[0]["role"] != "assistant":
            roles = [turn["role"] for turn in turns]
            raise RowError("malformed_row", f"{name} must be one assistant message, found roles {preview(roles)}")
        if any(part["type"] != "text" for part in turns[0]["content"]):
            raise RowError("malformed_row", f"{name} contains an image or a video; only prompts can contain them")
        text = "".join(part["text"] for part in turns[0]["content"])
    if inline and PLACEHOLDER in text:
        raise RowError(
            "placeholder_in_text", f"{name} contains {PLACEHOLDER}; only prompts can contain it: {preview(text)}"
        )
    return text


def read_text(value: Any, name: str) -> str:
    """Check that a value is a string, and return it unchanged."""
    if not isinstance(value, str):
        raise RowError("malformed_row", f"{name} must be a string, found {preview(value)}")
    return value


def with_system(messages: list[Message], system: Any) -> list[Message]:
    """Put a row's `system` text before the messages, unless it is empty or they start with a system message."""
    if system is None or messages[0]["role"] == "system" or not read_text(system, "system").strip():
        return messages
    return [{"role": "system", "content": _text_parts(system, inline=False)}, *messages]


def read_records(value: Any, name: str) -> list[Any]:
    """Read a list of records, given as a list or as a mapping of lists (as `datasets` stores them), at any depth."""
    if isinstance(value, list):
        return value
    if not isinstance(value, Mapping):
        raise RowError("malformed_row", f"{name} must be a list or a mapping of lists, found {preview(value)}")
    columns = {key: read_records(column, name) for key, column in value.items() if column is not None}
    if len({len(column) for column in columns.values()}) > 1:
        raise RowError("malformed_row", f"{name} contains lists of different lengths: {preview(value)}")
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def extract_prompt(chosen: Any, rejected: Any) -> tuple[Any, Any, Any]:
    """Split two complete dialogues (lists of messages, or strings) into prompt, chosen and rejected, as TRL does.

    The prompt is the longest common prefix. If one dialogue is a prefix of the other, its last element is left out of
    the prompt.
    """
    if not any(isinstance(chosen, kind) and isinstance(rejected, kind) for kind in (str, list)):
        found = f"{preview(chosen)}, {preview(rejected)}"
        raise RowError("malformed_row", f"without prompt, chosen and rejected must be dialogues, found {found}")
    if not chosen or not rejected:
        raise RowError("empty_response", f"{'rejected' if chosen else 'chosen'} is empty")
    pairs = enumerate(zip(chosen, rejected, strict=False))
    end = next((index for index, (left, right) in pairs if left != right), None)
    if end is None:
        end = min(len(chosen), len(rejected)) - 1
    elif end and chosen[end - 1] == " ":
        end -= 1
    if not end:
        raise RowError("empty_prompt", "chosen and rejected have no common prefix to use as the prompt")
    return chosen[:end], chosen[end:], rejected[end:]


def _image(value: Any) -> Image:
    if isinstance(value, Mapping):
        data, path = value.get("bytes"), value.get("path") or value.get("url")
        value = data if isinstance(data, bytes) else path if isinstance(path, str) else value
    if isinstance(value, bytes):
        return {"bytes": value, "path": None}
    if value is None or value in ("", _EMPTY_IMAGE):
        raise RowError("missing_image", "the list of images has an empty entry")
    if not isinstance(value, str):
        raise RowError("malformed_row", f"an image must be bytes, a path, or a dict of both, found {preview(value)}")
    if value[:5].lower() == "data:":
        return {"bytes": _data_uri(value), "path": None}
    return {"bytes": None, "path": value}


def _data_uri(uri: str) -> bytes:
    """Decode `data:image/png;base64,...` to bytes."""
    head, comma, body = uri.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise RowError(
            "unreadable_image", f"a data URI must have the form data:<type>;base64,<data>, found {preview(uri)}"
        )
    try:
        return base64.b64decode("".join(body.split()), validate=True)
    except (binascii.Error, ValueError) as error:  # ValueError: characters outside ASCII
        raise RowError("unreadable_image", f"invalid base64 in a data URI: {error}") from None


def _message(turn: Any, name: str, inline: bool) -> Message:
    fields = turn if isinstance(turn, Mapping) else {}
    role = fields.get("role") if fields.get("role") is not None else fields.get("from")
    content = fields.get("content") if fields.get("content") is not None else fields.get("value")
    if not isinstance(role, str) or content is None:
        raise RowError("malformed_row", f"a message of {name} must have role and content, found {preview(turn)}")
    return {"role": _ROLES.get(role, role), "content": _parts(content, name, inline)}


def _parts(content: Any, name: str, inline: bool) -> list[dict[str, Any]]:
    if isinstance(content, str):
        return _text_parts(content, inline)
    if not isinstance(content, list):
        raise RowError(
            "malformed_row", f"content in {name} must be a string or a list of parts, found {preview(content)}"
        )
    parts: list[dict[str, Any]] = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "image":
            own = next((part[key] for key in ("image", "path", "url", "value") if part.get(key) is not None), None)
            parts.append({"type": "image"} if own is None else {"type": "image", "image": _image(own)})
        elif kind == "image_url":
            parts.append({"type": "image", "image": _image(part.get("image_url", part.get("value")))})
        elif kind in ("video", "video_url"):
            own = next((part[key] for key in ("video", "video_url", "path", "url", "value") if part.get(key)), None)
            parts.append({"type": "video"} if own is None else {"type": "video", "video": own})
        elif kind == "text" and isinstance(text := part.get("text", part.get("value")), str):
            parts.extend(_text_parts(text, inline))
        else:
            raise RowError(
                "malformed_row", f"a part in {name} must be an image, a video or a text, found {preview(part)}"
            )
    return parts


def _text_parts(text: str, inline: bool) -> list[dict[str, Any]]:
    """Split a text at its inline images into text and image parts. White space is unchanged."""
    if not inline or PLACEHOLDER not in text:
        return [{"type": "text", "text": text}]
    parts: list[dict[str, Any]] = []
    for index, between in enumerate(text.split(PLACEHOLDER)):
        if index:
            parts.append({"type": "image"})
        if between:
            parts.append({"type": "text", "text": between})
    return parts
