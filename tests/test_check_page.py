"""The page of `orpo-ray data check`: hostile text stays text, nothing is loaded, and in a real browser it works."""

from __future__ import annotations

import base64
import copy
import hashlib
import io
import re
import shutil
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from orpo_ray.data_report import page as check_page
from orpo_ray.data_report.page import number, percent, render_page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
CHROMIUM_FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

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
            "share": bad / rows,
            "by_reason": {"missing_image": bad} if bad else {},
            "examples": examples,
        },
        "formats": {"trl": rows},
        "images_per_pair": {"1": rows - bad},
        "image_sizes": {"width": percentiles(64, 640), "height": percentiles(64, 480)},
        "tokens": {name: percentiles(20, 320) for name in lengths},
        "histograms": {name: {"edges": edges, "counts": counts} for name in lengths if name != "image"},
        "too_long": {"count": 0, "share": 0.0, "policy": "skip"},
        "duplicates": {"pairs": 0, "prompts": 0, "contradictions": 0},
        "length_bias": {"chosen_longer": 0.5, "equal": 0.1, "median_difference": 1.0},
        "blind": {"accuracy": 0.55, "low": 0.52, "high": 0.58, "pairs": rows - bad},
    }


def a_report(held_out: bool = True) -> dict[str, Any]:
    return {
        "name": "my-run",
        "model": "HuggingFaceTB/SmolVLM-256M-Instruct",
        "max_length": 300,
        "train": a_split(),
        "eval": a_split(200, 2) if held_out else None,
        "images_on_both_sides": 0,
    }


def nothing(rows: int = 0, reason: str = "malformed_row") -> dict[str, Any]:
    """A split in which no row is a pair."""
    empty = {"images_per_pair": {}, "image_sizes": None, "tokens": None, "histograms": {}, "length_bias": None}
    bad = {"total": rows, "share": 1.0 if rows else 0.0, "by_reason": {reason: rows} if rows else {}, "examples": []}
    return a_split() | empty | {"rows": rows, "pairs": 0, "bad": bad, "blind": None, "formats": {}}


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
    """The same with every text another hostile one, also where it is a key that a file may name."""
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


class Structure(HTMLParser):
    """Elements and the names of their attributes, what they refer to, and the text between them."""

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
    """With every text poisoned the page has no element and no attribute that it has not with tame ones."""
    tame, page = Structure(render_page(a_report(), a_gallery())), render_page(*hostile())
    found = Structure(page)
    assert found.elements <= tame.elements
    assert page.count("<script") == page.count("</script>") == 1
    for text in HOSTILE:
        assert check_page.visible(text) in found.text
    assert "{{ 7 * 7 }}{% raw %}" in found.text
    page.encode()  # a file can hold it
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
    assert "Image 1 is not shown" in page


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
    assert " style=" not in render_page(a_report(), a_gallery())  # the policy would refuse it


def test_the_page_stays_small() -> None:
    """Images are what it weighs: endless texts are cut, with a word on how much is missing."""
    assert len(render_page(a_report(), a_gallery())) < 100_000
    page = render_page(a_report(), [a_pair(n, chosen="long " * 200_000) for n in range(80)])
    assert len(page) < 80 * 2 * check_page.TEXT_SHOWN
    assert "(and 980,000 more characters)" in page


def test_verdicts() -> None:
    report = a_report()
    assert verdict(report) == "2,000 rows: 1,960 can be trained on, 40 cannot."
    assert verdict(report | {"train": a_split(1, 0)}) == "1 row: all can be trained on."
    assert verdict(report | {"train": nothing(7)}) == "7 rows: none can be trained on."
    assert verdict(report | {"train": nothing()}) == "There are no rows."


def test_a_sound_set_is_good() -> None:
    report = a_report()
    report["train"], report["eval"] = a_split(2000, 0), a_split(200, 0)
    assert set(levels(report).values()) == {"good"}
    assert len(levels(report)) == 8


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
        ("Bad rows", "train.bad", {0: "good", 20: "look", 200: "act"}),
        ("Too long", "train.too_long.share", {0.01: "look", 0.2: "act"}),
        ("Length bias", "train.length_bias.chosen_longer", {0.5: "good", 0.7: "good", 0.75: "look", 0.1: "look"}),
        ("Blind guess", "train.blind.accuracy", {0.5: "good", 0.65: "good", 0.7: "look", 0.85: "act"}),
        ("Repeated rows", "train.duplicates.pairs", {0: "good", 5: "look", 500: "act"}),
        ("Contradictions", "train.duplicates.contradictions", {0: "good", 5: "look", 50: "act"}),
        ("Images", "train.images_per_pair.0", {0: "good", 10: "good", 500: "look"}),
        ("Held out", "images_on_both_sides", {0: "good", 1: "act"}),
    ],
)
def test_judgements(title: str, path: str, by_value: dict[float, str]) -> None:
    for value, level in by_value.items():
        report = a_report() | {"eval": a_split(200, 0)}
        report["train"]["too_long"]["count"] = 1
        if path == "train.bad":
            report["train"]["bad"] |= {"total": int(value), "share": value / 2000}
        else:
            set_in(path, value)(report)
        assert levels(report)[title] == level, value


def test_a_policy_that_ends_the_run_is_something_to_act_on() -> None:
    report = a_report()
    report["train"]["too_long"] = {"count": 1, "share": 0.0005, "policy": "error"}
    assert levels(report)["Too long"] == "act"


def test_held_out_pairs_are_judged_too() -> None:
    report = a_report()
    report["eval"]["blind"]["accuracy"] = 0.9
    assert levels(report)["Blind guess"] == "act"
    page = render_page(report, [])
    assert "Held-out pairs: the better answer can mostly be told without the image" in page


def test_what_needs_work_comes_first() -> None:
    report = a_report()
    report["images_on_both_sides"] = 3
    assert next(iter(levels(report).items())) == ("Held out", "act")


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
        (set_in("train", nothing()), "The recipe&#39;s data has no rows"),
        (set_in("train", nothing(9)), "No pair could be measured"),
        (set_in("train", a_split(100, 0)), "missing_image"),
        (set_in("train.blind", None), "There are too few pairs to estimate"),
        (set_in("max_length", 100_000), "max_length 100,000 →"),
        (set_in("max_length", 8), "max_length 8"),
        (without_images, "No pair has an image"),
        (of_one_length, "7 tokens: 1,960 pairs (100\u00a0%)"),
    ],
)
def test_what_is_not_there(change: Callable[[dict[str, Any]], None], says: str) -> None:
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


# In a real browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed (apt-get install chromium)")
    playwright = pytest.importorskip("playwright.sync_api", reason="no Playwright (pip install playwright)")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_FLAGS)
        yield browser
        browser.close()


class Opened:
    """A page in the browser, with what it asked for and complained of."""

    def __init__(self, browser: Any, file: Path, **options: Any) -> None:
        self.complaints, self.requests = list[str](), list[str]()
        self.page = browser.new_page(**{"viewport": {"width": 1440, "height": 900}} | options)
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(file.as_uri())
        self.address = file.as_uri()

    def shown(self) -> list[str]:
        return self.page.locator(".pair:visible h3").all_inner_texts()

    def overflow(self) -> int:
        return self.page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")


@pytest.fixture
def opened(browser: Any, tmp_path: Path) -> Iterator[Callable[..., Opened]]:
    """Opens a page; in the end none may have complained, or asked for anything but itself."""
    pages: list[Opened] = []

    def open_page(report: dict[str, Any], gallery: list[dict[str, Any]], **options: Any) -> Opened:
        file = tmp_path / f"{len(pages)}.html"
        file.write_text(render_page(report, gallery), "utf-8")
        pages.append(Opened(browser, file, **options))
        return pages[-1]

    yield open_page
    for one in pages:
        assert one.complaints == []
        assert [url for url in one.requests if url != one.address and not url.startswith("data:")] == []
        one.page.close()


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
    one.requests.clear()  # the browser names those that it refused, too


def test_images_are_all_shown(opened: Callable[..., Opened]) -> None:
    one = opened(a_report(), a_gallery())
    one.page.wait_for_function("[...document.images].every((image) => image.complete)")
    assert one.page.evaluate("document.images.length") == 11
    assert one.page.evaluate("[...document.images].every((image) => image.naturalWidth > 0)")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 768, 1440])
def test_nothing_sticks_out(opened: Callable[..., Opened], width: int, scheme: str) -> None:
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


def test_without_scripts_all_is_shown(opened: Callable[..., Opened]) -> None:
    one = opened(a_report(), a_gallery(), java_script_enabled=False)
    assert len(one.shown()) == 10
    assert one.page.locator(".tools").is_hidden()
    text = one.page.locator(".pair", has_text="Another long answer").locator(".chosen .text")
    assert text.bounding_box()["height"] > 500


def test_on_paper_all_is_shown(opened: Callable[..., Opened]) -> None:
    one = opened(a_report(), a_gallery(), color_scheme="dark")
    one.page.emulate_media(media="print")
    text = one.page.locator(".pair", has_text="Another long answer").locator(".chosen .text")
    assert text.bounding_box()["height"] > 300
    assert one.page.locator(".tools").is_hidden()
    assert one.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
