"""Agreement with a given answer."""

from __future__ import annotations

import pytest

from orpo_ray.synthesis.labels.reference import agreement


@pytest.mark.parametrize(
    ("text", "answer", "score"),
    [
        ("Red.", "red", 1.0),
        ("The cat", "a cat!", 1.0),
        ("a red cat", "a blue cat", 0.5),  # one of two words on each side: 2 * 1 / 4
        ("two cats sit", "cats", 0.5),  # 2 * 1 / (3 + 1)
        ("red red", "red", 2 / 3),  # a word counts as often as both have it
        ("dog", "cat", 0.0),
        ("", "cat", 0.0),
        ("?!", "?!", 1.0),
        ("a", "the", 0.0),
        ("ГОЛУБОЙ круг", "голубой круг", 1.0),
        ("青い円", "赤い円", 2 / 3),
    ],
)
def test_agreement(text: str, answer: str, score: float) -> None:
    assert agreement(text, answer) == pytest.approx(score)
    assert agreement(answer, text) == pytest.approx(score)
