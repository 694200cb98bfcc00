"""Line charts: where points lie, what is left out, and what is averaged."""

from __future__ import annotations

import re

import pytest

from orpo_ray.pages.curves import POINTS, Series, make_curve_chart, short


def points(path: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r"([-\d.e]+) ([-\d.e]+)", path)]


def test_points_lie_where_their_values_are() -> None:
    chart = make_curve_chart("Loss", "", [Series("train", "train", [0, 50, 100], [0.0, 1.0, 2.0], has_dots=True)])
    assert chart is not None
    (line,) = chart.lines
    (_, bottom), (middle_x, middle), (right, top) = points(line.path)
    assert (middle_x, right) == (50, 100)
    assert bottom == 100  # the axis begins at 0
    assert middle == pytest.approx((bottom + top) / 2, abs=0.02)
    assert 0 < top < 10
    assert line.dots == points(line.path)
    assert [tick.label for tick in chart.x_ticks] == ["0", "20", "40", "60", "80", "100"]
    assert "train ends at 2" in chart.summary


def test_an_outlier_does_not_flatten_the_rest_and_stays_inside() -> None:
    values = [1.0 + 0.001 * step for step in range(500)]
    values[250] = 1e6
    chart = make_curve_chart("Loss", "", [Series("train", "train", list(range(500)), values)])
    assert chart is not None
    heights = [y for _, y in points(chart.lines[0].path)]
    assert min(heights) == -2
    others = heights[:240] + heights[260:]
    assert max(others) - min(others) > 50


def test_long_series_are_averaged_and_noisy_ones_smoothed() -> None:
    steps = list(range(5 * POINTS))
    chart = make_curve_chart("x", "", [Series("a", "b", steps, [float(step % 2) for step in steps], is_noisy=True)])
    assert chart is not None
    (line,) = chart.lines
    assert len(points(line.path)) == POINTS
    smooth = [y for _, y in points(line.smooth)]
    assert max(smooth) - min(smooth) < 20
    assert line.dots == []


def test_nothing_gives_no_chart_and_one_point_a_visible_one() -> None:
    assert make_curve_chart("x", "", [Series("a", "b", [], [])]) is None
    chart = make_curve_chart("x", "", [Series("a", "b", [7], [3.0])], reference=0.5)
    assert chart is not None
    assert len(points(chart.lines[0].path)) == 2
    assert chart.zero is not None


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.25, "0.25"), (12.0, "12"), (1.5e-5, "1.5e-5"), (12345.6, "12,346"), (2e9, "2e+9"), (-0.5, "-0.5")],
)
def test_values_are_short(value: float, text: str) -> None:
    assert short(value) == text
