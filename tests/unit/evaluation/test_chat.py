"""`orpo-ray chat` with a tiny model and lines from a pipe."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
from PIL import Image

from orpo_ray.evaluation.generation import Answerer
from orpo_ray.tiny_models.build import resolve
from support.commands import orpo_ray_here


def test_lines_from_a_pipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, int]] = []
    original = Answerer.answer

    def noted(self: Answerer, text: str, images: list[Image.Image], *rest: object) -> str:
        asked.append((text, len(images)))
        return original(self, text, images, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Answerer, "answer", noted)
    Image.new("RGB", (40, 30), "red").save(tmp_path / "red.png")
    lines = "What is this?\n\n/image red.png\nAnd this?\n/image none.png\n/new\nHello\n/quit\nnot asked\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    result = orpo_ray_here(
        "chat", str(resolve("orpo-ray/tiny-smolvlm")), "--image", "red.png", "--max-new-tokens", "4", cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    assert [count for _, count in asked] == [1, 2, 0]
    assert "What is this?" in asked[1][0]
    assert asked[1][0].count("<image>") == 2
    assert "What is this?" not in asked[2][0]
    assert "missing_image" in result.stderr
    assert "Type a message" not in result.stderr
    answers = result.stdout.split("\n")
    assert len(answers) == 4
    assert answers[0].strip()


def test_an_image_that_is_not_there_is_one_message(tmp_path: Path) -> None:
    model = str(resolve("orpo-ray/tiny-smolvlm"))
    result = orpo_ray_here("chat", model, "--image", "none.png", cwd=tmp_path)
    assert result.returncode == 2
    assert "--image" in result.stderr
    assert orpo_ray_here("chat", "nowhere", cwd=tmp_path).returncode == 2
    both = orpo_ray_here("evaluate", model, "--judge", "http://localhost/v1", cwd=tmp_path)
    assert both.returncode == 2
    assert "add --judge-model NAME" in both.stderr
