"""A recipe in the making: what another trainer's config says, taken field by field, and what has no counterpart."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
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
    trainer: str | None = None
    """Method that their script's program trains with, such as `dpo`; None if unknown."""
    recipe: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    """Fields that were not carried over, or not exactly, with the reason."""
    origins: dict[str, str] = field(default_factory=dict)
    """Their name of each field of the recipe that was carried over as it is."""

    def take(self, *names: str) -> Any:
        """Take the first of these fields that has a value, or a default; None if none has. The others are dropped."""
        return self.take_named(*names)[1]

    def take_named(self, *names: str) -> tuple[str, Any]:
        """Take a value as `take` does, with the name of its field. Without a value, the name is the first."""
        given = [(name, value) for name in names if (value := self.theirs.pop(name, None)) not in (None, "", [], {})]
        defaults = [(name, self.defaults[name]) for name in names if name in self.defaults]
        return next(iter(given + defaults), (names[0], None))

    def take_number(self, names: Iterable[str], path: str, kind: type[int] | type[float] = float) -> float | None:
        """Take a number that a field of the recipe is made of. A value of another kind is listed."""
        name, value = self.take_named(*names)
        return self._read(name, value, path, kind)

    def take_text(self, name: str, path: str) -> str | None:
        """Take a text that a field of the recipe is made of. A value of another kind is listed."""
        text: str | None = self._read(name, self.take(name), path, str)
        return text

    def peek_number(self, name: str, default: int) -> int:
        """Read a whole number above 0 without taking it; the default if there is none."""
        try:
            return max(1, as_number(self.theirs.get(name) or default, int))
        except ValueError:
            return default

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
        name, value = self.take_named(*names)
        self.put(path, self._read(name, value, path, kind))

    def _read(self, name: str, value: Any, path: str, kind: type) -> Any:
        if value is None:
            return None
        self.origins[path] = name
        try:
            return _READERS[kind](value)
        except ValueError:
            self.note(name, value, f"not understood; it would be {path}")
            return None

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


def as_number(value: Any, kind: type[int] | type[float]) -> Any:
    """Read a finite number that may be text. Raises ValueError, also for a boolean and for a fraction of an `int`."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError("not a number of this kind")
    try:
        number = float(value)
    except OverflowError:
        raise ValueError("not a number of this kind") from None
    if not math.isfinite(number) or (kind is int and not number.is_integer()):
        raise ValueError("not a number of this kind")
    return kind(number)


def _as_text(value: Any) -> str:
    """Read a text. Raises ValueError for an option without a value, which is a boolean, and for lists."""
    if isinstance(value, bool | list | dict):
        raise ValueError(value)
    return str(value)


_READERS: dict[type, Callable[[Any], Any]] = {
    bool: as_bool,
    str: _as_text,
    int: lambda value: as_number(value, int),
    float: lambda value: as_number(value, float),
}


def is_true(value: Any) -> bool:
    """Whether a value is true; anything that is no boolean is not."""
    try:
        return value is not None and as_bool(value)
    except ValueError:
        return False
