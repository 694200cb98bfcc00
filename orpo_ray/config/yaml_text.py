"""Read YAML with bounds, so that a file is read or refused within a second.

Numbers are written as in JSON. YAML 1.1, which PyYAML reads otherwise, takes `1_0` for 10, `017` for 15, `1:30` for 90
and `2026-01-31` for a date; here these are text.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from yaml.constructor import ConstructorError
from yaml.error import MarkedYAMLError
from yaml.events import AliasEvent, CollectionEndEvent, CollectionStartEvent, ScalarEvent

from orpo_ray.errors import UserError

MAX_BYTES = 1 << 20
MAX_VALUES = 20_000  # keys count too, and an alias counts as everything it stands for
MAX_DEPTH = 20  # sections and lists within one another
_FIXES = {"recipe": "correct it; recipes/quickstart.yaml is an example"}


def read_text(path: Path, kind: str = "recipe") -> str:
    """Read a recipe file, or one of another kind. Raises UserError if it is missing, too large or not UTF-8."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        text = data.decode("utf-8")
    except FileNotFoundError:
        raise UserError(f"no such {kind} file", field=str(path), fix="give the path of a YAML file") from None
    except OSError as error:
        problem = f"cannot read the {kind}: {error.strerror}"
        raise UserError(problem, field=str(path), fix="give the path of a YAML file") from None
    except ValueError as error:  # not UTF-8, or a path with a NUL
        problem = f"cannot read the {kind}: {error}"
        raise UserError(problem, field=str(path), fix="give the path of a YAML file in UTF-8") from None
    if len(data) > MAX_BYTES:
        raise UserError(
            f"the file is larger than a {kind} can be ({MAX_BYTES} bytes)",
            field=str(path),
            fix=f"give a {kind}; for many data files, name their folder or a glob",
        )
    return text


def parse_yaml(text: str, field: str, kind: str = "recipe") -> Any:
    """Parse YAML.

    Args:
        text: one document.
        field: file or recipe key, for error messages.
        kind: what the text belongs to, for error messages.

    Raises:
        UserError: the text is not valid YAML, has a tag, or exceeds a bound.
    """
    fix = _FIXES.get(kind, "correct it")
    if len(text) > MAX_BYTES:
        raise UserError(f"the value is longer than a {kind} can be ({MAX_BYTES} characters)", field=field, fix=fix)
    try:
        _check_bounds(text)
        return yaml.load(text, _Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        raise UserError(f"not valid YAML for a {kind}: {error}", field=field, fix=fix) from None


# The parser in C is ten times as fast; PyYAML can be built without it.
_Parser: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Loader(_Parser):
    def construct_object(self, node: Any, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except ValueError:  # Python reads no integers of more than 4,300 digits
            raise ConstructorError(None, None, "this number is too large", node.start_mark) from None


def _check_bounds(text: str) -> None:
    """Raise MarkedYAMLError if a document exceeds a bound. Reads it as a flat list of events, before it is composed."""
    values = 0
    sizes: dict[str | None, int] = {}  # anchor -> number of values of what it names
    opened: list[tuple[str | None, int]] = []  # (anchor, number of values before it) of each level
    event: Any
    for event in yaml.parse(text, _Loader):
        problem = None
        if isinstance(event, AliasEvent):
            values += sizes.get(event.anchor, 1)
            if event.anchor in (anchor for anchor, _ in opened):
                problem = f"the alias {event.anchor} stands for a part of itself"
        elif isinstance(event, CollectionStartEvent):
            opened.append((event.anchor, values))
            values += 1
        elif isinstance(event, CollectionEndEvent):
            anchor, before = opened.pop()
            sizes |= {anchor: values - before} if anchor else {}
        elif isinstance(event, ScalarEvent):
            values += 1
            sizes |= {event.anchor: 1} if event.anchor else {}
        if getattr(event, "tag", None) is not None:
            problem = f"tags ({event.tag}) are not supported"
        elif len(opened) > MAX_DEPTH:
            problem = f"more than {MAX_DEPTH} levels of nesting"
        elif values > MAX_VALUES:
            problem = f"more than {MAX_VALUES} values"
        if problem:
            raise MarkedYAMLError(problem=problem, problem_mark=event.start_mark)


_EXPONENT = r"([eE][-+][0-9]+)?"
# Each is a part of what YAML 1.1 takes for this type, so that what PyYAML writes as text is read as text.
_NUMBERS = {
    "tag:yaml.org,2002:int": re.compile(r"[-+]?(0|[1-9][0-9]*)$"),
    "tag:yaml.org,2002:float": re.compile(
        rf"[-+]?(0|[1-9][0-9]*)\.[0-9]*{_EXPONENT}$|\.[0-9]+{_EXPONENT}$|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$"
    ),
}
# A class of PyYAML finds the type of a plain text by its first character, in this table.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, _NUMBERS.get(tag, pattern)) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
