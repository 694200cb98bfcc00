"""Types of recipe fields: strict numbers, texts, paths, names, and what can be written in several ways.

They raise ValueError, which pydantic reports.
"""

from __future__ import annotations

import difflib
import math
import re
from collections import Counter
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

LARGEST = 1e12  # of all numbers of a recipe, so that products of several fit 64 bits and a float
MAX_TEXT = 2048  # bytes; half of the longest path that Linux opens
MAX_FILE_NAME = 255  # bytes
MAX_NAME = 100  # characters of a run's name; the names of its trials and files are longer
# What a run writes to its folder, so the folder of another run must not have these names.
RESERVED_NAMES = (
    "best_recipe.yaml", "bad_rows.jsonl", "data", "data.json", "data_check.html", "data_check.json",
    "environment.json", "eval_pairs.parquet", "eval_pairs_start.parquet", "eval_tokens.json", "export",
    "export-adapter", "final", "generations.jsonl", "lease.json", "metrics.jsonl", "optuna.journal", "recipe.yaml",
    "report.html", "rounds.json", "sweep.html", "sweep.json", "tensorboard", "trials", "trials.csv", "wandb",
)  # fmt: skip
PARTS = ("language", "connector", "vision")
FORMATS = (
    "trl", "plain", "sharegpt", "alpaca", "swift", "llamafactory-v1", "rlaif-v", "rlhf-v", "vlfeedback", "mmpr",
    "nemo-rl",
)  # fmt: skip
_NUMBER = re.compile(r"[+-]?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*")


def as_number(value: Any) -> Any:
    """Convert text such as `1e-4`, which YAML 1.1 reads as text, to a number. Pydantic itself takes more for numbers:
    `true`, `"1_0"` and `" 10 "`.
    """
    if isinstance(value, bool):
        raise ValueError("Input should be a valid number, not true or false")
    if isinstance(value, str):
        if len(value) > 40 or not _NUMBER.fullmatch(value):
            raise ValueError("Input should be a valid number")
        value = float(value) if re.search("[.eE]", value) else int(value)
    if isinstance(value, int | float) and abs(value) > LARGEST:
        raise ValueError(f"Input should be a number of at most {LARGEST:g}")
    return value


def as_choice(value: Any) -> Any:
    """Convert text that is a number, as `as_number` does, and check the rest; its field decides the type."""
    if isinstance(value, str):
        return as_number(value) if len(value) <= 40 and _NUMBER.fullmatch(value) else _check_text(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value
    if not math.isfinite(value):
        raise ValueError("Input should be a finite number")
    return as_number(value)


def _check_text(value: str) -> str:
    if found := re.search(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]", value):
        raise ValueError(f"must not contain the control character {found[0]!r}")
    if (size := len(value.encode())) > MAX_TEXT:
        raise ValueError(f"must have at most {MAX_TEXT} bytes in UTF-8, and has {size}")
    return value


def _check_path(value: str) -> str:
    longest = max((len(part.encode()) for part in value.split("/")), default=0)
    if longest > MAX_FILE_NAME:
        raise ValueError(f"no file can have a name of {longest} bytes; at most {MAX_FILE_NAME} are possible")
    return value


def _check_name(value: str) -> str:
    if not _NAME.fullmatch(value):
        raise ValueError("must consist of letters, digits, '.', '_' and '-', since it names the run folder")
    first, *others = value.split("/")
    if max(map(len, (first, *others))) > MAX_NAME:
        raise ValueError(f"must have at most {MAX_NAME} characters, since it names the run folder")
    for place, name in enumerate(others, 1):
        is_sweep = name == "trials" and place < len(others)  # a sweep runs its trials as `<name>/trials/<trial>`
        if (name in RESERVED_NAMES or name.startswith("checkpoint_")) and not is_sweep:
            raise ValueError(f"'{name}' in the folder of the run '{first}' belongs to that run")
    return value


def _string_as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _as_weighted_sources(value: Any) -> Any:
    if value is None:
        return {}
    if isinstance(value, str):
        return {value: 1.0}
    if isinstance(value, list) and all(isinstance(uri, str) for uri in value):
        return {uri: float(times) for uri, times in Counter(value).items()}
    return value


def _as_checkpointing(value: Any) -> Any:
    return ("full" if value else "none") if isinstance(value, bool) else value


def _as_workers(value: Any) -> Any:
    if not isinstance(value, list):
        return _as_count(value)
    if len(value) != 2:
        raise ValueError("must be a number or [min, max]")
    low, high = map(_as_count, value)
    if low > high:
        raise ValueError("must be [min, max], and the first is greater than the second")
    return low if low == high else [low, high]


def _as_count(value: Any) -> int:
    count = as_number(value)
    if not isinstance(count, int) or count < 1:
        raise ValueError("Input should be a whole number of at least 1")
    return count


def _check_format(value: str) -> str:
    if value == "auto" or value in FORMATS or re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", value):
        return value
    near = difflib.get_close_matches(value, FORMATS, n=1, cutoff=0.5)
    hint = f"did you mean '{near[0]}'?" if near else f"use auto, {', '.join(FORMATS)}, or module:function"
    raise ValueError(f"unknown format; {hint}")


# After bounds in an `Annotated`, so that they stay bounds of the number in the JSON schema.
NUMBER = BeforeValidator(as_number)
Int = Annotated[int, NUMBER]
Float = Annotated[float, NUMBER]
Text = Annotated[str, AfterValidator(_check_text)]
PathText = Annotated[Text, AfterValidator(_check_path)]
RunName = Annotated[str, AfterValidator(_check_name)]

Fraction = Annotated[float, Field(ge=0, le=1), NUMBER]
Names = Annotated[list[Text], BeforeValidator(_string_as_list)]
Checkpointing = Literal["none", "selective", "full", "auto"]
CheckpointingField = Annotated[
    Checkpointing, BeforeValidator(_as_checkpointing, json_schema_input_type=Checkpointing | bool)
]
FrozenParts = Annotated[list[Literal["vision", "connector", "language"]], BeforeValidator(_string_as_list)]
OtherImage = Literal["exchange", "exchange_other_answer", "crop", "noise", "blank", "column"]
PairsFromRanking = Literal["best_worst", "best_rest", "all"]
RowFormat = Annotated[str, AfterValidator(_check_format)]
Weight = Annotated[float, Field(gt=0, le=1000), NUMBER]
WorkerRange = Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=2, max_length=2)]
NumWorkers = Annotated[
    int | list[int], BeforeValidator(_as_workers, json_schema_input_type=Annotated[int, Field(ge=1)] | WorkerRange)
]
WeightedSources = Annotated[
    dict[PathText, Weight],
    BeforeValidator(_as_weighted_sources, json_schema_input_type=str | list[str] | dict[PathText, Weight]),
]
