"""The language and the domain of a row: values of its columns, or the script of its texts (`data.language`)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from orpo_ray.data.pairs import Message
from orpo_ray.data.scripts import script_of

SCRIPT = "script"
"""In place of a column: the script of prompt and chosen answer together."""
KINDS = ("language", "domain")
"""What rows are grouped by; each is a field of the recipe, of a pair and of a held-out pair's scores."""
CHARACTERS = 60


@dataclass(frozen=True)
class Grouping:
    """What names the language and the domain of each row: a column, or None for nothing."""

    language: str | None = None
    """May be SCRIPT."""
    domain: str | None = None

    @property
    def columns(self) -> dict[str, str]:
        """The columns that name something, by what they name: `language`, `domain`."""
        named = {kind: getattr(self, kind) for kind in KINDS}
        if self.language == SCRIPT:
            del named["language"]
        return {kind: column for kind, column in named.items() if column is not None}

    def language_of(self, row: Mapping[str, Any], prompt: list[Message], chosen: str) -> str | None:
        """Return the language of a raw row, with the prompt and the answer that it was read as."""
        return script_of_pair(prompt, chosen) if self.language == SCRIPT else column_value(row, self.language)

    def domain_of(self, row: Mapping[str, Any]) -> str | None:
        """Return the domain of a raw row."""
        return column_value(row, self.domain)


def script_of_pair(prompt: list[Message], chosen: str) -> str:
    """Name the script of most letters of a prompt and its chosen answer."""
    parts = [part.get("text") or "" for turn in prompt for part in turn["content"]]
    return script_of(" ".join([*parts, chosen]))


def column_value(row: Mapping[str, Any], column: str | None) -> str | None:
    """Return the value of a column as text of at most CHARACTERS; None without the column or a value."""
    value = None if column is None else row.get(column)
    if value is None or value == "":
        return None
    text = value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
    text = text.encode(errors="replace").decode()  # lone surrogates cannot be written to a file
    return text if len(text) <= CHARACTERS else text[: CHARACTERS - 1] + "…"
