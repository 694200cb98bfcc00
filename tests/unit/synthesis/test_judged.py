"""Scores by a judge behind an address."""

from __future__ import annotations

from pathlib import Path

import pytest

from orpo_ray.config.load import parse_recipe
from orpo_ray.errors import RowError, UserError
from orpo_ray.synthesis.candidates import Candidate
from orpo_ray.synthesis.labels.base import Answered, Tools
from orpo_ray.synthesis.labels.judged import Judged
from orpo_ray.synthesis.local_model import LocalModel
from support.chat_servers import answers_of, serving, text_of
from support.synthesis import PlannedEngine, row_of
from support.tiny_runs import tiny_recipe


def label(tmp_path: Path, url: str | None) -> Judged:
    recipe = tiny_recipe(tmp_path, "x", synthesize={"label": "judge", "judge": {"url": url, "model": "m"}})
    return Judged(Tools(recipe, LocalModel(recipe), PlannedEngine(None)))


def test_scores_are_the_fractions_of_comparisons_won(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The judge likes longer answers: the longest wins twice, the middle ones tie, since one position always wins."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)

    def reply(body: dict) -> str:
        first, second = answers_of(body)
        return "A" if len(first) >= len(second) else "B"

    texts = ("aaaa", "bb", "cc", "d")
    part = [Answered(row_of(0), [Candidate(text) for text in texts]), Answered(row_of(1), [Candidate("alone")])]
    with serving(reply) as server:
        made = label(tmp_path, server.url)
        made.check()
        found = made.score(part)
    # aaaa beats all three; bb and cc beat d and tie with each other: (1 + 0.5) / 3.
    assert [each.score for each in found[0]] == pytest.approx([1.0, 0.5, 0.5, 0.0])  # type: ignore[union-attr]
    assert [each.score for each in found[1]] == [0.0]  # type: ignore[union-attr]
    assert len(server.seen) == 12, "six pairs, each in both positions"
    assert all("What color is it?" in text_of(body) for body in server.seen)
    assert all(body["messages"][0]["content"][0]["type"] == "image_url" for body in server.seen)


def test_an_image_that_cannot_be_shown_leaves_its_row_out(tmp_path: Path) -> None:
    row = row_of(0)
    row.images[0]["bytes"] = b"no image"
    with serving(lambda body: "A") as server:
        (found,) = label(tmp_path, server.url).score([Answered(row, [Candidate("a"), Candidate("b")])])
    assert isinstance(found, RowError)
    assert not server.seen


def test_settings_of_the_judge_are_checked(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"synthesize\.judge\.url: not an address"):
        label(tmp_path, "nowhere").check()
    with pytest.raises(UserError, match=r"synthesize\.judge\.model: the judge cannot be loaded"):
        label(tmp_path, None).check()
    raw = {"name": "x", "model": {"id": "m"}, "data": {"train": "t"}, "synthesize": {"label": "judge"}}
    with pytest.raises(UserError, match=r"set judge\.model"):
        parse_recipe(raw)
