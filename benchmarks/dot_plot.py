"""Draw values by variant as an SVG file: a dot for each run, and the mean with its 95 % interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from math import isnan
from pathlib import Path

from orpo_ray.pages.axes import ticks

_WIDTH, _LEFT, _ROW, _TOP, _BOTTOM = 720, 170, 34, 34, 30
_STYLE = """
text{font:13px system-ui,sans-serif;fill:#1d232b}.tick,.axis{fill:#56606d}
line{stroke:#d5dae1}.interval{stroke:#2a55c4;stroke-width:2.5}.mean{fill:#2a55c4}.run{fill:none;stroke:#56606d}
@media(prefers-color-scheme:dark){text{fill:#e6e9ee}.tick,.axis{fill:#a5afbd}line{stroke:#3a424d}
.interval{stroke:#8fb0ff}.mean{fill:#8fb0ff}.run{stroke:#a5afbd}}
"""


def dot_plot(panels: Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[float]]]], path: Path) -> None:
    """Write the plot.

    Args:
        panels: title -> variant -> (value of each run, mean and half the width of its interval, NaN for one run).
        path: of the file.
    """
    width = _WIDTH - _LEFT - 20
    parts: list[str] = []
    top = 0
    for title, given in panels.items():
        variants = {name: (runs, (mean, 0.0 if isnan(half) else half)) for name, (runs, (mean, half)) in given.items()}
        bounds = [mean + side * half for _, (mean, half) in variants.values() for side in (-1, 1)]
        values = [*bounds, *(value for runs, _ in variants.values() for value in runs)]
        margin = 0.05 * (max(values) - min(values) or 1.0)
        low, high = min(values) - margin, max(values) + margin
        bottom = top + _TOP + _ROW * len(variants)

        def at(value: float, low: float = low, high: float = high) -> float:
            return round(_LEFT + width * (value - low) / (high - low), 1)

        parts.append(f'<text class="axis" x="{_LEFT}" y="{top + 20}">{escape(title)}</text>')
        for tick in ticks(low, high, 6):
            parts.append(f'<line x1="{at(tick)}" x2="{at(tick)}" y1="{top + _TOP - 4}" y2="{bottom}"/>')
            parts.append(f'<text class="tick" x="{at(tick)}" y="{bottom + 16}" text-anchor="middle">{tick:g}</text>')
        for row, (name, (runs, (mean, half))) in enumerate(variants.items()):
            y = top + _TOP + _ROW * row + _ROW // 2
            parts.append(f'<text x="{_LEFT - 14}" y="{y + 4}" text-anchor="end">{escape(name)}</text>')
            parts.append(f'<line class="interval" x1="{at(mean - half)}" x2="{at(mean + half)}" y1="{y}" y2="{y}"/>')
            parts += [f'<circle class="run" cx="{at(value)}" cy="{y}" r="4"/>' for value in runs]
            parts.append(f'<circle class="mean" cx="{at(mean)}" cy="{y}" r="5.5"/>')
        top = bottom + _BOTTOM
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {top}" role="img"><style>{_STYLE}</style>'
    path.write_text(head + "\n".join(parts) + "</svg>\n")
