"""Types of recipe fields: strict numbers, texts, paths and names. They raise ValueError, which pydantic reports."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator

LARGEST = 1e12  # of all numbers of a recipe, so that products of several fit 64 bits and a float
MAX_TEXT = 2048  # bytes; half of the longest path that Linux opens
MAX_FILE_NAME = 255  # bytes
MAX_NAME = 100  # characters of a run's name; the names of its trials and files are longer
# What a run writes to its folder, so the folder of another run must not have these names.
RESERVED_NAMES = (
    "best_recipe.yaml", "bad_rows.jsonl", "data", "data.json", "data_check.html", "data_check.json", "export",
    "export-adapter", "final", "lease.json", "metrics.jsonl", "recipe.yaml", "trials",
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


# After bounds in an `Annotated`, so that they stay bounds of the number in the JSON schema.
NUMBER = BeforeValidator(as_number)
Int = Annotated[int, NUMBER]
Float = Annotated[float, NUMBER]
Text = Annotated[str, AfterValidator(_check_text)]
PathText = Annotated[Text, AfterValidator(_check_path)]
RunName = Annotated[str, AfterValidator(_check_name)]
