"""Rows without a preference: convert a raw row with images, a prompt and perhaps an answer to a `PromptRow`.

The layouts are those of pairs, with one answer or none. A row of a format of pairs is taken too, with its chosen answer
as the given one. In question, conversations and instruction, `<image>` marks the position of an image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from orpo_ray.config.synthesis import PROMPT_FORMATS
from orpo_ray.data.formats import Row, alpaca_prompt, detect_format, get_row_id, renamed, to_pair
from orpo_ray.data.pairs import Image, Message, check_prompt
from orpo_ray.data.row_adapter import call_adapter, load_adapter
from orpo_ray.data.row_values import (
    read_answer,
    read_messages,
    read_prompt,
    refuse_unread,
    row_images,
    user_turn,
    with_system,
)
from orpo_ray.errors import RowError, UserError, preview

_PAIR = "pair:"  # before the name of a format of pairs


@dataclass(frozen=True)
class PromptRow:
    """Images and a prompt, with an answer or without, from which a preference can be made."""

    id: str
    images: list[Image]
    """As those of a `PreferencePair`."""
    prompt: list[Message]
    """As that of a `PreferencePair`."""
    answer: str | None
    """The answer that the row gives; None if it gives none."""
    source: str
    """File and line or row."""
    language: str | None = field(default=None, compare=False)
    """Of the column that `data.language` names; None without one."""
    domain: str | None = field(default=None, compare=False)
    """The same by `data.domain`."""


def detect_prompt_format(
    columns: Iterable[str], first_rows: Sequence[Row], renames: Mapping[str, str], requested: str, source: str
) -> str:
    """Return the name of the format that the rows of a source have, for `to_prompt_row`.

    Args:
        columns: column names of the source.
        first_rows: some rows.
        renames: the recipe's `synthesize.columns`.
        requested: the recipe's `synthesize.format`.
        source: name of the source, for error messages.

    Raises:
        UserError: the rows have no known format, or not the requested one.
    """
    columns = [str(column) for column in columns]
    if ":" in requested:
        load_adapter(requested)
        return requested
    if requested not in ("auto", *PROMPT_FORMATS):
        return _PAIR + detect_format(columns, first_rows, renames, requested, source)
    _check_renames(columns, renames, source)
    present = set(renamed(dict.fromkeys(columns), renames))
    if requested != "auto":
        if _LAYOUTS[requested].required not in present:
            raise UserError(
                f"the rows lack a column of format {requested}: {_LAYOUTS[requested].required}; "
                f"the columns are: {', '.join(sorted(columns))}",
                field=source,
                fix="rename columns with synthesize.columns, or set synthesize.format to the format of these rows",
            )
        return requested
    # First, since a format of pairs has a prompt too.
    try:
        return _PAIR + detect_format(columns, first_rows, renames, "auto", source)
    except UserError:
        found = next((name for name, layout in _LAYOUTS.items() if layout.required in present), None)
    if found is None:
        raise UserError(
            f"unknown row format; the columns are: {', '.join(sorted(columns))}",
            field=source,
            fix=f"rename columns with synthesize.columns, or set synthesize.format ({', '.join(PROMPT_FORMATS)}, a "
            "format of pairs, or module:function)",
        )
    return found


def to_prompt_row(row: Row, format_name: str, renames: Mapping[str, str], fallback_id: str) -> PromptRow:
    """Convert a raw row.

    Args:
        row: column name -> value.
        format_name: as `detect_prompt_format` returned it.
        renames: the recipe's `synthesize.columns`.
        fallback_id: id of the row if it has none; also recorded as its source.

    Raises:
        RowError: the row cannot be used.
    """
    if format_name.startswith(_PAIR):
        pair = to_pair(row, format_name.removeprefix(_PAIR), renames, fallback_id)
        _refuse_videos(row, pair.prompt)
        return PromptRow(pair.id, pair.images, pair.prompt, pair.chosen, pair.source)
    row = renamed(row, renames)
    if ":" in format_name:
        return _adapted(row, format_name, fallback_id)
    refuse_unread(row, "tools")
    try:
        prompt, answer = _LAYOUTS[format_name].read(row)
        row_id = get_row_id(row, {}, fallback_id)
        _refuse_videos(row, prompt)
        images, prompt = check_prompt(row_images(row), with_system(prompt, row.get("system")), [answer or ""], [row_id])
        return PromptRow(row_id, images, prompt, answer if answer and answer.strip() else None, fallback_id)
    except RecursionError:
        raise RowError("malformed_row", "the values are nested too deeply") from None


def _refuse_videos(row: Row, prompt: list[Message]) -> None:
    if (
        row.get("videos")
        or row.get("video")
        or any(part["type"] == "video" for turn in prompt for part in turn["content"])
    ):
        raise RowError("unsupported_media", "the row has a video; only images are supported here")


def _adapted(row: dict[str, Any], name: str, fallback_id: str) -> PromptRow:
    """Convert a row with the user's adapter, which keeps the id of the row."""
    converted = {key: row[key] for key in ("id", "idx") if key in row} | call_adapter(name, row)
    try:
        found = detect_prompt_format(converted, [converted], {}, "auto", name)
    except UserError as error:
        raise RowError("adapter_failed", f"{name} returned a row that cannot be used: {error.problem}") from None
    return to_prompt_row(converted, found, {}, fallback_id)


def _check_renames(columns: Sequence[str], renames: Mapping[str, str], source: str) -> None:
    for name, column in renames.items():
        if column not in columns:
            raise UserError(
                f"no column {column!r}; the columns are: {', '.join(sorted(columns))}",
                field=f"synthesize.columns.{name}",
                value=column,
                fix=f"map it to a column of {source}",
            )


def _given(row: Row, *names: str, inline: bool = False) -> str | None:
    """Read the answer from the first of these columns that has one."""
    for name in names:
        if row.get(name) not in (None, ""):
            return read_answer(row[name], name, inline)
    return None


def _from_prompt(row: Row) -> tuple[list[Message], str | None]:
    """A string or messages in `prompt`."""
    return read_prompt(row.get("prompt"), "prompt"), _given(row, "answer", "completion", "response")


def _from_question(row: Row) -> tuple[list[Message], str | None]:
    """Visual question answering: `question` and `answer`, both strings."""
    return [user_turn(row.get("question"), "question", inline=True)], _given(row, "answer", inline=True)


def _from_messages(row: Row) -> tuple[list[Message], str | None]:
    """A dialogue in `messages`; if an assistant turn is the last one, it is the answer."""
    return _divided(row.get("messages"), "messages", inline=False)


def _from_conversations(row: Row) -> tuple[list[Message], str | None]:
    """A dialogue of `{from, value}` in `conversations`, as LLaVA and LLaMA-Factory have them."""
    return _divided(row.get("conversations"), "conversations", inline=True)


def _from_instruction(row: Row) -> tuple[list[Message], str | None]:
    """Alpaca: `instruction` and `input`, with the answer in `output`."""
    return alpaca_prompt(row), _given(row, "output", inline=True)


def _divided(turns: Any, name: str, inline: bool) -> tuple[list[Message], str | None]:
    """Divide a dialogue into the messages up to the last user turn, and the answer to it."""
    messages = read_messages(turns, name, inline)
    if messages[-1]["role"] != "assistant":
        return messages, None
    if len(messages) < 2:
        raise RowError("empty_prompt", f"{name} has no turn before the answer: {preview(turns)}")
    return messages[:-1], read_answer(turns[-1:], f"the last of {name}", inline)


@dataclass(frozen=True)
class _Layout:
    """How to read rows of a format, and how to detect them."""

    read: Callable[[Row], tuple[list[Message], str | None]]
    """Returns prompt and answer."""
    required: str
    """The column that every row has."""


# Detection takes the first match.
_LAYOUTS = {
    "messages": _Layout(_from_messages, "messages"),
    "conversations": _Layout(_from_conversations, "conversations"),
    "instruction": _Layout(_from_instruction, "instruction"),
    "prompt": _Layout(_from_prompt, "prompt"),
    "question": _Layout(_from_question, "question"),
}
