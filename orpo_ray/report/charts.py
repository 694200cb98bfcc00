"""Which curves and histograms a report shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from orpo_ray.data.groups import KINDS
from orpo_ray.evaluation.summary import CHANCE, MARGINS
from orpo_ray.pages.axes import Mark, ticks
from orpo_ray.pages.curves import CurveChart, Series, make_curve_chart, short
from orpo_ray.report.run_data import RunData

MARGIN_BINS = 40
RUN_COLORS = 6


@dataclass(frozen=True)
class _Curve:
    title: str
    note: str
    metrics: tuple[tuple[str, str, str], ...]
    """(metric, name in the legend, color) of one run's report."""
    reference: float | None = None


def _train_and_eval(title: str, note: str, name: str, reference: float | None = None) -> _Curve:
    return _Curve(title, note, ((f"train/{name}", "train", "train"), (f"eval/{name}", "held out", "held")), reference)


_CURVES = (
    _train_and_eval("Loss", "per pair", "loss"),
    _train_and_eval("Accuracy", "fraction of pairs with chosen preferred", "rewards/accuracies", CHANCE),
    _train_and_eval("Margin", "reward of chosen minus reward of rejected", "rewards/margins", 0.0),
    _Curve(
        "Rewards",
        "beta times the log-prob of the answer",
        (
            ("train/rewards/chosen", "chosen", "chosen"),
            ("train/rewards/rejected", "rejected", "rejected"),
            ("eval/rewards/chosen", "chosen, held out", "chosen held"),
            ("eval/rewards/rejected", "rejected, held out", "rejected held"),
        ),
    ),
    _train_and_eval("NLL", "negative log-likelihood of the chosen answer per token", "nll_loss"),
    _train_and_eval("Odds term", "log sigmoid of the log odds ratio, without beta", "log_odds_ratio", 0.0),
    _Curve("Learning rate", "", (("train/learning_rate", "learning rate", "train"),)),
    _Curve("Gradient norm", "before clipping", (("train/grad_norm", "gradient norm", "train"),)),
    _Curve("Throughput", "pairs per second", (("train/pairs_per_second", "pairs per second", "train"),)),
    _Curve("Data wait", "fraction of a step's time", (("train/data_wait_fraction", "data wait", "train"),)),
)
_SMOOTH = ("learning_rate",)


def curves_of(runs: Sequence[RunData]) -> list[CurveChart]:
    """Make the curves of one run, or of several side by side, each run in its own color."""
    charts = []
    for curve in _CURVES:
        if len(runs) == 1:
            series = [_series(runs[0], metric, name, kind) for metric, name, kind in curve.metrics]
        else:
            series = [_series(run, _of_several(run, curve), run.name, color(place)) for place, run in enumerate(runs)]
        title = "Reward of chosen" if curve.title == "Rewards" and len(runs) > 1 else curve.title
        charts.append(make_curve_chart(title, curve.note, series, curve.reference))
    if len(runs) == 1:
        charts += [_by_group(runs[0], kind) for kind in KINDS]
    return [chart for chart in charts if chart is not None]


def _by_group(run: RunData, kind: str) -> CurveChart | None:
    """Make the curves of the accuracy in the largest languages, or domains; None if the run has none."""
    sizes = {name.removeprefix(f"eval/pairs/{kind}/"): value for name, value in run.latest.items()
             if name.startswith(f"eval/pairs/{kind}/")}  # fmt: skip
    largest = sorted(sizes, key=lambda name: (-sizes[name], name))[:RUN_COLORS]
    series = [
        _series(run, f"eval/rewards/accuracies/{kind}/{name}", name, color(place)) for place, name in enumerate(largest)
    ]
    return make_curve_chart(f"Accuracy by {kind}", "fraction of pairs with chosen preferred", series, CHANCE)


def color(place: int) -> str:
    """Return the CSS class of a run's color."""
    return f"run-{place % RUN_COLORS}"


def _of_several(run: RunData, curve: _Curve) -> str:
    """Choose the metric that compares runs: the first that this run has of those of training."""
    return next((metric for metric, _, _ in curve.metrics if run.series(metric)[0]), curve.metrics[0][0])


def _series(run: RunData, metric: str, name: str, kind: str) -> Series:
    steps, values = run.series(metric)
    is_train = metric.startswith("train/")
    return Series(name, kind, steps, values, is_train and not metric.endswith(_SMOOTH), has_dots=not is_train)


@dataclass(frozen=True)
class MarginChart:
    """Distribution of the margins of the held-out pairs."""

    bars: list[tuple[float, float, float, str, str]]
    """x, width, height, label, and kind (`chosen` right of 0, `rejected` left of it)."""
    start: str
    """SVG path of the distribution before training; empty without one."""
    exchanged: str
    """SVG path of that with exchanged images; empty without one."""
    x_ticks: list[Mark]
    zero: float
    pairs: int
    right: int
    """Pairs with a margin above 0."""


def margins_of(run: RunData) -> MarginChart | None:
    """Make the histogram of the margins; None if the run kept none."""
    if run.pairs is None:
        return None
    margins = _finite(run.pairs, MARGINS)
    if margins is None:
        return None
    start = None if run.start_pairs is None else _finite(run.start_pairs, MARGINS)
    exchanged = _finite(run.pairs, f"exchanged/{MARGINS}")
    everything = np.concatenate([values for values in (margins, start, exchanged) if values is not None])
    low, high = np.percentile(everything, [0.5, 99.5]).tolist()
    low, high = min(low, 0.0), max(high, 0.0)
    # A bin ends at 0, so that no bar holds pairs of both signs.
    width = (high - low or 1.0) / MARGIN_BINS
    edges = width * np.arange(np.floor(low / width), np.ceil(high / width) + 1)
    if len(edges) < 2:
        edges = np.array([-width, 0.0, width])

    def heights(values: np.ndarray) -> np.ndarray:
        counts = np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0]
        return counts / max(1, len(values))

    drawn = {name: heights(values) for name, values in (("", margins), ("start", start), ("exchanged", exchanged))
             if values is not None}  # fmt: skip
    top = 1.05 * max(float(each.max()) for each in drawn.values())

    def x(value: float) -> float:
        return round(100 * (value - edges[0]) / (edges[-1] - edges[0]), 3)

    def outline(name: str) -> str:
        if name not in drawn:
            return ""
        steps = "".join(
            f"V{100 - 100 * each / top:.2f}H{x(edges[place + 1])}" for place, each in enumerate(drawn[name])
        )
        return f"M0 100{steps}V100"

    bars = []
    for place, height in enumerate(drawn[""].tolist()):
        left, right = float(edges[place]), float(edges[place + 1])
        label = f"margin {short(left)} to {short(right)}: {round(height * len(margins)):,} pairs ({100 * height:.1f} %)"
        kind = "chosen" if left >= -width / 2 else "rejected"
        bars.append((x(left), x(right) - x(left), round(100 * height / top, 3), label, kind))
    return MarginChart(
        bars=bars,
        start=outline("start"),
        exchanged=outline("exchanged"),
        x_ticks=[Mark(x(tick), short(tick)) for tick in ticks(float(edges[0]), float(edges[-1]), 6)],
        zero=x(0.0),
        pairs=len(margins),
        right=int((margins > 0).sum()),
    )


def _finite(pairs: pa.Table, name: str) -> np.ndarray | None:
    """Return the finite values of a column; None if it has none or is not there."""
    if name not in pairs.column_names:
        return None
    values: np.ndarray = pairs[name].drop_null().to_numpy()
    values = values[np.isfinite(values)]
    return values if len(values) else None
