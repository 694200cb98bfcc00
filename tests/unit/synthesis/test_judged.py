"""Scores by a judge behind an address."""

from __future__ import annotations

import base64
import io
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from orpo_ray.config.load import parse_recipe
from orpo_ray.errors import RowError, UserError
from orpo_ray.synthesis.candidates import Candidate
from orpo_ray.synthesis.labels.base import Answered, Tools
from orpo_ray.synthesis.labels.judged import Judged
from orpo_ray.synthesis.local_model import LocalModel
from orpo_ray.tiny_models.build import resolve
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


def test_a_refused_question_costs_its_own_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    part = [Answered(row_of(number, question=f"Row {number}?"), [Candidate("a"), Candidate("b"), Candidate("c")])
            for number in range(4)]  # fmt: skip

    def reply(body: dict) -> str | int:
        first, second = answers_of(body)
        return 400 if "Row 2?" in text_of(body) and "c" in (first, second) else "A" if first < second else "B"

    with serving(reply) as server:
        found = label(tmp_path, server.url).score(part)
    assert str(found[2]) == "refused_by_judge: status 400: 'no: 400'"
    for place in (0, 1, 3):
        assert [each.score for each in found[place]] == [1.0, 0.5, 0.0]  # type: ignore[union-attr]


def test_a_judge_that_refuses_all_rows_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    part = [Answered(row_of(number), [Candidate("a"), Candidate("b")]) for number in range(4)]
    alone = Answered(row_of(4), [Candidate("a")])
    with serving(lambda body: 422) as server:
        with pytest.raises(UserError, match=r"synthesize\.judge\.url: the judge refuses all 4 rows.*status 422"):
            label(tmp_path, server.url).score([*part, alone])
        few = label(tmp_path, server.url).score([*part[:3], alone])
    assert [isinstance(each, RowError) for each in few] == [True, True, True, False]


def test_a_question_that_a_local_judge_cannot_take_costs_its_own_row(tmp_path: Path) -> None:
    """A question with the word for an image in it: the processor misses a second image."""
    recipe = tiny_recipe(
        tmp_path, "x", synthesize={"label": "judge", "judge": {"model": resolve("orpo-ray/tiny-smolvlm")}}
    )
    made = Judged(Tools(recipe, LocalModel(recipe), PlannedEngine(None)))
    rows = [row_of(0), row_of(1, question="Is this <image> red?")]
    first, second = made.score([Answered(each, [Candidate("a"), Candidate("b")]) for each in rows])
    assert [each.score for each in first] == [0.5, 0.5]  # type: ignore[union-attr]
    assert isinstance(second, RowError)
    assert second.reason == "refused_by_judge"


def test_the_judge_sees_the_whole_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    for kind in ("PNG", "JPEG", "WEBP"):
        file = io.BytesIO()
        Image.effect_noise((1000, 700), 50).convert("RGB").save(file, kind)
        row = replace(row_of(0), images=[{"bytes": file.getvalue(), "path": None}])
        with serving(lambda body: "A") as server:
            label(tmp_path, server.url).score([Answered(row, [Candidate("a"), Candidate("b")])])
        url = server.seen[0]["messages"][0]["content"][0]["image_url"]["url"]
        with Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) as opened:
            assert (opened.size, opened.format) == ((1000, 700), "JPEG" if kind == "JPEG" else "PNG")
