"""Rules for English that change what an answer says about an image: an object, a count, a color or a place.

A word is replaced by another of its group, so that the sentence stays a sentence: an animal by an animal, a plural by a
plural. The objects are the categories of COCO and shapes.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np

_OBJECTS = (
    ("man", "woman", "boy", "girl"),
    ("bicycle", "car", "motorcycle", "bus", "train", "truck", "airplane", "boat"),
    ("bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe"),
    ("backpack", "umbrella", "handbag", "tie", "suitcase"),
    ("frisbee", "snowboard", "kite", "skateboard", "surfboard", "tennis racket", "baseball bat"),
    ("bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "plate"),
    ("banana", "apple", "sandwich", "orange", "carrot", "hot dog", "pizza", "donut", "cake"),
    ("chair", "couch", "bench", "bed", "table", "toilet"),
    ("laptop", "keyboard", "phone", "television", "microwave", "oven", "toaster", "sink", "refrigerator"),
    ("book", "clock", "vase", "teddy bear", "toothbrush"),
    ("tree", "flower", "bush"),
    ("house", "tower", "bridge", "church", "barn"),
    ("circle", "rectangle", "triangle", "square", "star"),
)
_PLURALS = {
    "man": "men", "woman": "women", "sheep": "sheep", "knife": "knives", "bus": "buses", "couch": "couches",
    "bench": "benches", "sandwich": "sandwiches", "wine glass": "wine glasses", "toothbrush": "toothbrushes",
    "bush": "bushes", "church": "churches",
}  # fmt: skip
_COUNTS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_COLORS = (
    "black", "white", "gray", "red", "green", "blue", "yellow", "brown", "orange", "pink", "purple", "teal",
)  # fmt: skip
_SPELLINGS = {"grey": "gray"}
_PLACES = (
    ("left", "right"), ("above", "below"), ("on top of", "underneath"), ("in front of", "behind"),
    ("inside", "outside"), ("top", "bottom"), ("foreground", "background"), ("near", "far from"), ("upper", "lower"),
    ("indoors", "outdoors"), ("over", "under"),
)  # fmt: skip


@dataclass(frozen=True)
class Change:
    """A changed answer."""

    text: str
    note: str
    """What was changed, such as `color: red -> blue`."""


def change_word(text: str, kind: str, rng: np.random.Generator) -> Change | None:
    """Replace one word of an answer by another of its kind, at random; all its occurrences, so that none contradicts.

    Args:
        text: the answer.
        kind: `object`, `count`, `color` or `place`.
        rng: decides which word, and by which.

    Returns:
        The changed answer; None if it has no word of this kind.
    """
    groups = _groups(kind)
    found = sorted({match[0].lower() for match in _pattern(kind).finditer(text)})
    if not found:
        return None
    word = found[int(rng.integers(len(found)))]
    known = _SPELLINGS.get(word, word)
    present = {_SPELLINGS.get(each, each) for each in found}
    # A word that the answer has too would make the change ambiguous.
    others = [each for each in groups[known] if each not in present] or [
        each for each in groups[known] if each != known
    ]
    other = others[int(rng.integers(len(others)))]
    changed = re.sub(rf"\b(?:(an?)(\s+))?({re.escape(word)})\b", _replacer(other), text, flags=re.IGNORECASE)
    return Change(changed, f"{kind}: {word} -> {other}")


def _replacer(other: str) -> Callable[[re.Match[str]], str]:
    """Return what puts a word in the place of another, with the case of the other and a fitting article."""

    def replace(match: re.Match[str]) -> str:
        article, space, word = match[1], match[2], match[3]
        new = other.capitalize() if word[0].isupper() else other
        if article is None:
            return new
        fitting = "an" if other[0] in "aeiou" else "a"
        return (fitting.capitalize() if article[0].isupper() else fitting) + space + new

    return replace


@cache
def _groups(kind: str) -> dict[str, tuple[str, ...]]:
    """Word -> the words of its group, itself among them."""
    groups: dict[str, tuple[tuple[str, ...], ...]] = {
        "object": tuple(group for each in _OBJECTS for group in (each, tuple(map(_plural, each)))),
        "count": (_COUNTS, tuple(str(number) for number in range(1, 11))),
        "color": (_COLORS,),
        "place": _PLACES,
    }
    return {word: group for group in groups[kind] for word in group}


@cache
def _pattern(kind: str) -> re.Pattern[str]:
    """Finds the words of a kind, long ones first."""
    words = [*_groups(kind), *(_SPELLINGS if kind == "color" else ())]
    return re.compile(rf"\b(?:{'|'.join(map(re.escape, sorted(words, key=len, reverse=True)))})\b", re.IGNORECASE)


def _plural(word: str) -> str:
    return _PLURALS.get(word, f"{word}s")
