"""Render `data_check.html`, the page of `orpo-ray data check`: one file that loads nothing from any network.

Layout, style and script are in check_page.html. Prompts and answers are untrusted text, with three protections between
them and the browser: Jinja escapes all of it, control characters are replaced by visible ones, and the page's content
security policy allows only its own script and style, by their hashes.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined, Template

from orpo_ray.data_report.histograms import make_charts
from orpo_ray.data_report.key_figures import LEVELS, Split, make_cards
from orpo_ray.data_report.text_format import counted, number, percent, shortened, visible

WARNING_BUTTONS = 12
_INLINE_IMAGE = re.compile(r"data:image/[a-z0-9.+-]+;base64,[A-Za-z0-9+/]+=*")


def render_page(report: Mapping[str, Any], gallery: Sequence[Mapping[str, Any]]) -> str:
    """Render the page.

    Args:
        report: as `orpo-ray data check` makes it. Its texts need not be trusted.
        gallery: the pairs to show. Their texts need not be trusted.
    """
    train, held_out = report["train"], report["eval"]
    cards = make_cards(report)
    # A warning's kind is the text before the colon: "too long: 1,200 tokens" and "too long: 1,300 tokens" are one kind.
    pairs = [{**pair, "kinds": [*dict.fromkeys(text.split(":")[0] for text in pair["warnings"])]} for pair in gallery]
    kinds = Counter(kind for pair in pairs for kind in pair["kinds"]).most_common(WARNING_BUTTONS)
    return _template().render(
        report=report,
        train=train,
        held_out=held_out,
        splits=[("Train", train)] + ([("Held out", held_out)] if held_out else []),
        verdict=_verdict(train),
        cards=cards,
        levels=[(level, sum(card.level == level for card in cards)) for level in reversed(LEVELS)],
        charts=make_charts(report),
        pairs=pairs,
        whys=Counter(pair["why"] for pair in pairs).most_common(),
        kinds=kinds,
        kind_keys={kind: f"k{index}" for index, (kind, _) in enumerate(kinds)},
    )


def _verdict(train: Split) -> str:
    rows, pairs, unusable = train["rows"], train["pairs"], train["rows"] - train["pairs"]
    if not rows:
        return "There are no rows."
    usable = f"{number(pairs)} can be used for training, {number(unusable)} cannot"
    if not pairs or unusable <= 0:
        usable = "all can be used for training" if pairs else "none can be used for training"
    return f"{counted(rows, 'row')}: {usable}."


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


@cache
def _template() -> Template:
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, finalize=visible, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "number": number,
        "counted": counted,
        "percent": percent,
        "shortened": shortened,
        "sha256": _sha256,
    }
    environment.tests["inline"] = _INLINE_IMAGE.fullmatch  # other images would be loaded from a disk or network
    return environment.from_string(Path(__file__).with_name("check_page.html").read_text("utf-8"))
