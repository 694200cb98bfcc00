"""The page of `orpo-ray data check`: hostile text stays text, and nothing is loaded from elsewhere."""

from __future__ import annotations

import base64
import copy
import hashlib
import re
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from typing import Any

import pytest

from orpo_ray.data_report.page import render_page
from orpo_ray.pages.text_format import TEXT_SHOWN, number, percent, visible
from support.data_reports import (
    HOSTILE,
    a_gallery,
    a_pair,
    a_report,
    a_split,
    hostile,
    nothing,
)


class Structure(HTMLParser):
    """Elements of a page with the names of their attributes, references, and text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements, self.references, self.text = set[tuple[str, ...]](), list[str](), ""
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.add((tag, *sorted(name for name, _ in attributes)))
        self.references += [value or "" for name, value in attributes if name in ("src", "href", "srcset", "action")]

    def handle_data(self, data: str) -> None:
        self.text += data


def levels(report: dict[str, Any]) -> dict[str, str]:
    cards = re.findall(r'<article class="card (\w+)">\s*<header><h3>(.*?)</h3>', render_page(report, []))
    return {title: level for level, title in cards}


def verdict(report: dict[str, Any]) -> str:
    found = re.search(r'<p class="verdict">(.*?)</p>', render_page(report, []))
    assert found
    return found[1]


def test_hostile_text_stays_text() -> None:
    """With hostile texts, the page has no elements or attributes that it does not have with normal texts."""
    tame, page = Structure(render_page(a_report(), a_gallery())), render_page(*hostile())
    found = Structure(page)
    assert found.elements <= tame.elements
    assert page.count("<script") == page.count("</script>") == 1
    for text in HOSTILE:
        assert visible(text) in found.text
    assert "{{ 7 * 7 }}{% raw %}" in found.text
    page.encode()  # can be written to a file
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", page)


def test_the_page_refers_to_nothing_outside() -> None:
    for report, gallery in ((a_report(), a_gallery()), hostile()):
        page = render_page(report, gallery)
        for reference in Structure(page).references:
            assert reference.startswith(("data:", "#"))
        style = page[page.index("<style>") : page.index("</style>")]
        assert "url(" not in style
        assert "@import" not in style
    assert re.findall(r"http(?!-equiv)", render_page(a_report(), a_gallery())) == []


@pytest.mark.parametrize(
    "address",
    [
        "https://a.example/pixel.png",
        "file:///etc/passwd",
        "data:text/html;base64,AAAA",
        "javascript:window.hacked = 1",
        'data:image/png;base64,AA"><script>window.hacked = 1</script>',
        "",
    ],
)
def test_images_that_are_not_inline_are_left_out(address: str) -> None:
    page = render_page(a_report(), [a_pair(0, images=[address])])
    assert "<img" not in page
    assert "Image 1 cannot be shown" in page


def test_the_policy_names_the_one_script_and_the_one_style() -> None:
    page = render_page(*hostile())
    policy = re.search(r'Content-Security-Policy" content="(.*?)"', page)
    assert policy
    assert policy[1].startswith("default-src 'none'; img-src data:; ")
    for tag in ("style", "script"):
        (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}';" in policy[1]
    assert "unsafe" not in policy[1]
    assert " style=" not in render_page(a_report(), a_gallery())  # the content security policy would block it


def test_the_page_stays_small() -> None:
    """Long texts are cut, with a note on how much is left out."""
    assert len(render_page(a_report(), a_gallery())) < 100_000
    page = render_page(a_report(), [a_pair(n, chosen="long " * 200_000) for n in range(80)])
    assert len(page) < 80 * 2 * TEXT_SHOWN
    assert "(and 980,000 more characters)" in page


def test_verdicts() -> None:
    report = a_report()
    assert verdict(report) == "2,000 rows: 1,960 can be used for training, 40 cannot."
    assert verdict(report | {"train": a_split(1, 0)}) == "1 row: all can be used for training."
    assert verdict(report | {"train": nothing(7)}) == "7 rows: none can be used for training."
    assert verdict(report | {"train": nothing()}) == "There are no rows."


def test_levels_of_a_clean_data_set() -> None:
    report = a_report()
    report["train"], report["eval"] = a_split(2000, 0), a_split(200, 0)
    assert set(levels(report).values()) == {"good"}
    assert len(levels(report)) == 9


def set_in(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(report: dict[str, Any]) -> None:
        *above, last = path.split(".")
        for key in above:
            report = report[key]
        report[last] = value

    return change


@pytest.mark.parametrize(
    ("title", "path", "by_value"),
    [
        ("Bad rows", "train.bad", {0: "good", 20: "warning", 200: "problem"}),
        ("Too long", "train.too_long.fraction", {0.01: "warning", 0.2: "problem"}),
        (
            "Length bias",
            "train.length_bias.chosen_longer",
            {0.5: "good", 0.6: "good", 0.65: "warning", 0.76: "problem", 0.2: "warning", 0.1: "problem"},
        ),
        (
            "Text-only accuracy",
            "train.text_only.accuracy",
            {0.5: "good", 0.65: "good", 0.7: "warning", 0.85: "problem"},
        ),
        ("Repeated rows", "train.duplicates.pairs", {0: "good", 5: "warning", 500: "problem"}),
        ("Contradictions", "train.duplicates.contradictions", {0: "good", 5: "warning", 50: "problem"}),
        ("Images", "train.images_per_pair.0", {0: "good", 10: "good", 500: "warning"}),
        ("Held-out pairs", "images_on_both_sides", {0: "good", 1: "problem"}),
    ],
)
def test_levels_of_key_figures(title: str, path: str, by_value: dict[float, str]) -> None:
    for value, level in by_value.items():
        report = a_report() | {"eval": a_split(200, 0)}
        report["train"]["too_long"]["count"] = 1
        if path == "train.bad":
            report["train"]["bad"] |= {"total": int(value), "fraction": value / 2000}
        else:
            set_in(path, value)(report)
        assert levels(report)[title] == level, value


def test_a_policy_that_ends_the_run_is_a_problem() -> None:
    report = a_report()
    report["train"]["too_long"] = {"count": 1, "fraction": 0.0005, "policy": "error"}
    assert levels(report)["Too long"] == "problem"


def test_bad_rows_are_judged_by_the_limit_of_the_recipe() -> None:
    report = a_report() | {"eval": None}
    report["train"]["bad"] |= {"total": 200, "fraction": 0.1}
    assert "Training stops above 5\u00a0% (data.max_bad_fraction)." in render_page(report, [])
    report["max_bad_fraction"] = 0.2
    assert levels(report)["Bad rows"] == "warning"


def test_held_out_pairs_are_judged_too() -> None:
    report = a_report()
    report["eval"]["text_only"]["accuracy"] = 0.9
    assert levels(report)["Text-only accuracy"] == "problem"
    page = render_page(report, [])
    assert "Held-out pairs: most chosen answers can be identified without the image" in page


def test_problems_come_first() -> None:
    report = a_report()
    report["images_on_both_sides"] = 3
    assert next(iter(levels(report).items())) == ("Held-out pairs", "problem")


def without_images(report: dict[str, Any]) -> None:
    report["train"] |= {"images_per_pair": {"0": 1960}, "image_sizes": None}


def of_one_length(report: dict[str, Any]) -> None:
    one = {"edges": [6.5, 7.5], "counts": [1960]}
    report["train"]["histograms"] = dict.fromkeys(report["train"]["histograms"], one)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (set_in("eval", None), "Set data.eval or data.eval_fraction"),
        (set_in("eval", nothing()), "Set data.eval or data.eval_fraction"),
        (set_in("train", nothing()), "The data sources have no rows"),
        (set_in("train", nothing(9)), "There are no usable pairs"),
        (set_in("train", a_split(100, 0)), "missing_image"),
        (set_in("train.text_only", None), "There are too few pairs for an estimate"),
        (set_in("max_length", 100_000), "max_length 100,000 →"),
        (set_in("max_length", 8), "max_length 8"),
        (without_images, "No pair has an image"),
        (of_one_length, "7 tokens: 1,960 pairs (100\u00a0%)"),
    ],
)
def test_missing_parts(change: Callable[[dict[str, Any]], None], says: str) -> None:
    report = copy.deepcopy(a_report())
    change(report)
    for gallery in ([], a_gallery()):
        page = render_page(report, gallery)
        assert says in page
        assert not re.search(r"\b(nan|inf|None|Undefined)\b", Structure(page).text)


def test_numbers() -> None:
    assert [number(value) for value in (0, 12.0, 3.14159, 1234567.8)] == ["0", "12", "3.1", "1,234,568"]
    shares = {0: "0", 1: "100", 0.5: "50", 0.031: "3.1", 0.0999: "10", 0.123: "12", 1e-6: "<0.1", 0.99999: ">99.9"}
    assert {share: percent(share) for share in shares} == {share: f"{text}\u00a0%" for share, text in shares.items()}


def test_without_scikit_learn_the_page_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)  # what Python does when a package is absent
    report = a_report()
    set_in("train.text_only", None)(report)
    page = Structure(render_page(report, a_gallery()))
    assert 'pip install "orpo-ray[text-baseline]"' in page.text
