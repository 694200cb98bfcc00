"""Detect the format of rows, and convert a raw row of any format to a `PreferencePair`. One function per format.

In plain, sharegpt, alpaca, swift and mmpr, `<image>` in a prompt marks the position of an image: there are as many
marks as images, or none. In all other formats `<image>` is plain text.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from orpo_ray.config.field_types import PairsFromRanking
from orpo_ray.data.pairs import Message, PreferencePair, make_pair
from orpo_ray.data.ranking import Rated, best_and_worst, rank_answers, rated_in_nemo_rl, rated_in_vlfeedback
from orpo_ray.data.row_adapter import call_adapter, load_adapter
from orpo_ray.data.row_values import (
    extract_prompt,
    read_answer,
    read_images,
    read_messages,
    read_prompt,
    refuse_unread,
    row_images,
    user_turn,
    with_system,
)
from orpo_ray.data.videos import read_videos, with_videos
from orpo_ray.errors import RowError, UserError, preview

Row = Mapping[str, Any]
_SHARED_COLUMNS = ("id", "idx", "images", "image", "videos")
_INLINE = ("plain", "sharegpt", "alpaca", "swift", "mmpr")  # formats with marks for images and videos in their texts


def detect_format(
    columns: Iterable[str], first_rows: Sequence[Row], renames: Mapping[str, str], requested: str, source: str
) -> str:
    """Return the name of the format that the rows of a source have.

    Args:
        columns: column names of the source.
        first_rows: some rows, for formats that differ only in their values.
        renames: the recipe's `data.columns`.
        requested: the recipe's `data.format`.
        source: name of the source, for error messages.

    Raises:
        UserError: the rows have no known format, or not the requested one. Names the missing columns.
    """
    columns = [str(column) for column in columns]
    present_names = ", ".join(sorted(columns))
    _check_renames(columns, renames, requested, source)
    if ":" in requested:
        load_adapter(requested)
        return requested
    present = set(renamed(dict.fromkeys(columns), renames))
    if requested == "auto":
        if found := _detect_automatically(present, [renamed(row, renames) for row in first_rows]):
            return found
        nearest = sorted(_FORMATS, key=lambda name: len(_FORMATS[name].missing_for_detection(present)))[:3]
        raise UserError(
            f"unknown row format; the columns are: {present_names}; "
            + "; ".join(f"{name} lacks {_describe(_FORMATS[name].missing_for_detection(present))}" for name in nearest),
            field=source,
            fix="rename columns with data.columns, set data.format, or write an adapter (module:function)",
        )
    if missing := _FORMATS[requested].missing_columns(present):
        raise UserError(
            f"the rows lack columns of format {requested}: {_describe(missing)}; the columns are: {present_names}",
            field=source,
            fix="rename columns with data.columns, or set data.format to the format of these rows",
        )
    return requested


def to_pair(
    row: Row,
    format_name: str,
    renames: Mapping[str, str],
    fallback_id: str,
    pairs_from_ranking: PairsFromRanking = "best_worst",
) -> PreferencePair:
    """Convert a raw row to a pair.

    Args:
        row: column name -> value.
        format_name: as `detect_format` returned it.
        renames: the recipe's `data.columns`.
        fallback_id: id of the pair if the row has none; also recorded as its source.
        pairs_from_ranking: the recipe's `data.pairs_from_ranking`.

    Raises:
        RowError: the row cannot be used.
    """
    row = renamed(row, renames)
    try:
        if ":" in format_name:
            row, format_name = _apply_adapter(row, format_name)
        read, rated = _FORMATS[format_name].read, _FORMATS[format_name].rated
        pair = read(row, _id_of(row, fallback_id), fallback_id)
        pair = with_videos(pair, read_videos(row), inline=format_name in _INLINE)
        return pair if rated is None else replace(pair, ranking=rank_answers(rated(row), pairs_from_ranking))
    except RecursionError:
        raise RowError("malformed_row", "the values are nested too deeply") from None


def has_ratings(format_name: str) -> bool:
    """Whether rows of a format can have several rated answers. Those of an adapter may have any format."""
    return ":" in format_name or _FORMATS[format_name].rated is not None


def get_row_id(row: Row, renames: Mapping[str, str], fallback_id: str) -> str:
    """Return the id of a raw row, which may be a bad row."""
    return _id_of(renamed(row, renames), fallback_id)


def _id_of(row: Row, fallback_id: str) -> str:
    return next((str(row[key]) for key in ("id", "idx") if row.get(key) is not None), fallback_id)


def _from_trl(row: Row, row_id: str, source: str) -> PreferencePair:
    """TRL: strings or lists of messages, with a separate prompt or with the prompt at the start of both answers.

    The column `rejected_images` is an addition: `data prepare` writes it for pairs whose answers belong to different
    images.
    """
    refuse_unread(row, "tools")
    prompt, chosen, rejected = row.get("prompt"), row.get("chosen"), row.get("rejected")
    # Some datasets have a prompt string in addition to dialogues that already contain it.
    if "prompt" not in row or (isinstance(prompt, str) and _is_dialogue(chosen) and _is_dialogue(rejected)):
        prompt, chosen, rejected = extract_prompt(chosen, rejected)
    chosen, rejected = read_answer(chosen, "chosen"), read_answer(rejected, "rejected")
    rejected_images = read_images(row.get("rejected_images")) or None
    prompt = read_prompt(prompt, "prompt")
    return make_pair(row_id, source, row_images(row), prompt, chosen, rejected, rejected_images)


def _from_plain(row: Row, row_id: str, source: str) -> PreferencePair:
    """Strings `prompt`, `chosen` and `rejected`, and an image."""
    return _single_turn_pair(row, row_id, source, row.get("prompt"), "prompt")


def _from_sharegpt(row: Row, row_id: str, source: str) -> PreferencePair:
    """LLaMA-Factory ranking, sharegpt: `conversations` before the answer, messages `chosen` and `rejected`."""
    refuse_unread(row, "tools")
    prompt = read_messages(row.get("conversations"), "conversations", inline=True)
    roles = [message["role"] for message in prompt]
    if unknown := sorted(set(roles) - {"system", "user", "assistant"}):
        raise RowError(
            "malformed_row", f"conversations may contain human, gpt and system turns, found {preview(unknown)}"
        )
    if roles[-1] != "user":
        raise RowError("malformed_row", f"conversations must end with a human turn, found {roles[-1]}")
    return _inline_pair(row, row_id, source, with_system(prompt, row.get("system")))


def _from_alpaca(row: Row, row_id: str, source: str) -> PreferencePair:
    """LLaMA-Factory ranking, alpaca: `instruction` and `input`, with earlier turns in `history`."""
    refuse_unread(row, "tools")
    return _inline_pair(row, row_id, source, with_system(alpaca_prompt(row), row.get("system")))


def alpaca_prompt(row: Row) -> list[Message]:
    """Read the prompt of a row of LLaMA-Factory's alpaca format: `instruction`, `input` and `history`."""
    texts = [row[name] for name in ("instruction", "input") if row.get(name) not in (None, "")]
    if not all(isinstance(text, str) for text in texts):
        raise RowError("malformed_row", f"instruction and input must be strings, found {preview(texts)}")
    history = row.get("history") or []
    if not isinstance(history, list) or not all(isinstance(turns, list) and len(turns) == 2 for turns in history):
        raise RowError("malformed_row", f"history must be a list of [question, answer] lists, found {preview(history)}")
    prompt: list[Message] = []
    for question, answer in history:
        prompt += [user_turn(question, "history", inline=True)]
        prompt += [user_turn(answer, "history", inline=True) | {"role": "assistant"}]
    return [*prompt, user_turn("\n".join(texts), "instruction", inline=True)]


def _from_swift(row: Row, row_id: str, source: str) -> PreferencePair:
    """ms-swift: `messages` end with the chosen answer; the rejected side has another answer, other images, or both.

    Its `objects` hold the boxes that `<bbox>` in the texts stands for.
    """
    refuse_unread(row, "tools", "objects")
    turns, rejected_turns = row.get("messages"), row.get("rejected_messages")
    if not isinstance(turns, list):
        raise RowError("malformed_row", f"messages must be a list, found {preview(turns)}")
    prompt = read_messages(turns[:-1], "messages before the last one", inline=True)
    chosen = rejected = read_answer(turns[-1:], "the last of messages", inline=True)
    rejected_images = read_images(row.get("rejected_images")) or None
    if rejected_turns is not None:
        if not isinstance(rejected_turns, list) or rejected_turns[:-1] != turns[:-1]:
            raise RowError("malformed_row", "rejected_messages must equal messages except for the last one")
        rejected = read_answer(rejected_turns[-1:], "the last of rejected_messages", inline=True)
    elif row.get("rejected_response") is not None:
        rejected = read_answer(row["rejected_response"], "rejected_response", inline=True)
    elif rejected_images is None:
        raise RowError("malformed_row", "one of rejected_response, rejected_messages and rejected_images is required")
    prompt = with_system(prompt, row.get("system"))
    return make_pair(row_id, source, row_images(row), prompt, chosen, rejected, rejected_images)


def _from_llamafactory_v1(row: Row, row_id: str, source: str) -> PreferencePair:
    """LLaMA-Factory v1: two dialogues of typed content, equal up to the answers, which have the loss weight."""
    refuse_unread(row, "tools")
    chosen, rejected = row.get("chosen_messages"), row.get("rejected_messages")
    if not isinstance(chosen, list) or not isinstance(rejected, list):
        raise RowError("malformed_row", f"chosen_messages and rejected_messages must be lists, found {preview(chosen)}")
    prompt = read_messages(chosen[:-1], "chosen_messages before the last one")
    if read_messages(rejected[:-1], "rejected_messages before the last one") != prompt:
        raise RowError("malformed_row", "chosen_messages and rejected_messages must be equal except for the last one")
    better, worse = (read_answer(turns[-1:], "the last message") for turns in (chosen, rejected))
    return make_pair(row_id, source, row_images(row), prompt, better, worse)


def _from_rlaif_v(row: Row, row_id: str, source: str) -> PreferencePair:
    """openbmb/RLAIF-V-Dataset: one question about one image."""
    return _single_turn_pair(row, row_id, source, row.get("question"), "question", inline=False)


def _from_rlhf_v(row: Row, row_id: str, source: str) -> PreferencePair:
    """openbmb/RLHF-V-Dataset: question and answers as JSON in `text`."""
    parsed = _rlhf_v_text(row)
    if parsed is None:
        problem = f"text must be JSON with question, chosen and rejected, found {preview(row.get('text'))}"
        raise RowError("malformed_row", problem)
    return _single_turn_pair({**row, **parsed}, row_id, source, parsed["question"], "question", inline=False)


def _from_vlfeedback(row: Row, row_id: str, source: str) -> PreferencePair:
    """MMInstruction/VLFeedback: rated answers. The pair consists of those with the highest and lowest mean rating."""
    chosen, rejected = (read_answer(answer, "response") for answer in best_and_worst(rated_in_vlfeedback(row)))
    images = row_images(row, ("images", "image", "img_path"))
    return make_pair(row_id, source, images, [user_turn(row.get("prompt"), "prompt")], chosen, rejected)


def _from_mmpr(row: Row, row_id: str, source: str) -> PreferencePair:
    """OpenGVLab/MMPR: one question about any number of images."""
    return _single_turn_pair(row, row_id, source, row.get("question"), "question")


def _from_nemo_rl(row: Row, row_id: str, source: str) -> PreferencePair:
    """NeMo-RL: `context` and ranked `completions`; the lowest rank is the best."""
    chosen, rejected = (read_answer(answer, "completion") for answer in best_and_worst(rated_in_nemo_rl(row)))
    return make_pair(row_id, source, row_images(row), read_prompt(row.get("context"), "context"), chosen, rejected)


def _single_turn_pair(
    row: Row, row_id: str, source: str, question: Any, name: str, inline: bool = True
) -> PreferencePair:
    """Make a pair from one question, with the answers in `chosen` and `rejected`."""
    prompt = with_system([user_turn(question, name, inline)], row.get("system"))
    return _inline_pair(row, row_id, source, prompt, inline)


def _inline_pair(row: Row, row_id: str, source: str, prompt: list[Message], inline: bool = True) -> PreferencePair:
    chosen, rejected = (read_answer(row.get(name), name, inline) for name in ("chosen", "rejected"))
    return make_pair(row_id, source, row_images(row), prompt, chosen, rejected)


def _rlhf_v_text(row: Row) -> dict[str, Any] | None:
    """Parse question, chosen and rejected from the JSON in `text`; None if they are not there."""
    value = row.get("text")
    try:
        parsed = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return None
    names = ("question", "chosen", "rejected")
    if not isinstance(parsed, Mapping) or not all(name in parsed for name in names):
        return None
    return {name: parsed[name] for name in names}


def _check_renames(columns: list[str], renames: Mapping[str, str], requested: str, source: str) -> None:
    known = _columns_of(requested)
    for name, column in renames.items():
        # Only the adapter knows which columns it reads, so any name is accepted for one.
        if column in columns and (name in known or ":" in requested):
            continue
        problem = f"no column {column!r}" if column not in columns else f"the format has no column {name!r}"
        raise UserError(
            f"{problem}; the columns are: {', '.join(sorted(columns))}",
            field=f"data.columns.{name}",
            value=column,
            fix=f"map one of {', '.join(known)} to a column of {source}",
        )


def _is_dialogue(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 1


def renamed(row: Row, renames: Mapping[str, str]) -> dict[str, Any]:
    """Rename the columns of a row to the format's names. A renamed column replaces one that already has that name."""
    others = {name: value for name, value in row.items() if name not in renames}
    return others | {name: row[column] for name, column in renames.items() if column in row}


def _apply_adapter(row: dict[str, Any], name: str) -> tuple[dict[str, Any], str]:
    """Convert a row with the user's adapter. Returns the new row, with the id of the old one, and its format."""
    ids = {key: row[key] for key in ("id", "idx") if key in row}
    converted = call_adapter(name, row)
    try:
        return ids | converted, detect_format(converted, [converted], {}, "auto", name)
    except UserError as error:
        raise RowError("adapter_failed", f"{name} returned a row that cannot be used: {error.problem}") from None


@dataclass(frozen=True)
class _Format:
    """How to read rows of a format, and how to detect them."""

    read: Callable[[Row, str, str], PreferencePair]
    """Converts (row, id, source) to a pair."""
    required: tuple[str, ...]
    """Columns that every row has."""
    any_of: tuple[str, ...] = ()
    """Columns of which every row has at least one."""
    detected_by: tuple[str, ...] = ()
    """Columns of which the source must have at least one for automatic detection."""
    accepts: Callable[[Row], bool] | None = None
    """Condition on a row; automatic detection requires one of the first rows to meet it."""
    optional: tuple[str, ...] = ()
    """Further columns that are read."""
    rated: Callable[[Row], Rated] | None = None
    """Reads all rated answers of a row; None if the rows of the format are pairs."""

    def missing_columns(self, present: set[str]) -> list[str]:
        """Return the columns that are missing to read rows with these columns."""
        return [name for name in self.required if name not in present] + _none_of(self.any_of, present)

    def missing_for_detection(self, present: set[str]) -> list[str]:
        """Return the columns that are missing to detect the format automatically."""
        return self.missing_columns(present) + _none_of(self.detected_by, present)


def _none_of(names: tuple[str, ...], present: set[str]) -> list[str]:
    return [" or ".join(names)] if names and not present & set(names) else []


def _describe(missing: list[str]) -> str:
    return ", ".join(missing) if missing else "the expected values in its columns"


def _detect_automatically(present: set[str], first_rows: Sequence[Row]) -> str | None:
    for name, layout in _FORMATS.items():
        accepted = layout.accepts is None or any(map(layout.accepts, first_rows))
        if accepted and not layout.missing_for_detection(present):
            return name
    # TRL rows without a prompt column need more evidence: the prompt may be in a column of another name, which would
    # be ignored silently.
    if _FORMATS["trl"].missing_columns(present):
        return None
    dialogues = any(_is_dialogue(row.get("chosen")) and _is_dialogue(row.get("rejected")) for row in first_rows)
    return "trl" if dialogues or present <= {"chosen", "rejected", *_SHARED_COLUMNS} else None


def _columns_of(requested: str) -> list[str]:
    """Return the column names that `data.columns` may use: those of the requested format, or of all formats."""
    layouts = [_FORMATS[requested]] if requested in _FORMATS else _FORMATS.values()
    names = [
        name for layout in layouts for name in (*layout.required, *layout.any_of, *layout.detected_by, *layout.optional)
    ]
    return list(dict.fromkeys((*_SHARED_COLUMNS, *names)))


def _all_strings(row: Row) -> bool:
    return all(isinstance(row.get(name), str) for name in ("prompt", "chosen", "rejected"))


def _has_rlhf_v_text(row: Row) -> bool:
    return _rlhf_v_text(row) is not None


_ANSWERS = ("chosen", "rejected")
_RLAIF_V = ("ds_name", "origin_dataset", "origin_split", "image_path")
# Detection takes the first match, so specific formats come before general ones.
_FORMATS = {
    "plain": _Format(
        _from_plain, ("prompt", *_ANSWERS), detected_by=("image",), accepts=_all_strings, optional=("system",)
    ),
    "trl": _Format(_from_trl, _ANSWERS, detected_by=("prompt",)),
    "sharegpt": _Format(_from_sharegpt, ("conversations", *_ANSWERS), optional=("system",)),
    "alpaca": _Format(_from_alpaca, ("instruction", *_ANSWERS), optional=("input", "system", "history")),
    "swift": _Format(
        _from_swift,
        ("messages",),
        any_of=("rejected_response", "rejected_messages", "rejected_images"),
        optional=("system",),
    ),
    "llamafactory-v1": _Format(_from_llamafactory_v1, ("chosen_messages", "rejected_messages")),
    "rlaif-v": _Format(_from_rlaif_v, ("image", "question", *_ANSWERS), detected_by=_RLAIF_V),
    "rlhf-v": _Format(_from_rlhf_v, ("image", "text"), accepts=_has_rlhf_v_text),
    "vlfeedback": _Format(
        _from_vlfeedback, ("prompt", "completions"), optional=("img_path",), rated=rated_in_vlfeedback
    ),
    "mmpr": _Format(_from_mmpr, ("question", *_ANSWERS), optional=("system",)),
    "nemo-rl": _Format(_from_nemo_rl, ("context", "completions"), rated=rated_in_nemo_rl),
}
