"""Reports of data checks: normal, with hostile texts, and empty."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from typing import Any

from PIL import Image

HOSTILE = [
    "<script>window.hacked = 1</script>",
    "<img src=x onerror='window.hacked = 1'>",
    "</script><script>window.hacked = 1</script>",
    "</style></title></svg><svg onload='window.hacked = 1'>",
    "\"'><b onmouseover='window.hacked = 1'>",
    "<!-- ]]> <![CDATA[ <a href='javascript:window.hacked = 1'>",
    "{{ 7 * 7 }}{% raw %}{# &amp; &lt; $HOME %s",
    "https://a.example/pixel.png",
    "W" * 3000,
    "\u05e9\u05dc\u05d5\u05dd \u202eexe.gpj \u0627\u0644\u0639\u0631\u0628\u064a\u0629",
    "\U0001f469\u200d\U0001f469\u200d\U0001f467" * 200,
    "Z" + "\u0300\u0301\u0302\u0303\u0304" * 200,
    "nul \x00 escape \x1b[31m \x9b \r\n bell \x07",
    "a lone \ud800 surrogate",
    "line\n" * 400,
    "",
]


def data_uri(color: str, size: tuple[int, int] = (96, 64)) -> str:
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def percentiles(low: float, high: float) -> dict[str, float]:
    middle = (low + high) / 2
    return {"min": low, "p50": middle, "p90": high, "p95": high, "p99": high, "max": high, "mean": middle}


def a_group(name: str, rows: int) -> dict[str, Any]:
    return {
        "name": name, "rows": rows, "tokens_per_character": 0.5, "too_long": 1, "fraction": 1 / max(1, rows),
        "p95_tokens": 280,
    }  # fmt: skip


def a_split(rows: int = 2000, bad: int = 40) -> dict[str, Any]:
    edges = [20.0 + 10 * place for place in range(31)]
    counts = [max(1, 90 - (place - 9) ** 2) for place in range(30)]
    examples = [
        {"id": f"row-{n}", "source": "pairs.jsonl", "reason": "missing_image", "detail": f"images/{n}.png"}
        for n in range(min(bad, 50))
    ]
    lengths = ("prompt", "image", "chosen", "rejected", "sequence")
    return {
        "rows": rows,
        "pairs": rows - bad,
        "bad": {
            "total": bad,
            "fraction": bad / rows,
            "by_reason": {"missing_image": bad} if bad else {},
            "examples": examples,
        },
        "formats": {"trl": rows},
        "images_per_pair": {"1": rows - bad},
        "image_sizes": {"width": percentiles(64, 640), "height": percentiles(64, 480)},
        "tokens": {name: percentiles(20, 320) for name in lengths},
        "histograms": {name: {"edges": edges, "counts": counts} for name in lengths if name != "image"},
        "too_long": {"count": 0, "fraction": 0.0, "policy": "skip"},
        "languages": [a_group("Arabic", rows - bad - 40), a_group("Latin", 40)],
        "domains": [],
        "warnings": [],
        "duplicates": {"pairs": 0, "prompts": 0, "contradictions": 0},
        "length_bias": {"chosen_longer": 0.5, "equal": 0.1, "median_difference": 1.0},
        "text_only": {"accuracy": 0.55, "low": 0.52, "high": 0.58, "pairs": rows - bad},
    }


def a_report(held_out: bool = True) -> dict[str, Any]:
    return {
        "name": "my-run",
        "model": "HuggingFaceTB/SmolVLM-256M-Instruct",
        "max_length": 300,
        "max_bad_fraction": 0.05,
        "language": "script",
        "domain": None,
        "train": a_split(),
        "eval": a_split(200, 2) if held_out else None,
        "images_on_both_sides": 0,
    }


def nothing(rows: int = 0, reason: str = "malformed_row") -> dict[str, Any]:
    """A split without usable rows."""
    empty = {"images_per_pair": {}, "image_sizes": None, "tokens": None, "histograms": {}, "length_bias": None}
    empty |= {"languages": [], "domains": [], "warnings": []}
    bad = {"total": rows, "fraction": 1.0 if rows else 0.0, "by_reason": {reason: rows} if rows else {}, "examples": []}
    return a_split() | empty | {"rows": rows, "pairs": 0, "bad": bad, "text_only": None, "formats": {}}


def a_pair(place: int, why: str = "sample", **changes: Any) -> dict[str, Any]:
    pair = {
        "id": f"pair-{place}",
        "source": "pairs.jsonl",
        "why": why,
        "images": [data_uri("teal")],
        "rejected_images": [],
        "prompt": [{"role": "user", "text": f"What is in picture {place}?"}],
        "chosen": "A teal rectangle.",
        "rejected": "A dog that reads the newspaper.",
        "tokens": {"prompt": 80, "image": 64, "chosen": 5, "rejected": 8},
        "warnings": [],
    }
    return pair | changes


def a_gallery() -> list[dict[str, Any]]:
    return [
        *(a_pair(place) for place in range(6)),
        a_pair(6, "longest", chosen="A very long answer. " * 200, warnings=["too long: 900 tokens"]),
        a_pair(7, "longest", chosen="Another long answer. " * 200, warnings=["too long: 800 tokens"]),
        a_pair(8, "shortest", images=[], warnings=["no image"]),
        a_pair(9, "duplicate", images=[data_uri("red"), data_uri("blue")], rejected_images=[data_uri("gold", (9, 99))]),
    ]


def poisoned(value: Any, texts: Iterator[str]) -> Any:
    """Replace every text by a hostile one, including keys that come from data."""
    if isinstance(value, str):
        return value if value.startswith("data:") else next(texts)
    if isinstance(value, list):
        return [poisoned(item, texts) for item in value]
    if isinstance(value, dict):
        return {key: item if key == "policy" else poisoned(item, texts) for key, item in value.items()}
    return value


def hostile() -> tuple[dict[str, Any], list[dict[str, Any]]]:
    def forever() -> Iterator[str]:
        while True:
            yield from HOSTILE

    report, gallery = poisoned(a_report(), forever()), poisoned(a_gallery(), forever())
    for split in (report["train"], report["eval"]):
        split["bad"]["by_reason"] = dict.fromkeys(HOSTILE, 2)
        split["formats"] = dict.fromkeys(HOSTILE, 2)
    gallery += [a_pair(100 + n, chosen=text, rejected=text, warnings=[text]) for n, text in enumerate(HOSTILE)]
    return report, gallery
