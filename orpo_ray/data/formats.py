"""One raw row of any supported format -> `PreferencePair`. Pure functions; nothing is decoded or tokenised here."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from orpo_ray.errors import BadRow, UserError

COLUMNS = ("id", "images", "image", "prompt", "chosen", "rejected")
Image = dict[str, Any]  # {"bytes": bytes | None, "path": str | None}
Message = dict[str, Any]  # {"role": str, "content": [{"type": "image"} | {"type": "text", "text": str}, ...]}


@dataclass(frozen=True)
class PreferencePair:
    """One image-text preference, in the one form that the rest of the project knows.

    id: unique and stable, for the user to find the row. images: `{"bytes": ..., "path": ...}` with one of them None,
    in the order of their placeholders. prompt: messages up to the answer, content always a list of parts. chosen,
    rejected: text of the better and the worse answer. source: where the row came from.
    """

    id: str
    images: list[Image]
    prompt: list[Message]
    chosen: str
    rejected: str
    source: str = field(default="", compare=False)


def recognise(columns: Iterable[str], renames: Mapping[str, str], requested: str, source: str) -> str:
    """The format of a source with these columns. Raises UserError naming what is missing.

    requested: the recipe's `data.format`. source: its name, for the error.
    """
    columns = list(columns)
    for ours, theirs in renames.items():
        if theirs not in columns or ours not in COLUMNS:
            problem = f"no column {theirs!r}" if theirs not in columns else f"the format has no column {ours!r}"
            raise UserError(
                f"{problem}; the rows have: {', '.join(sorted(columns))}",
                field=f"data.columns.{ours}",
                value=theirs,
                fix=f"map one of {', '.join(COLUMNS)} to a column of {source}",
            )
    present = set(_renamed(dict.fromkeys(columns), renames))
    required = {"prompt", "chosen", "rejected"}
    if requested in ("auto", "trl") and required <= present:
        return "trl"
    missing = ", ".join(sorted(required - present))
    raise UserError(
        f"the rows lack the column(s) {missing}; they have: {', '.join(sorted(columns))}",
        field=source,
        fix="give rows with prompt, chosen, rejected and image or images, or rename with data.columns",
    )


def to_pair(row: Mapping[str, Any], format_name: str, renames: Mapping[str, str], fallback_id: str) -> PreferencePair:
    """Turn one raw row into a pair. Raises BadRow if the row cannot be one."""
    row = _renamed(row, renames)
    row_id = next((str(row[key]) for key in ("id", "idx") if row.get(key) is not None), fallback_id)
    pair = _FORMATS[format_name](row, row_id, fallback_id)
    _refuse_half_characters(pair)
    return pair


def _from_trl(row: Mapping[str, Any], row_id: str, source: str) -> PreferencePair:
    """TRL's preference rows: strings or lists of messages, with `images: list` or `image`."""
    images = _images_of(row)
    prompt_turns = _messages(row.get("prompt"), "user", "prompt")
    chosen = _answer(row.get("chosen"), "chosen")
    rejected = _answer(row.get("rejected"), "rejected")
    if not chosen.strip() or not rejected.strip():
        which = "chosen" if not chosen.strip() else "rejected"
        raise BadRow("empty_response", f"{which} is empty")
    if chosen == rejected:
        raise BadRow("identical_responses", f"chosen and rejected are the same: {chosen[:80]!r}")
    prompt = _place_images(prompt_turns, len(images))
    return PreferencePair(row_id, images, prompt, chosen, rejected, source)


def _renamed(row: Mapping[str, Any], renames: Mapping[str, str]) -> dict[str, Any]:
    """The row under the format's own names; a column that a rename puts out of place is left out."""
    kept = {name: value for name, value in row.items() if name not in renames}
    return kept | {ours: row[theirs] for ours, theirs in renames.items() if theirs in row}


def _refuse_half_characters(pair: PreferencePair) -> None:
    """JSON can spell half of a character (a lone surrogate); no tokenizer and no file takes it."""
    try:
        json.dumps(pair.prompt, ensure_ascii=False).encode()
        "".join((pair.id, pair.chosen, pair.rejected, *(image["path"] or "" for image in pair.images))).encode()
    except UnicodeEncodeError as error:
        raise BadRow("malformed_row", f"the text holds half of a character: {error}") from None


def _images_of(row: Mapping[str, Any]) -> list[Image]:
    images = row.get("images") or row.get("image")
    if images is None or images == []:
        return []
    return [_image(image) for image in (images if isinstance(images, list | tuple) else [images])]


def _image(value: Any) -> Image:
    if isinstance(value, bytes):
        return {"bytes": value, "path": None}
    if isinstance(value, str):
        return {"bytes": None, "path": value}
    if isinstance(value, Mapping):
        data, path = value.get("bytes"), value.get("path")
        if isinstance(data, bytes):
            return {"bytes": data, "path": None}
        if isinstance(path, str):
            return {"bytes": None, "path": path}
    if value is None:
        raise BadRow("missing_image", "the list of images holds an empty entry")
    raise BadRow("malformed_row", f"an image must be bytes, a path or both in a dict, found {_shown(value)}")


def _messages(value: Any, role: str, name: str) -> list[Message]:
    """A string or a list of `{role, content}` as messages whose content is a list of parts."""
    if isinstance(value, str):
        if not value.strip():
            raise BadRow("empty_prompt", f"{name} is empty")
        return [{"role": role, "content": [{"type": "text", "text": value}]}]
    if not isinstance(value, list) or not value:
        raise BadRow("malformed_row", f"{name} must be a string or a list of messages, found {_shown(value)}")
    messages = []
    for turn in value:
        if not isinstance(turn, Mapping) or "role" not in turn or "content" not in turn:
            raise BadRow("malformed_row", f"a message of {name} must have role and content, found {_shown(turn)}")
        messages.append({"role": str(turn["role"]), "content": _parts(turn["content"], name)})
    return messages


def _parts(content: Any, name: str) -> list[dict[str, Any]]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise BadRow("malformed_row", f"content in {name} must be a string or a list of parts, found {_shown(content)}")
    parts: list[dict[str, Any]] = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "image":
            parts.append({"type": "image"})
        elif kind == "text" and isinstance(part.get("text"), str):
            parts.append({"type": "text", "text": part["text"]})
        else:
            raise BadRow("malformed_row", f"a part in {name} must be an image or a text, found {_shown(part)}")
    return parts


def _answer(value: Any, name: str) -> str:
    """The text of an answer: a string, or one assistant message."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and not value:
        return ""
    turns = _messages(value, "assistant", name)
    if len(turns) != 1 or turns[0]["role"] != "assistant":
        roles = [turn["role"] for turn in turns]
        raise BadRow("malformed_row", f"{name} must be one assistant message, found roles {roles}")
    if any(part["type"] == "image" for part in turns[0]["content"]):
        raise BadRow("malformed_row", f"{name} holds an image; only prompts may")
    return "".join(part["text"] for part in turns[0]["content"])


def _place_images(messages: list[Message], count: int) -> list[Message]:
    """Hold placeholders and images to the same number; without placeholders, images go before the first user text."""
    placed = sum(part["type"] == "image" for message in messages for part in message["content"])
    if placed == count:
        return messages
    if placed:
        raise BadRow("image_count_mismatch", f"the prompt has {placed} image placeholder(s) for {count} image(s)")
    for index, message in enumerate(messages):
        if message["role"] == "user":
            content = [{"type": "image"}] * count + message["content"]
            return [*messages[:index], {**message, "content": content}, *messages[index + 1 :]]
    raise BadRow("malformed_row", "the prompt has images but no user message to put them in")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


_FORMATS = {"trl": _from_trl}
