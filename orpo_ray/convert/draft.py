"""A recipe in the making: what another trainer's config says, taken field by field, and what has no counterpart."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

VALUE_SHOWN = 60  # characters


@dataclass
class Draft:
    """Takes their fields one by one; what is left at the end is listed too."""

    theirs: dict[str, Any]
    """Their fields that were not taken yet."""
    defaults: dict[str, Any] = field(default_factory=dict)
    """Values of fields that their config leaves out."""
    recipe: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    """Fields that were not carried over, or not exactly, with the reason."""

    def take(self, *names: str) -> Any:
        """Take the first of these fields that has a value, or a default; None if none has. The others are dropped."""
        given = [value for name in names if (value := self.theirs.pop(name, None)) not in (None, "", [], {})]
        defaults = [self.defaults[name] for name in names if name in self.defaults]
        return next(iter(given + defaults), None)

    def put(self, path: str, value: Any) -> None:
        """Set a field of the recipe, unless the value is None."""
        if value is None:
            return
        *sections, last = path.split(".")
        section = self.recipe
        for name in sections:
            section = section.setdefault(name, {})
        section[last] = value

    def note(self, name: str, value: Any, reason: str) -> None:
        """List a field that was not carried over."""
        shown = json.dumps(value, ensure_ascii=True, default=str)
        shown = shown if len(shown) <= VALUE_SHOWN else shown[: VALUE_SHOWN - 3] + "..."
        self.notes.append(f"{name}: {shown}, {reason}")

    def move(self, names: Iterable[str], path: str, kind: type[int] | type[float] | type[bool] | type[str]) -> None:
        """Carry a field over as it is. A value of another kind is listed instead."""
        names = tuple(names)
        value = self.take(*names)
        if value is None:
            return
        try:
            self.put(path, as_bool(value) if kind is bool else kind(value))
        except (TypeError, ValueError):
            self.note(names[0], value, f"not understood; it would be {path}")

    def drop(self, reasons: Mapping[str, str]) -> None:
        """List fields without a counterpart that have a value which matters; drop others without a word."""
        for name, reason in reasons.items():
            if (value := self.theirs.pop(name, None)) not in (None, "", [], {}, False) and reason:
                self.note(name, value, reason)

    def drop_rest(self) -> None:
        """List everything that is left."""
        for name, value in self.theirs.items():
            if value not in (None, "", [], {}):
                self.note(name, value, "no counterpart")
        self.theirs = {}


def as_bool(value: Any) -> bool:
    """Read a boolean that may be text, as in arguments of a shell script. Raises ValueError."""
    if isinstance(value, bool):
        return value
    text = str(value).strip().lower()
    if text in ("true", "yes", "1", "on"):
        return True
    if text in ("false", "no", "0", "off", "none"):
        return False
    raise ValueError(text)


def is_true(value: Any) -> bool:
    """Whether a value is true; anything that is no boolean is not."""
    try:
        return value is not None and as_bool(value)
    except ValueError:
        return False
