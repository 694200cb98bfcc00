"""Numbers and texts as the page of a data check shows them."""

from __future__ import annotations

import math
import re
from typing import Any

TEXT_SHOWN = 20_000  # characters per text, so that a browser can open a page with 80 pairs


def number(value: float, sign: bool = False) -> str:
    """Format a number: 1234567 as 1,234,567, 3.14159 as 3.1."""
    text = f"{value:{'+' if sign else ''},.{0 if abs(value) >= 100 else 1}f}"
    return text.removesuffix(".0")


def counted(count: float, noun: str) -> str:
    """Format a number with its noun: 1 pair, 2 pairs."""
    return f"{number(count)} {noun if count == 1 else noun + 's'}"


def percent(fraction: float) -> str:
    """Format a fraction: 0.0312 as 3.1 %. Only exactly 0 and 1 are shown as 0 % and 100 %."""
    value = 100 * fraction
    if 0 < value < 0.1 or 99.9 < value < 100:
        return "<0.1\u00a0%" if value < 1 else ">99.9\u00a0%"
    digits = 1 if (value < 10 or value > 99) and not math.isclose(value, round(value), abs_tol=0.05) else 0
    return f"{value:.{digits}f}\u00a0%"


_INVISIBLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
_SYMBOLS = {code: 0x2400 + code for code in range(0x20) if code not in b"\t\n"} | {0x7F: 0x2421}
_SYMBOLS |= dict.fromkeys([*range(0x80, 0xA0), *range(0xD800, 0xE000)], 0xFFFD)


def visible(value: Any) -> Any:
    """Replace control characters by visible symbols, and lone surrogates, which files cannot encode, by U+FFFD."""
    if not isinstance(value, str) or not _INVISIBLE.search(value):
        return value
    return value.replace("\r\n", "\n").translate(_SYMBOLS)


def shortened(text: str) -> str:
    """Cut a text to TEXT_SHOWN characters, and add how many are left out."""
    left_out = len(text) - TEXT_SHOWN
    return text if left_out <= 0 else f"{text[:TEXT_SHOWN]} \u2026 (and {left_out:,} more characters)"
