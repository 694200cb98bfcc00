"""The section `synthesize`: what it takes, and what it refuses with one message."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from orpo_ray.config.load import parse_recipe
from orpo_ray.config.recipe import Recipe
from orpo_ray.errors import UserError


def parse(**section: Any) -> Recipe:
    return parse_recipe({"name": "x", "model": {"id": "m"}, "data": {"train": "t.jsonl"}, "synthesize": section})


def test_one_value_stands_for_a_list() -> None:
    found = parse(temperatures=0.5, corruptions="color", source="a.jsonl").synthesize
    assert (found.temperatures, found.corruptions, found.source) == ([0.5], ["color"], {"a.jsonl": 1.0})
    again = parse_recipe(parse(temperatures=0.5).model_dump(mode="json"))
    assert again.synthesize.temperatures == [0.5]


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"format": "questions", "source": "a"}, "unknown format; did you mean 'question'?"),
        ({"format": "question"}, "format describes the rows of source, which is not set"),
        ({"columns": {"a": "b"}}, "columns describes the rows of source"),
        ({"engine": "server"}, "set server.url and server.model"),
        ({"engine": "server", "server": {"url": "http://h/v1"}}, "set server.url and server.model"),
        ({"label": "judge"}, "set judge.model"),
        ({"candidates": 1}, "a pair needs two answers"),
        ({"temperatures": []}, "synthesize.temperatures"),
        ({"temperatures": -1}, "synthesize.temperatures"),
        ({"corruptions": ["smell"]}, "synthesize.corruptions"),
        ({"labels": "judge"}, "did you mean 'label'?"),
    ],
)
def test_what_cannot_work_is_refused(section: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as found:
        parse(**section)
    assert said in str(found.value)


def test_what_needs_one_candidate_takes_one() -> None:
    assert parse(candidates=1, include_answer=True)
    assert parse(candidates=1, label="corruption")


def test_paths_become_absolute_and_names_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    found = parse(source="a.jsonl", image_root="b", model="run", label="judge", judge={"model": "run"})
    made = found.with_absolute_paths().synthesize
    assert made.source == {str(tmp_path / "a.jsonl"): 1.0}
    assert (made.image_root, made.model, made.judge.model) == (
        str(tmp_path / "b"), os.path.realpath("run"), os.path.realpath("run"),
    )  # fmt: skip
    named = parse(model="owner/name", label="judge", judge={"url": "http://h/v1", "model": "run"}).with_absolute_paths()
    assert (named.synthesize.model, named.synthesize.judge.model) == ("owner/name", "run")
