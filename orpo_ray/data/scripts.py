"""The script that a text is written in, by Unicode's names of its letters."""

from __future__ import annotations

import unicodedata
from collections import Counter

_KANA = {"HIRAGANA", "KATAKANA"}
# The first word of a letter's name where it is no script, or not its usual name.
_NAMES = {"CJK": "Han", "HALFWIDTH": "Katakana", "FULLWIDTH": "Latin", "OLD": "other", "MODIFIER": "other"}


def script_of(text: str) -> str:
    """Name the script of most letters: Latin, Cyrillic, Arabic, Han, Japanese, Hangul, ...

    Kana make a text Japanese, whatever the number of its Chinese characters. A text without letters is "none".
    """
    found: Counter[str] = Counter()
    for letter, count in Counter(text).items():
        if letter.isalpha():
            found[unicodedata.name(letter, "OTHER").split(" ")[0].split("-")[0]] += count
    if not found:
        return "none"
    if kana := sum(found.pop(name, 0) for name in _KANA):
        found["JAPANESE"] = kana + found.pop("CJK", 0)
    # The name breaks a tie, so that the order of letters does not.
    script = min(found, key=lambda name: (-found[name], name))
    return _NAMES.get(script, script.capitalize())
