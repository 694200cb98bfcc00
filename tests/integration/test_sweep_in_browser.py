"""The page of a sweep in a real browser."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orpo_ray.sweep.page import render_sweep
from orpo_ray.sweep.record import Record
from orpo_ray.sweep.space import make_space
from support.browser import Opened, start_browser
from support.cover import cover
from support.data_reports import HOSTILE
from support.planted_sweeps import METRIC, planted_record, sweep_recipe


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    yield from start_browser()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The page of a sweep, of one with two metrics, prices and hostile texts, and of one with a single trial."""
    folder = tmp_path_factory.mktemp("sweeps")
    record, space = planted_record(sweep_recipe(folder), count=24)
    several = render_sweep(record, space, doubt="0004 cannot be told from 0010 on 80 held-out pairs")
    options = {"searcher": "tpe", "scheduler": "none", "second_metric": "eval/grounding_gap"}
    both, space = planted_record(sweep_recipe(folder, **options), count=24)
    both.gpus_per_trial, both.price_per_hour = 1.0, 2.5
    for trial, text in zip(both.trials, HOSTILE * 3, strict=False):
        trial.error, trial.state = text, "failed" if trial.number % 5 == 0 else trial.state
    hostile = render_sweep(both, space, ended_by=HOSTILE[0])
    recipe = sweep_recipe(folder, {"model.dtype": {"choices": ["float32", "bfloat16"]}})
    single = Record(recipe, num_steps=40)
    trial = single.new({"model.dtype": "bfloat16"})
    trial.history, trial.state = [{"step": 40, "seconds": 3.0, METRIC: 0.5}], "finished"
    texts = {"several": several, "hostile": hostile, "single": render_sweep(single, make_space(recipe))}
    for name, text in texts.items():
        (folder / f"{name}.html").write_text(text)
    return {name: folder / f"{name}.html" for name in texts}


@pytest.mark.parametrize(
    ("name", "width", "scheme"), cover(["several", "hostile", "single"], [390, 1440], ["light", "dark"])
)
def test_every_plot_is_drawn_and_nothing_overflows(
    browser: Any, pages: dict[str, Path], name: str, width: int, scheme: str
) -> None:
    one = Opened(browser, pages[name], viewport={"width": width, "height": 900}, color_scheme=scheme)
    assert one.overflow() <= 0
    trials = one.page.locator(".trials tbody tr").count()
    assert trials == (1 if name == "single" else 24)
    assert one.page.locator(".parallel .trial path").count() == trials
    sizes = one.page.locator(".trial path").evaluate_all("all => all.map(path => path.getTotalLength())")
    assert all(length > 0 for length in sizes)
    if name != "single":
        assert one.page.locator("#map .trial").count() == trials
        assert one.page.locator(".weights .span").count() == 2
        colors = one.page.locator(".parallel .trial path").evaluate_all(
            "all => all.map(path => getComputedStyle(path).stroke)"
        )
        assert len(set(colors)) >= 5
    assert one.page.locator("#front .trial.front").count() == 0 or name == "hostile"
    assert one.page.evaluate("window.hacked === undefined && document.compatMode === 'CSS1Compat'")
    one.close()


def test_a_trial_can_be_followed_through_all_plots(browser: Any, pages: dict[str, Path]) -> None:
    one = Opened(browser, pages["several"])
    row = one.page.locator(".trials tbody tr").nth(2)
    row.click()
    name = row.locator("th").inner_text()
    one.page.mouse.move(0, 0)
    lit = one.page.locator(".lit").evaluate_all("all => all.map(mark => mark.dataset.trial)")
    assert lit == [name] * 4
    assert one.page.locator("svg .trial:not(.lit)").first.evaluate("mark => getComputedStyle(mark).opacity") != "1"
    row.click()
    one.page.locator("h1").click()
    assert one.page.locator(".lit").count() == 0
    one.close()
