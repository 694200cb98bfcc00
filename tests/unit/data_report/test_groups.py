"""A data check by language and by domain, worked by hand."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from orpo_ray import console
from orpo_ray.data.bad_rows import BadRow
from orpo_ray.data_report.facts import PairFacts
from orpo_ray.data_report.groups import MOST_GROUPS, figures_by
from orpo_ray.data_report.key_figures import make_cards
from orpo_ray.data_report.page import render_page
from orpo_ray.data_report.report import SplitCheck
from support.data_reports import a_report


def pair(place: int, language: str | None, prompt: int, answers: int, characters: int, **more: Any) -> PairFacts:
    """A pair with two answers of `answers` tokens."""
    return PairFacts(
        place, str(place), "a", (prompt, 0, answers, answers), answers=(characters, 2 * answers), language=language,
        **more,
    )  # fmt: skip


def bad(reason: str, language: str | None) -> BadRow:
    return BadRow(9, "9", "a:9", reason, "x", language)


ROWS = [
    pair(0, "ar", 50, 60, 40), pair(1, "ar", 10, 95, 50), pair(2, "ar", 10, 20, 10), pair(3, "en", 10, 5, 40),
    pair(4, "en", 10, 5, 40), pair(5, None, 10, 200, 10),
]  # fmt: skip


def report(policy: str = "skip", *more: PairFacts | BadRow) -> dict[str, Any]:
    split = SplitCheck(100, policy, {"trl": len(ROWS)})
    for row in (*ROWS, bad("too_long", "ar"), bad("missing_image", "en"), bad("too_long", None), *more):
        split.add(row)
    return split.report()


def test_tokens_per_character_and_pairs_that_are_too_long() -> None:
    arabic, english = report()["languages"]
    assert arabic == {
        "name": "ar", "rows": 4, "tokens_per_character": pytest.approx(350 / 100), "too_long": 3, "fraction": 0.75,
        "p95_tokens": None,  # one of four rows was not tokenized
    }  # fmt: skip
    assert english["rows"] == 2
    assert english["tokens_per_character"] == pytest.approx(20 / 80)
    assert english["too_long"] == 0
    assert report()["domains"] == []


def test_a_language_of_which_most_is_skipped_is_warned_of() -> None:
    (warning,) = report()["warnings"]
    assert warning == (
        "most pairs of the language ar are skipped for their length: 3 of 4 (75\u00a0%) exceed data.max_length (100 "
        "tokens). Increase data.max_length, or use a model whose tokenizer knows this language: here an answer takes "
        "3.50 tokens per character, and 0.25 in another language."
    )
    split = SplitCheck(100, "skip", {"trl": len(ROWS)})
    for row in ROWS:
        split.add(row)
    (warning,) = split.report()["warnings"]
    assert "2 of 3 (67\u00a0%) exceed data.max_length (100 tokens)" in warning
    assert "To keep 95 % of them, set data.max_length=110," in warning
    assert "have their answers cut" in report("truncate_response")["warnings"][0]
    assert report("error")["warnings"] == []


def test_a_domain_is_warned_of_without_a_word_about_tokenizers() -> None:
    long = pair(7, None, 10, 95, 50, domain="charts")
    found = report("skip", long, pair(8, None, 10, 5, 50, domain="photos"))
    assert [group["name"] for group in found["domains"]] == ["charts", "photos"]
    assert found["warnings"][1].startswith("most pairs of the domain charts are skipped for their length: 1 of 1")
    assert "tokenizer" not in found["warnings"][1]


def test_a_language_of_which_nothing_could_be_tokenized() -> None:
    (group,) = figures_by("language", [], [bad("too_long", "he")], 100)
    assert (group["tokens_per_character"], group["p95_tokens"], group["fraction"]) == (None, None, 1.0)
    split = SplitCheck(100, "skip", {})
    split.add(bad("too_long", "he"))
    assert split.report()["warnings"][0].endswith("Increase data.max_length.")


def test_the_number_of_languages_is_bounded() -> None:
    rows = [pair(place, f"l{place:03}", 10, 5, 50) for place in range(3 * MOST_GROUPS)]
    found = figures_by("language", rows, [], 100)
    assert len(found) == MOST_GROUPS
    assert (found[-1]["name"], found[-1]["rows"]) == ("other", 2 * MOST_GROUPS + 1)


def test_warnings_are_on_the_page_and_on_the_console(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = a_report() | {"train": report(), "language": "lang"}
    card = next(card for card in make_cards(whole) if card.title == "Languages")
    assert (card.value, card.unit, card.level) == ("2", "languages", "warning")
    assert card.text.startswith("Most pairs of the language ar are skipped")
    page = render_page(whole, [])
    assert "<bdi>ar</bdi>" in page
    assert "Increase data.max_length" in page
    out = io.StringIO()
    monkeypatch.setattr(console, "console", Console(file=out, width=300))
    console.print_check(whole)
    assert "by lang" in out.getvalue()
    assert "warning: train: most pairs of the language ar are skipped" in out.getvalue()
