"""The page of `orpo-ray data check` in a real browser."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from orpo_ray.data_report.page import render_page
from support.browser import Opened, start_browser
from support.cover import cover
from support.data_reports import a_gallery, a_report, hostile, nothing


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    yield from start_browser()


@pytest.fixture
def opened(browser: Any, tmp_path: Path) -> Iterator[Callable[..., Opened]]:
    """Open a page. At the end, no page may have console messages or requests other than for itself."""
    pages: list[Opened] = []

    def open_page(report: dict[str, Any], gallery: list[dict[str, Any]], **options: Any) -> Opened:
        file = tmp_path / f"{len(pages)}.html"
        file.write_text(render_page(report, gallery), "utf-8")
        pages.append(Opened(browser, file, **options))
        return pages[-1]

    yield open_page
    for one in pages:
        one.close()


def test_hostile_text_does_not_run(opened: Callable[..., Opened]) -> None:
    for size in ({"width": 390, "height": 844}, {"width": 1440, "height": 900}):
        one = opened(*hostile(), viewport=size)
        one.page.evaluate("document.querySelectorAll('*').forEach((one) => one.dispatchEvent(new Event('mouseover')))")
        assert one.page.evaluate("window.hacked === undefined && document.compatMode === 'CSS1Compat'")
        assert one.overflow() <= 0


def test_an_injected_script_is_stopped_by_the_policy(opened: Callable[..., Opened]) -> None:
    one = opened(a_report(), a_gallery())
    one.page.evaluate(
        """() => {
            const script = document.createElement("script");
            script.textContent = "window.hacked = 1";
            document.body.append(script);
            const image = document.createElement("img");
            image.src = "https://a.example/pixel.png";
            document.body.append(image);
        }"""
    )
    one.page.wait_for_timeout(200)
    assert one.page.evaluate("window.hacked === undefined")
    assert len(one.complaints) >= 2
    assert all("Content Security Policy" in complaint for complaint in one.complaints)
    one.complaints.clear()
    one.requests.clear()  # the browser also reports requests that it blocked


def test_images_are_all_shown(opened: Callable[..., Opened]) -> None:
    one = opened(a_report(), a_gallery())
    one.page.wait_for_function("[...document.images].every((image) => image.complete)")
    assert one.page.evaluate("document.images.length") == 11
    assert one.page.evaluate("[...document.images].every((image) => image.naturalWidth > 0)")


@pytest.mark.parametrize(("width", "scheme"), cover([390, 768, 1440], ["light", "dark"]))
def test_nothing_overflows(opened: Callable[..., Opened], width: int, scheme: str) -> None:
    empty = {"eval": None, "train": nothing(5)}
    for report, gallery in ((a_report(), a_gallery()), (a_report() | empty, [])):
        one = opened(report, gallery, viewport={"width": width, "height": 900}, color_scheme=scheme)
        assert one.overflow() <= 0
        assert one.page.locator(".card p").evaluate_all("all => all.every((one) => one.scrollWidth <= one.clientWidth)")


def test_filters_choose_what_is_shown(opened: Callable[..., Opened]) -> None:
    one = opened(a_report(), a_gallery())

    def press(text: str) -> None:
        one.page.get_by_role("button", name=text).click()

    assert len(one.shown()) == 10
    press("longest")
    assert one.shown() == ["pair-6", "pair-7"]
    assert one.page.locator("#shown").inner_text() == "2 of 10 pairs"
    assert one.page.locator('[data-value="longest"]').get_attribute("aria-pressed") == "true"
    press("no image")
    assert one.shown() == []
    assert one.page.locator("#none-left").is_visible()
    press("Show all pairs")
    assert len(one.shown()) == 10
    press("too long")
    assert one.shown() == ["pair-6", "pair-7"]
    press("too long")
    press("any")
    assert one.shown() == ["pair-6", "pair-7", "pair-8"]


def test_search_looks_into_prompts_answers_and_ids(opened: Callable[..., Opened]) -> None:
    one = opened(a_report(), a_gallery())
    search = one.page.get_by_role("searchbox")
    expected = {"picture 3": ["pair-3"], "ANOTHER": ["pair-7"], "pair-9": ["pair-9"], "no such thing": []}
    for words, found in expected.items():
        search.fill(words)
        assert one.shown() == found
    search.fill("")
    assert len(one.shown()) == 10


def test_long_texts_unfold(opened: Callable[..., Opened]) -> None:
    one = opened(a_report(), a_gallery())
    pair = one.page.locator(".pair", has_text="Another long answer")
    text, more = pair.locator(".chosen .text"), pair.locator(".chosen .more")
    folded = text.bounding_box()["height"]
    assert pair.locator(".rejected .more").is_hidden()
    more.focus()
    one.page.keyboard.press("Enter")
    assert more.get_attribute("aria-expanded") == "true"
    assert text.bounding_box()["height"] > 3 * folded
    more.click()
    assert text.bounding_box()["height"] == folded


def test_an_image_opens_large_and_closes(opened: Callable[..., Opened]) -> None:
    one = opened(a_report(), a_gallery())
    viewer, keyboard = one.page.locator("#viewer"), one.page.keyboard
    assert viewer.is_hidden()
    thumb = one.page.get_by_role("button", name="Enlarge image 2 of pair-9")
    thumb.focus()
    keyboard.press("Enter")
    assert viewer.is_visible()
    assert "Image 2 of pair-9" in viewer.inner_text()
    keyboard.press("ArrowRight")
    assert "Image 3 of pair-9" in viewer.inner_text()
    keyboard.press("ArrowRight")
    assert "Image 1 of pair-0" in viewer.inner_text()
    keyboard.press("Escape")
    assert viewer.is_hidden()
    thumb.click()
    one.page.mouse.click(5, 5)
    assert viewer.is_hidden()


def test_everything_is_shown_without_scripts(opened: Callable[..., Opened]) -> None:
    one = opened(a_report(), a_gallery(), java_script_enabled=False)
    assert len(one.shown()) == 10
    assert one.page.locator(".tools").is_hidden()
    text = one.page.locator(".pair", has_text="Another long answer").locator(".chosen .text")
    assert text.bounding_box()["height"] > 500


def test_everything_is_printed(opened: Callable[..., Opened]) -> None:
    one = opened(a_report(), a_gallery(), color_scheme="dark")
    one.page.emulate_media(media="print")
    text = one.page.locator(".pair", has_text="Another long answer").locator(".chosen .text")
    assert text.bounding_box()["height"] > 300
    assert one.page.locator(".tools").is_hidden()
    assert one.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
