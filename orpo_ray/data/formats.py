"""Which format the rows of a source have, and one raw row of any format -> `PreferencePair`. One function per format.

Where `<image>` stands inline it marks an image's place: there are as many as images, or none. It does so in all
formats but trl, rlaif-v, rlhf-v, vlfeedback and nemo-rl, whose texts are taken as they are.
"""

from __future__ import annotations

import functools
import importlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orpo_ray.data.pairs import (
    Message,
    PreferencePair,
    best_and_worst,
    extract_prompt,
    make_pair,
    read_answer,
    read_images,
    read_messages,
    read_prompt,
    read_records,
    row_images,
    shown,
    user_turn,
    with_system,
)
from orpo_ray.errors import RowError, UserError

Row = Mapping[str, Any]
_SHARED_COLUMNS = ("id", "idx", "images", "image")


def recognise(
    columns: Iterable[str], first_rows: Sequence[Row], renames: Mapping[str, str], requested: str, source: str
) -> str:
    """The format of a source with these columns and first rows. Raises UserError naming what is missing.

    requested: the recipe's `data.format`. source: its name, for the error.
    """
    columns = [str(column) for column in columns]
    there = ", ".join(sorted(columns))
    _check_renames(columns, renames, requested, source)
    if ":" in requested:
        _adapter(requested)
        return requested
    present = set(_renamed(dict.fromkeys(columns), renames))
    if requested == "auto":
        if found := _recognise_auto(present, [_renamed(row, renames) for row in first_rows]):
            return found
        nearest = sorted(_FORMATS, key=lambda name: len(_FORMATS[name].auto_lacks(present)))[:3]
        raise UserError(
            f"the rows are of no known format; they have: {there}; "
            + "; ".join(f"{name} lacks {_listed(_FORMATS[name].auto_lacks(present))}" for name in nearest),
            field=source,
            fix="rename with data.columns, name the format in data.format, or write an adapter (module:function)",
        )
    if lacks := _FORMATS[requested].lacks(present):
        raise UserError(
            f"the rows lack {_listed(lacks)} of format {requested}; they have: {there}",
            field=source,
            fix="rename with data.columns, or set data.format to the format of these rows",
        )
    return requested


def to_pair(row: Row, format_name: str, renames: Mapping[str, str], fallback_id: str) -> PreferencePair:
    """Turn one raw row into a pair. Raises RowError if the row cannot be one."""
    row = _renamed(row, renames)
    try:
        if ":" in format_name:
            row, format_name = _adapted(row, format_name)
        return _FORMATS[format_name].read(row, _id_of(row, fallback_id), fallback_id)
    except RecursionError:
        raise RowError("malformed_row", "the values are nested too deep") from None


def id_of(row: Row, renames: Mapping[str, str], fallback_id: str) -> str:
    """The id of a raw row that may not be fit for a pair."""
    return _id_of(_renamed(row, renames), fallback_id)


def _id_of(row: Row, fallback_id: str) -> str:
    return next((str(row[key]) for key in ("id", "idx") if row.get(key) is not None), fallback_id)


def _from_trl(row: Row, row_id: str, source: str) -> PreferencePair:
    """TRL: strings or lists of messages, the prompt apart or within both answers.

    `rejected_images` is our own: what `data prepare` writes of pairs whose answers were given to different images.
    """
    prompt, chosen, rejected = row.get("prompt"), row.get("chosen"), row.get("rejected")
    # Some datasets repeat a prompt string beside dialogues that begin with it.
    if "prompt" not in row or (isinstance(prompt, str) and _is_dialogue(chosen) and _is_dialogue(rejected)):
        prompt, chosen, rejected = extract_prompt(chosen, rejected)
    chosen, rejected = read_answer(chosen, "chosen"), read_answer(rejected, "rejected")
    rejected_images = read_images(row.get("rejected_images")) or None
    prompt = read_prompt(prompt, "prompt")
    return make_pair(row_id, source, row_images(row), prompt, chosen, rejected, rejected_images)


def _from_plain(row: Row, row_id: str, source: str) -> PreferencePair:
    """Strings `prompt`, `chosen`, `rejected` beside an image."""
    return _one_turn(row, row_id, source, row.get("prompt"), "prompt")


def _from_sharegpt(row: Row, row_id: str, source: str) -> PreferencePair:
    """LLaMA-Factory's ranking rows: `conversations` up to the answer, `chosen` and `rejected` messages."""
    prompt = read_messages(row.get("conversations"), "conversations", inline=True)
    roles = [message["role"] for message in prompt]
    if strange := sorted(set(roles) - {"system", "user", "assistant"}):
        raise RowError("malformed_row", f"conversations may hold human, gpt and system turns, found {shown(strange)}")
    if roles[-1] != "user":
        raise RowError("malformed_row", f"conversations must end on a human turn, found {roles[-1]}")
    return _inline_pair(row, row_id, source, with_system(prompt, row.get("system")))


def _from_alpaca(row: Row, row_id: str, source: str) -> PreferencePair:
    """LLaMA-Factory's alpaca ranking rows: `instruction` and `input`, with earlier turns in `history`."""
    asked = [row[name] for name in ("instruction", "input") if row.get(name) not in (None, "")]
    if not all(isinstance(text, str) for text in asked):
        raise RowError("malformed_row", f"instruction and input must be strings, found {shown(asked)}")
    history = row.get("history") or []
    if not isinstance(history, list) or not all(isinstance(turns, list) and len(turns) == 2 for turns in history):
        raise RowError("malformed_row", f"history must be a list of [question, answer], found {shown(history)}")
    prompt: list[Message] = []
    for question, answer in history:
        prompt += [user_turn(question, "history", inline=True)]
        prompt += [user_turn(answer, "history", inline=True) | {"role": "assistant"}]
    prompt += [user_turn("\n".join(asked), "instruction", inline=True)]
    return _inline_pair(row, row_id, source, with_system(prompt, row.get("system")))


def _from_swift(row: Row, row_id: str, source: str) -> PreferencePair:
    """ms-swift: `messages` end on the chosen answer; the rejected side is another answer, other images, or both."""
    turns, rejected_turns = row.get("messages"), row.get("rejected_messages")
    if not isinstance(turns, list):
        raise RowError("malformed_row", f"messages must be a list, found {shown(turns)}")
    prompt = read_messages(turns[:-1], "messages before the answer", inline=True)
    chosen = rejected = read_answer(turns[-1:], "the last of messages", inline=True)
    rejected_images = read_images(row.get("rejected_images")) or None
    if rejected_turns is not None:
        if not isinstance(rejected_turns, list) or rejected_turns[:-1] != turns[:-1]:
            raise RowError("malformed_row", "rejected_messages must be as messages up to the answer")
        rejected = read_answer(rejected_turns[-1:], "the last of rejected_messages", inline=True)
    elif row.get("rejected_response") is not None:
        rejected = read_answer(row["rejected_response"], "rejected_response", inline=True)
    elif rejected_images is None:
        raise RowError("malformed_row", "there is no rejected_response, rejected_messages or rejected_images")
    prompt = with_system(prompt, row.get("system"))
    return make_pair(row_id, source, row_images(row), prompt, chosen, rejected, rejected_images)


def _from_rlaif_v(row: Row, row_id: str, source: str) -> PreferencePair:
    """openbmb/RLAIF-V-Dataset: one question to one image."""
    return _one_turn(row, row_id, source, row.get("question"), "question", inline=False)


def _from_rlhf_v(row: Row, row_id: str, source: str) -> PreferencePair:
    """openbmb/RLHF-V-Dataset: question and answers are JSON in `text`."""
    parsed = _rlhf_v_text(row)
    if parsed is None:
        problem = f"text must be JSON with question, chosen and rejected, found {shown(row.get('text'))}"
        raise RowError("malformed_row", problem)
    return _one_turn({**row, **parsed}, row_id, source, parsed["question"], "question", inline=False)


def _from_vlfeedback(row: Row, row_id: str, source: str) -> PreferencePair:
    """MMInstruction/VLFeedback: several answers with ratings; the best against the worst by their mean rating."""
    rated = []
    for completion in read_records(row.get("completions"), "completions"):
        if not isinstance(completion, Mapping):
            raise RowError("malformed_row", f"a completion must be a mapping, found {shown(completion)}")
        mean = _mean_rating(completion.get("annotations"))
        if mean is not None and completion.get("response") not in (None, ""):
            rated.append((mean, completion["response"]))
    chosen, rejected = (read_answer(answer, "response") for answer in best_and_worst(rated))
    images = row_images(row, ("images", "image", "img_path"))
    return make_pair(row_id, source, images, [user_turn(row.get("prompt"), "prompt")], chosen, rejected)


def _from_mmpr(row: Row, row_id: str, source: str) -> PreferencePair:
    """OpenGVLab/MMPR: one question to any number of images."""
    return _one_turn(row, row_id, source, row.get("question"), "question")


def _from_nemo_rl(row: Row, row_id: str, source: str) -> PreferencePair:
    """NeMo-RL: `context` and ranked `completions`, the lowest rank the best."""
    ranked = []
    for completion in read_records(row.get("completions"), "completions"):
        rank = completion.get("rank") if isinstance(completion, Mapping) else None
        if isinstance(rank, bool) or not isinstance(rank, int | float) or rank != rank:  # NaN
            raise RowError("malformed_row", f"a completion must have a number as rank, found {shown(completion)}")
        ranked.append((-rank, completion.get("completion")))
    chosen, rejected = (read_answer(answer, "completion") for answer in best_and_worst(ranked))
    return make_pair(row_id, source, row_images(row), read_prompt(row.get("context"), "context"), chosen, rejected)


def _one_turn(row: Row, row_id: str, source: str, question: Any, name: str, inline: bool = True) -> PreferencePair:
    """A pair of one question, with the answers in `chosen` and `rejected`."""
    prompt = with_system([user_turn(question, name, inline)], row.get("system"))
    return _inline_pair(row, row_id, source, prompt, inline)


def _inline_pair(row: Row, row_id: str, source: str, prompt: list[Message], inline: bool = True) -> PreferencePair:
    chosen, rejected = (read_answer(row.get(name), name, inline) for name in ("chosen", "rejected"))
    return make_pair(row_id, source, row_images(row), prompt, chosen, rejected)


def _mean_rating(annotations: Any) -> float | None:
    """Over the aspects that have a number as rating; None if none has."""
    if annotations is None:
        return None
    if not isinstance(annotations, Mapping):
        raise RowError("malformed_row", f"annotations must be a mapping of aspects, found {shown(annotations)}")
    ratings = []
    for aspect in annotations.values():
        rating = aspect.get("Rating") if isinstance(aspect, Mapping) else aspect
        try:
            ratings.append(float(rating))  # type: ignore[arg-type]
        except (TypeError, ValueError, OverflowError):  # "N/A", missing, beyond a float
            continue
    ratings = [rating for rating in ratings if math.isfinite(rating)]
    return sum(ratings) / len(ratings) if ratings else None


def _rlhf_v_text(row: Row) -> dict[str, Any] | None:
    """The three values that RLHF-V keeps as JSON in `text`."""
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
    for ours, theirs in renames.items():
        # What an adapter reads, only it knows.
        if theirs in columns and (ours in known or ":" in requested):
            continue
        problem = f"no column {theirs!r}" if theirs not in columns else f"the format has no column {ours!r}"
        raise UserError(
            f"{problem}; the rows have: {', '.join(sorted(columns))}",
            field=f"data.columns.{ours}",
            value=theirs,
            fix=f"map one of {', '.join(known)} to a column of {source}",
        )


def _is_dialogue(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 1


def _renamed(row: Row, renames: Mapping[str, str]) -> dict[str, Any]:
    """The row under the format's own names; a column that a rename puts out of place is left out."""
    kept = {name: value for name, value in row.items() if name not in renames}
    return kept | {ours: row[theirs] for ours, theirs in renames.items() if theirs in row}


@functools.cache
def _adapter(name: str) -> Callable[[dict[str, Any]], Any]:
    """The user's function `module:function`; the module may lie in the current folder. Raises UserError."""
    module_name, _, function_name = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        function = getattr(importlib.import_module(module_name), function_name, None)
    except (Exception, SystemExit) as error:  # noqa: BLE001 - a module of the user's may raise anything
        raise UserError(
            f"the adapter's module cannot be imported: {type(error).__name__}: {error}",
            field="data.format",
            value=name,
            fix="name a module in the current folder, or an installed one",
        ) from None
    if not callable(function):
        raise UserError(f"{module_name} has no function {function_name}", field="data.format", value=name)
    return function


def _adapted(row: dict[str, Any], name: str) -> tuple[dict[str, Any], str]:
    """What the user's adapter makes of a row, and the format of that. A row keeps its id."""
    ids = {key: row[key] for key in ("id", "idx") if key in row}
    function = _adapter(name)
    try:
        made = function(row)
    except RowError:
        raise
    except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever it raises is for the report of this row
        raise RowError("adapter_failed", f"{type(error).__name__}: {error}") from None
    if not isinstance(made, Mapping):
        raise RowError("adapter_failed", f"{name} returned no row: {shown(made)}")
    try:
        return ids | dict(made), recognise(made, [made], {}, "auto", name)
    except UserError as error:
        raise RowError("adapter_failed", f"{name} returned a row: {error.problem}") from None


@dataclass(frozen=True)
class _Format:
    """How a format is read, and told from the others.

    read: (row, id, source) -> pair. required: columns that its rows have; one_of: and at least one of these. told_by,
    looks_right: without being asked for, it is recognised by one of these columns and a first row of this look.
    optional: further columns that it reads.
    """

    read: Callable[[Row, str, str], PreferencePair]
    required: tuple[str, ...]
    one_of: tuple[str, ...] = ()
    told_by: tuple[str, ...] = ()
    looks_right: Callable[[Row], bool] | None = None
    optional: tuple[str, ...] = ()

    def lacks(self, present: set[str]) -> list[str]:
        """What is missing among these columns."""
        return [name for name in self.required if name not in present] + _none_of(self.one_of, present)

    def auto_lacks(self, present: set[str]) -> list[str]:
        """What is missing to recognise it."""
        return self.lacks(present) + _none_of(self.told_by, present)


def _none_of(names: tuple[str, ...], present: set[str]) -> list[str]:
    return [" or ".join(names)] if names and not present & set(names) else []


def _listed(lacks: list[str]) -> str:
    return ", ".join(lacks) if lacks else "the right values in them"


def _recognise_auto(present: set[str], first_rows: Sequence[Row]) -> str | None:
    for name, layout in _FORMATS.items():
        looks_right = layout.looks_right is None or any(map(layout.looks_right, first_rows))
        if looks_right and not layout.auto_lacks(present):
            return name
    # TRL's rows without a prompt are told with care: a prompt under another name would be left out unseen.
    if _FORMATS["trl"].lacks(present):
        return None
    dialogues = any(_is_dialogue(row.get("chosen")) and _is_dialogue(row.get("rejected")) for row in first_rows)
    return "trl" if dialogues or present <= {"chosen", "rejected", *_SHARED_COLUMNS} else None


def _columns_of(requested: str) -> list[str]:
    """The names that `data.columns` may give: of the format, or of any."""
    layouts = [_FORMATS[requested]] if requested in _FORMATS else _FORMATS.values()
    names = [
        name for layout in layouts for name in (*layout.required, *layout.one_of, *layout.told_by, *layout.optional)
    ]
    return list(dict.fromkeys((*_SHARED_COLUMNS, *names)))


def _all_strings(row: Row) -> bool:
    return all(isinstance(row.get(name), str) for name in ("prompt", "chosen", "rejected"))


def _has_rlhf_v_text(row: Row) -> bool:
    return _rlhf_v_text(row) is not None


_ANSWERS = ("chosen", "rejected")
_RLAIF_V = ("ds_name", "origin_dataset", "origin_split", "image_path")
# The first that fits is taken: the particular stand before the general.
_FORMATS = {
    "plain": _Format(
        _from_plain, ("prompt", *_ANSWERS), told_by=("image",), looks_right=_all_strings, optional=("system",)
    ),
    "trl": _Format(_from_trl, _ANSWERS, told_by=("prompt",)),
    "sharegpt": _Format(_from_sharegpt, ("conversations", *_ANSWERS), optional=("system",)),
    "alpaca": _Format(_from_alpaca, ("instruction", *_ANSWERS), optional=("input", "system", "history")),
    "swift": _Format(
        _from_swift,
        ("messages",),
        one_of=("rejected_response", "rejected_messages", "rejected_images"),
        optional=("system",),
    ),
    "rlaif-v": _Format(_from_rlaif_v, ("image", "question", *_ANSWERS), told_by=_RLAIF_V),
    "rlhf-v": _Format(_from_rlhf_v, ("image", "text"), looks_right=_has_rlhf_v_text),
    "vlfeedback": _Format(_from_vlfeedback, ("prompt", "completions"), optional=("img_path",)),
    "mmpr": _Format(_from_mmpr, ("question", *_ANSWERS), optional=("system",)),
    "nemo-rl": _Format(_from_nemo_rl, ("context", "completions")),
}
