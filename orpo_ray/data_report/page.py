"""Render `data_check.html`, the page of `orpo-ray data check`: one file that loads nothing from any network.

Its layout is in check_page.html; style, script and what keeps untrusted text inert are those of all pages
(`orpo_ray/pages`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from orpo_ray.data_report.histograms import make_charts
from orpo_ray.data_report.key_figures import LEVELS, Split, make_cards
from orpo_ray.pages.environment import page_template
from orpo_ray.pages.text_format import counted, number

WARNING_BUTTONS = 12
TEMPLATE = Path(__file__).with_name("check_page.html")


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
    return page_template(TEMPLATE).render(
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
