"""The page `data_check.html`: what `orpo-ray data check` found, in one file that asks nothing of any network.

Here are the judgements and the geometry of the charts; words and looks are in check_page.html. Prompts and answers are
other people's text. Three walls stand between them and the reader's browser: Jinja escapes all of it, control
characters become visible ones, and the page's content security policy runs its own script and style alone, known by
their hashes.
"""

from __future__ import annotations

import base64
import hashlib
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined, Template

from orpo_ray.extras import install_command, is_installed

Split = Mapping[str, Any]
TEXT_SHOWN = 20_000  # characters of one text: a page of 80 pairs stays one that a browser opens
WARNING_BUTTONS = 12
LEVELS = ("none", "good", "look", "act")  # from nothing to say to something to do


def render_page(report: Mapping[str, Any], gallery: Sequence[Mapping[str, Any]]) -> str:
    """The whole page. report, gallery: as `orpo-ray data check` makes them; their texts need not be trusted."""
    train, held_out = report["train"], report["eval"]
    cards = [_card(title, judge, report) for title, judge in _JUDGES]
    # "too long: 1,200 tokens" and "too long: 1,300 tokens" are of one kind.
    pairs = [{**pair, "kinds": [*dict.fromkeys(text.split(":")[0] for text in pair["warnings"])]} for pair in gallery]
    kinds = Counter(kind for pair in pairs for kind in pair["kinds"]).most_common(WARNING_BUTTONS)
    return _template().render(
        report=report,
        train=train,
        held_out=held_out,
        splits=[("Train", train)] + ([("Held out", held_out)] if held_out else []),
        verdict=_verdict(train),
        cards=sorted(cards, key=lambda card: -LEVELS.index(card.level)),
        levels=[(level, sum(card.level == level for card in cards)) for level in reversed(LEVELS)],
        charts=_histograms(report),
        pairs=pairs,
        whys=Counter(pair["why"] for pair in pairs).most_common(),
        kinds=kinds,
        kind_keys={kind: f"k{place}" for place, (kind, _) in enumerate(kinds)},
    )


def _verdict(train: Split) -> str:
    rows, pairs, lost = train["rows"], train["pairs"], train["rows"] - train["pairs"]
    if not rows:
        return "There are no rows."
    can = f"{number(pairs)} can be trained on, {number(lost)} cannot"
    if not pairs or lost <= 0:
        can = "all can be trained on" if pairs else "none can be trained on"
    return f"{counted(rows, 'row')}: {can}."


@dataclass(frozen=True)
class Card:
    """One key figure, one of LEVELS, and what it means in a sentence or two. beside: the held-out pairs' figure."""

    value: str
    unit: str
    level: str
    text: str
    title: str = ""
    beside: str = ""


Judge = Callable[[Split, Mapping[str, Any]], Card]


def _card(title: str, judge: Judge, report: Mapping[str, Any]) -> Card:
    """The training pairs' judgement; the held-out ones' words where theirs is the worse."""
    card = replace(_judged(judge, report["train"], report), title=title)
    if not report["eval"] or judge is _held_out:
        return card
    other = _judged(judge, report["eval"], report)
    if other.level != "none":
        card = replace(card, beside=f"{other.value} {other.unit}")
    if other.level in ("look", "act") and LEVELS.index(other.level) > LEVELS.index(card.level):
        card = replace(card, level=other.level, text=f"Held-out pairs: {other.text[0].lower()}{other.text[1:]}")
    return card


def _judged(judge: Judge, split: Split, report: Mapping[str, Any]) -> Card:
    if split["pairs"] or judge in (_bad_rows, _held_out) or split["too_long"]["count"]:
        return judge(split, report)
    return Card("\u2013", "", "none", "There are no pairs to judge by.")


def _of_rows(split: Split) -> str:
    return f"of {counted(split['rows'], 'row')}"


def _bad_rows(split: Split, report: Mapping[str, Any]) -> Card:
    total, share = split["bad"]["total"], split["bad"]["share"]
    if not split["rows"]:
        return Card("0", "rows", "act", "The recipe's data has no rows.")
    level, text = "good", "Every row can be used."
    if total:
        level, text = "look", f"{percent(share)} cannot be used. Training skips them; the reasons stand below."
    if share > 0.05:
        level = "act"
        text = f"{percent(share)} cannot be used. Training stops above data.max_bad_fraction (by default 5\u00a0%)."
    return Card(number(total), _of_rows(split), level, text)


def _too_long(split: Split, report: Mapping[str, Any]) -> Card:
    count, share, policy = (split["too_long"][key] for key in ("count", "share", "policy"))
    limit = f"data.max_length ({number(report['max_length'])} tokens)"
    if not count:
        return Card("0", _of_rows(split), "good", f"Every pair fits within {limit}.")
    then = {
        "skip": "Training skips them. A larger data.max_length keeps them.",
        "truncate_response": "Their answers are cut to fit; prompts and images never are.",
        "error": "data.on_too_long is error: training stops at the first of them.",
    }[policy]
    level = "act" if policy == "error" or share > 0.05 else "look"
    return Card(number(count), _of_rows(split), level, f"{percent(share)} exceed {limit}. {then}")


def _length_bias(split: Split, report: Mapping[str, Any]) -> Card:
    bias = split["length_bias"]
    longer, shorter = bias["chosen_longer"], max(0.0, 1 - bias["chosen_longer"] - bias["equal"])
    text = "Answers differ little in length." if bias["equal"] > 0.5 else "Length gives little away."
    if max(longer, shorter) > 0.7:
        than, learnt = ("longer", "more") if longer > 0.7 else ("shorter", "less")
        text = f"Chosen answers are mostly the {than} ones. The model may learn to write {learnt}, not better."
    level = "look" if max(longer, shorter) > 0.7 else "good"
    text += f" Median difference in tokens: {number(bias['median_difference'], sign=True)}."
    return Card(percent(longer), "chosen is longer", level, text)


def _blind(split: Split, report: Mapping[str, Any]) -> Card:
    blind = split["blind"]
    if blind is None:
        why = "There are too few pairs to estimate what the text alone gives away."
        if not is_installed("sklearn"):
            why = f"Not measured, since scikit-learn is not installed: {install_command('sklearn')}."
        return Card("\u2013", "", "none", why)
    level, text = "good", "The text alone gives little away"
    if blind["accuracy"] > 0.8:
        level, text = "act", "The better answer can mostly be told without the image"
    elif blind["accuracy"] > 0.65:
        level, text = "look", "The text alone often gives the better answer away"
    text += f" (95\u00a0% interval: {percent(blind['low'])} to {percent(blind['high'])}). A coin toss gets 50\u00a0%."
    return Card(percent(blind["accuracy"]), "told from the text alone", level, text)


def _repeats(split: Split, report: Mapping[str, Any]) -> Card:
    count, prompts = split["duplicates"]["pairs"], split["duplicates"]["prompts"]
    share = count / split["rows"]
    text = f"{percent(share)} repeat an earlier row word for word." if count else "No row repeats an earlier one."
    if prompts:
        text += f" {number(prompts)} ask again what an earlier one asks about the same images."
    return Card(number(count), _of_rows(split), "act" if share > 0.2 else "look" if count else "good", text)


def _contradictions(split: Split, report: Mapping[str, Any]) -> Card:
    count = split["duplicates"]["contradictions"]
    level, text = "good", "No question comes again with its answers exchanged."
    if count:
        level = "act" if count / split["rows"] > 0.01 else "look"
        text = "Asked twice, with chosen and rejected exchanged: the two cancel each other out."
    return Card(number(count), "of the questions", level, text)


def _images(split: Split, report: Mapping[str, Any]) -> Card:
    total, without = sum(split["images_per_pair"].values()), split["images_per_pair"].get("0", 0)
    level, text = "good", "Every pair has one image."
    if without == total:
        level, text = "look", "No pair has an image: nothing here teaches the model to look."
    elif without:
        level, text = "look" if without / total > 0.05 else "good", f"{counted(without, 'pair')} of text alone."
    elif set(split["images_per_pair"]) != {"1"}:
        text = "Every pair has one image or more."
    return Card(percent((total - without) / total), "of pairs have images", level, text)


def _held_out(split: Split, report: Mapping[str, Any]) -> Card:
    pairs, shared = report["eval"]["pairs"] if report["eval"] else 0, report["images_on_both_sides"]
    level, text = "good", "No image of theirs is trained on."
    if not pairs:
        level, text = "look", "Nothing will tell learning from memorising. Set data.eval or data.eval_fraction."
    elif shared:
        seen = f"{counted(shared, 'image')} on both sides of the split"
        level, text = "act", f"{seen}: held-out figures will look better than they are."
    return Card(number(pairs), "held-out pairs", level, text)


_JUDGES: tuple[tuple[str, Judge], ...] = (
    ("Bad rows", _bad_rows),
    ("Too long", _too_long),
    ("Blind guess", _blind),
    ("Length bias", _length_bias),
    ("Repeated rows", _repeats),
    ("Contradictions", _contradictions),
    ("Images", _images),
    ("Held out", _held_out),
)


# Histograms: places are percentages of the drawing, so that it stretches and its letters do not


@dataclass(frozen=True)
class Mark:
    """A labelled place on an axis."""

    at: float
    label: str
    kind: str = ""


@dataclass(frozen=True)
class Bar:
    """Left edge, width and height, and what the bar says when pointed at."""

    x: float
    width: float
    height: float
    label: str


@dataclass(frozen=True)
class Chart:
    """Bars of the training pairs, an outline (SVG path) of the held-out ones; heights are shares `per` tokens.

    beyond: a limit too far to the right to be drawn.
    """

    name: str
    pairs: int
    per: float
    bars: list[Bar]
    outline: str
    x_ticks: list[Mark]
    y_ticks: list[Mark]
    marks: list[Mark]
    beyond: int | None


@dataclass(frozen=True)
class _Scale:
    low: float
    high: float
    per: float
    top: float

    @classmethod
    def of(cls, drawn: Sequence[Mapping[str, Any]], limit: int | None) -> _Scale:
        """Holds all that is drawn, and a limit that is not far beyond it."""
        edges = [edge for one in drawn for edge in one["edges"]]
        low, high = min(edges), max(edges)
        low = 0.0 if 0 < low <= 0.4 * high else low
        if limit is not None and limit <= 1.4 * high:
            low, high = min(low, 0.97 * limit), max(high, 1.02 * limit)
        # Per as many tokens as leave every share below one.
        widths = sorted({one["edges"][1] - one["edges"][0] for one in drawn}, reverse=True)
        tops = {per: max(height for one in drawn for height in _heights(one, per)) for per in widths}
        per = next((per for per in widths if tops[per] < 1.001), widths[-1])
        return cls(low, max(high, low + 1), per, 1.02 * tops[per])

    def x(self, value: float) -> float:
        return round(100 * (value - self.low) / (self.high - self.low), 3)


def _histograms(report: Mapping[str, Any]) -> list[Chart]:
    """Chosen and rejected share their scales, so that the eye may compare them."""
    charts = []
    by_split = [split["histograms"] for split in (report["train"], report["eval"]) if split]
    for group in (("sequence",), ("prompt",), ("chosen", "rejected")):
        drawn = [found for one in by_split for name in group if (found := one.get(name)) and sum(found["counts"])]
        present = [name for name in group if sum(by_split[0].get(name, {}).get("counts", ()))]
        if present:
            limit = report["max_length"] if "sequence" in present else None
            scale = _Scale.of(drawn, limit)
            charts += [_chart(name, report, scale, limit) for name in present]
    return charts


def _chart(name: str, report: Mapping[str, Any], scale: _Scale, limit: int | None) -> Chart:
    train, percentiles = report["train"]["histograms"][name], report["train"]["tokens"][name]
    other = report["eval"]["histograms"].get(name) if report["eval"] else None
    marks = [Mark(scale.x(percentiles[key]), f"{key} {number(percentiles[key])}", "point") for key in ("p50", "p95")]
    beyond = limit is not None and limit > scale.high
    if limit is not None and not beyond:
        marks.append(Mark(scale.x(limit), f"max_length {number(limit)}", "limit"))
    return Chart(
        name=name,
        pairs=sum(train["counts"]),
        per=scale.per,
        bars=_bars(train, scale),
        outline=_outline(other, scale) if other else "",
        x_ticks=[
            Mark(scale.x(tick), number(tick)) for tick in _ticks(scale.low, scale.high, 10 if limit else 5, whole=True)
        ],
        y_ticks=[Mark(round(100 * tick / scale.top, 3), percent(tick)) for tick in _ticks(0, scale.top, 3)],
        marks=marks,
        beyond=limit if beyond else None,
    )


def _heights(histogram: Mapping[str, Any], per: float) -> list[float]:
    """Share of the pairs per so many tokens in each bin, whatever its width: comparable between histograms."""
    edges, total = histogram["edges"], max(1, sum(histogram["counts"]))
    widths = [right - left for left, right in pairwise(edges)]
    return [count / total * per / width for count, width in zip(histogram["counts"], widths, strict=True)]


def _bars(histogram: Mapping[str, Any], scale: _Scale) -> list[Bar]:
    bars, counts = [], histogram["counts"]
    for (left, right), count, height in zip(
        pairwise(histogram["edges"]), counts, _heights(histogram, scale.per), strict=True
    ):
        first, last = math.ceil(left), max(math.ceil(left), math.ceil(right) - 1)
        tokens = counted(first, "token") if first == last else f"{number(first)} to {number(last)} tokens"
        label = f"{tokens}: {counted(count, 'pair')} ({percent(count / sum(counts))})"
        bars.append(Bar(scale.x(left), scale.x(right) - scale.x(left), round(100 * height / scale.top, 3), label))
    return bars


def _outline(histogram: Mapping[str, Any], scale: _Scale) -> str:
    edges, steps = histogram["edges"], ""
    for place, height in enumerate(_heights(histogram, scale.per)):
        steps += f"V{100 - 100 * height / scale.top:.2f}H{scale.x(edges[place + 1])}"
    return f"M{scale.x(edges[0])} 100{steps}V100"


def _ticks(low: float, high: float, count: int, whole: bool = False) -> list[float]:
    """Round values from low to high, about `count` of them."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= 0.999 * rough)
    step = max(1.0, step) if whole else step
    return [step * place for place in range(math.ceil(low / step), math.floor(high / step) + 1)]


def number(value: float, sign: bool = False) -> str:
    """1234567 -> 1,234,567; 3.14159 -> 3.1."""
    text = f"{value:{'+' if sign else ''},.{0 if abs(value) >= 100 else 1}f}"
    return text.removesuffix(".0")


def counted(count: float, noun: str) -> str:
    """1 pair; 2 pairs."""
    return f"{number(count)} {noun if count == 1 else noun + 's'}"


def percent(share: float) -> str:
    """0.0312 -> 3.1 %; what is not quite nothing or all is never shown as that."""
    value = 100 * share
    if 0 < value < 0.1 or 99.9 < value < 100:
        return "<0.1\u00a0%" if value < 1 else ">99.9\u00a0%"
    digits = 1 if (value < 10 or value > 99) and not math.isclose(value, round(value), abs_tol=0.05) else 0
    return f"{value:.{digits}f}\u00a0%"


_INVISIBLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
_PICTURES = {code: 0x2400 + code for code in range(0x20) if code not in b"\t\n"} | {0x7F: 0x2421}
_PICTURES |= dict.fromkeys([*range(0x80, 0xA0), *range(0xD800, 0xE000)], 0xFFFD)
_INLINE_IMAGE = re.compile(r"data:image/[a-z0-9.+-]+;base64,[A-Za-z0-9+/]+=*")


def visible(value: Any) -> Any:
    """Control characters, which no browser shows, as pictures; lone surrogates, which no file holds, as U+FFFD."""
    if not isinstance(value, str) or not _INVISIBLE.search(value):
        return value
    return value.replace("\r\n", "\n").translate(_PICTURES)


def shortened(text: str) -> str:
    """The text, or its beginning and how much was left out."""
    left_out = len(text) - TEXT_SHOWN
    return text if left_out <= 0 else f"{text[:TEXT_SHOWN]} \u2026 (and {left_out:,} more characters)"


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
    environment.tests["inline"] = _INLINE_IMAGE.fullmatch  # any other would be asked of a disk or a network
    return environment.from_string(Path(__file__).with_name("check_page.html").read_text("utf-8"))
