"""Geometry of the histograms on the page of a data check.

Positions are percentages of the drawing, so that it can be stretched without its text.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from orpo_ray.pages.axes import Mark, ticks
from orpo_ray.pages.text_format import counted, number, percent


@dataclass(frozen=True)
class Bar:
    """Left edge, width and height of a bar, and its tooltip."""

    x: float
    width: float
    height: float
    label: str


@dataclass(frozen=True)
class Chart:
    """A histogram of token counts."""

    name: str
    pairs: int
    """Number of training pairs."""
    per: float
    """Heights are fractions of the pairs per this many tokens."""
    bars: list[Bar]
    """Bars of the training pairs."""
    outline: str
    """SVG path for the held-out pairs; empty if there are none."""
    x_ticks: list[Mark]
    y_ticks: list[Mark]
    marks: list[Mark]
    """Percentiles, and `data.max_length`."""
    beyond: int | None
    """`data.max_length`, if it is too large to be drawn."""


@dataclass(frozen=True)
class _Scale:
    low: float
    high: float
    per: float
    top: float

    @classmethod
    def of(cls, histograms: Sequence[Mapping[str, Any]], limit: int | None) -> _Scale:
        """Fit a scale to all histograms, and to the limit unless it is far beyond them."""
        edges = [edge for each in histograms for edge in each["edges"]]
        low, high = min(edges), max(edges)
        low = 0.0 if 0 < low <= 0.4 * high else low
        if limit is not None and limit <= 1.4 * high:
            low, high = min(low, 0.97 * limit), max(high, 1.02 * limit)
        # Choose the number of tokens per unit so that no fraction exceeds 1.
        widths = sorted({each["edges"][1] - each["edges"][0] for each in histograms}, reverse=True)
        tops = {per: max(height for each in histograms for height in _heights(each, per)) for per in widths}
        per = next((per for per in widths if tops[per] < 1.001), widths[-1])
        return cls(low, max(high, low + 1), per, 1.02 * tops[per])

    def x(self, value: float) -> float:
        return round(100 * (value - self.low) / (self.high - self.low), 3)


def make_charts(report: Mapping[str, Any]) -> list[Chart]:
    """Make the histograms of a report. Chosen and rejected have the same scales, so that they can be compared."""
    charts = []
    by_split = [split["histograms"] for split in (report["train"], report["eval"]) if split]
    for group in (("sequence",), ("prompt",), ("chosen", "rejected")):
        histograms = [
            found for split in by_split for name in group if (found := split.get(name)) and sum(found["counts"])
        ]
        present = [name for name in group if sum(by_split[0].get(name, {}).get("counts", ()))]
        if present:
            limit = report["max_length"] if "sequence" in present else None
            scale = _Scale.of(histograms, limit)
            charts += [_make_chart(name, report, scale, limit) for name in present]
    return charts


def _make_chart(name: str, report: Mapping[str, Any], scale: _Scale, limit: int | None) -> Chart:
    train, percentiles = report["train"]["histograms"][name], report["train"]["tokens"][name]
    held_out = report["eval"]["histograms"].get(name) if report["eval"] else None
    marks = [Mark(scale.x(percentiles[key]), f"{key} {number(percentiles[key])}", "point") for key in ("p50", "p95")]
    beyond = limit is not None and limit > scale.high
    if limit is not None and not beyond:
        marks.append(Mark(scale.x(limit), f"max_length {number(limit)}", "limit"))
    return Chart(
        name=name,
        pairs=sum(train["counts"]),
        per=scale.per,
        bars=_bars(train, scale),
        outline=_outline(held_out, scale) if held_out else "",
        x_ticks=[
            Mark(scale.x(tick), number(tick)) for tick in ticks(scale.low, scale.high, 10 if limit else 5, whole=True)
        ],
        y_ticks=[Mark(round(100 * tick / scale.top, 3), percent(tick)) for tick in ticks(0, scale.top, 3)],
        marks=marks,
        beyond=limit if beyond else None,
    )


def _heights(histogram: Mapping[str, Any], per: float) -> list[float]:
    """Return the fraction of pairs per `per` tokens in each bin, which does not depend on the width of bins."""
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
    for index, height in enumerate(_heights(histogram, scale.per)):
        steps += f"V{100 - 100 * height / scale.top:.2f}H{scale.x(edges[index + 1])}"
    return f"M{scale.x(edges[0])} 100{steps}V100"
