"""The report of a run, and of several, in a real browser."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orpo_ray.errors import UserError
from orpo_ray.report.page import write_report
from orpo_ray.report.pdf import print_pdf
from support.browser import Opened, start_browser
from support.cover import cover
from support.data_reports import HOSTILE
from support.planted_runs import planted_run, score_again


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    yield from start_browser()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The report of one run, of three, of a run with hostile texts, and of one without scores."""
    folder = tmp_path_factory.mktemp("reports")
    run = planted_run(folder / "one")
    others = [
        planted_run(folder / str(place), f"run-{place}", accuracy, seed=place)
        for place, accuracy in ((2, 0.8), (3, 0.6))
    ]
    bare = planted_run(folder / "bare", "bare", finished=False)
    for name in ("eval_pairs.parquet", "eval_pairs_start.parquet", "bad_rows.jsonl", "environment.json", "data.json"):
        (bare / name).unlink()
    several = folder / "several.html"
    write_report([str(each) for each in (run, *others)], str(several))
    return {
        "one": Path(write_report([str(run)])),
        "several": several,
        "bare": Path(write_report([str(bare)])),
        "hostile": Path(write_report([str(hostile_run(folder / "hostile"))])),
    }


def hostile_run(folder: Path) -> Path:
    """A run whose prompts, answers, ids, bad rows and versions are hostile texts."""
    run = planted_run(folder, "hostile")
    texts = [text or "(empty)" for text in HOSTILE]
    data = folder / "data" / "test.jsonl"
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    for place, row in enumerate(rows):
        text = texts[place % len(texts)]
        row |= {"id": text, "prompt": text, "chosen": text + " yes", "rejected": text + " no"}
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    score_again(run)
    bad = [{"id": text, "source": text, "reason": text, "detail": text} for text in texts]
    (run / "bad_rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in bad))
    (run / "environment.json").write_text(json.dumps(dict(zip(texts, texts, strict=True))))
    for name in ("generations.jsonl", "eval_tokens.json"):
        path = run / name
        hostile = json.dumps(texts[1] + texts[0] + texts[8])[1:-1]
        path.write_text(
            path.read_text().replace("greedy at", hostile).replace("Yes", hostile).replace("answered", hostile)
        )
    return run


@pytest.mark.parametrize(
    ("name", "width", "scheme"), cover(["one", "several", "bare", "hostile"], [390, 1440], ["light", "dark"])
)
def test_every_plot_is_drawn_and_nothing_overflows(
    browser: Any, pages: dict[str, Path], name: str, width: int, scheme: str
) -> None:
    one = Opened(browser, pages[name], viewport={"width": width, "height": 900}, color_scheme=scheme)
    assert one.overflow() <= 0
    assert one.page.locator(".curve").count() == 10
    sizes = one.page.locator(".curve path").evaluate_all(
        "all => all.map(path => [path.getBoundingClientRect().width, path.getTotalLength()])"
    )
    assert len(sizes) >= 10
    assert all(wide > 50 and length > 20 for wide, length in sizes), sizes
    colors = one.page.locator(".curve path").evaluate_all("all => all.map(path => getComputedStyle(path).stroke)")
    assert len(set(colors)) >= 3
    if name in ("one", "hostile"):
        heights = one.page.locator("#margins rect").evaluate_all(
            "all => all.map(bar => bar.getBoundingClientRect().height)"
        )
        assert len(heights) > 10
        assert max(heights) > 100
        assert len(one.shown()) == 12
        assert one.page.locator(".said").count() == 2
        assert one.page.locator(".tokens span").count() > 12
        one.page.wait_for_function("[...document.images].every((image) => image.complete)")
        assert one.page.evaluate("[...document.images].every((image) => image.naturalWidth > 0)")
    assert one.page.evaluate("window.hacked === undefined && document.compatMode === 'CSS1Compat'")
    one.close()


def test_the_verdict_comes_first_and_filters_work(browser: Any, pages: dict[str, Path]) -> None:
    one = Opened(browser, pages["one"])
    assert (
        one.page.locator(".verdict").inner_text() == "Better than the model before training. The model uses its images."
    )
    one.page.get_by_role("button", name="improved least").click()
    assert len(one.shown()) == 6
    one.page.get_by_role("searchbox").fill("no such words")
    assert one.shown() == []
    one.page.get_by_role("button", name="Show all pairs").click()
    assert len(one.shown()) == 12
    one.page.get_by_text("Show all fields").click()
    assert "beta: 0.5" in one.page.locator("pre.recipe").inner_text()
    one.close()


def test_runs_are_beside_each_other(browser: Any, pages: dict[str, Path]) -> None:
    one = Opened(browser, pages["several"])
    assert one.page.locator("table.runs tbody th").all_inner_texts() == ["planted", "run-2", "run-3"]
    legend = one.page.locator(".curve").first.locator(".legend li").all_inner_texts()
    assert [text.split()[0] for text in legend] == ["planted", "run-2", "run-3"]
    one.close()


def test_a_page_is_printed_as_a_pdf(browser: Any, pages: dict[str, Path], tmp_path: Path) -> None:
    pdf = tmp_path / "report.pdf"
    print_pdf(pages["one"], pdf)
    printed = pdf.read_bytes()
    assert printed.startswith(b"%PDF-")
    assert printed.count(b"/Type /Page\n") > 1 or printed.count(b"/Type /Page ") > 1


def test_a_pdf_that_cannot_be_printed_or_written_is_one_message(
    pages: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def problem(output: Path) -> str:
        with pytest.raises(UserError) as error:
            print_pdf(pages["one"], output)
        return str(error.value)

    fake = tmp_path / "chromium"
    fake.write_text("#!/bin/sh\necho no display >&2; exit 3")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "did not print the page: no display" in problem(tmp_path / "report.pdf")
    fake.write_text("""#!/bin/sh
for each; do case "$each" in --print-to-pdf=*) echo %PDF- > "${each#*=}";; esac; done
""")
    assert "--pdf: cannot write the PDF: " in problem(tmp_path / "nowhere" / "report.pdf")
    monkeypatch.setenv("PATH", "")
    assert "install one (apt-get install chromium), or open" in problem(tmp_path / "report.pdf")
