"""Words of an answer that are replaced by others of their kind."""

from __future__ import annotations

import numpy as np
import pytest

from orpo_ray.synthesis.word_changes import Change, change_word


def change(text: str, kind: str, seed: int = 0) -> Change | None:
    return change_word(text, kind, np.random.default_rng(seed))


@pytest.mark.parametrize(
    ("text", "kind", "changed"),
    [
        ("It is on the left.", "place", "It is on the right."),
        ("Left of the tree", "place", "Right of the tree"),
        ("indoors", "place", "outdoors"),
        ("The box is in front of it", "place", "The box is behind it"),
    ],
)
def test_a_word_with_one_opposite(text: str, kind: str, changed: str) -> None:
    found = change(text, kind)
    assert found is not None
    assert found.text == changed


def test_a_word_becomes_another_of_its_group() -> None:
    texts = {found.text for seed in range(300) if (found := change("Two dogs and a dog.", "object", seed))}
    # The singular or the plural: an animal each time, never the other number.
    assert {"Two cats and a dog.", "Two dogs and a cat.", "Two dogs and an elephant."} <= texts
    assert not {"Two dogs and a elephant.", "Two dogs and a car.", "Two cat and a dog."} & texts
    counts = {found.text for seed in range(200) if (found := change("Two dogs", "count", seed))}
    assert counts == {f"{word} dogs" for word in
                      ("One", "Three", "Four", "Five", "Six", "Seven", "Eight", "Nine", "Ten")}  # fmt: skip
    digits = {found.text for seed in range(200) if (found := change("3", "count", seed))}
    assert digits == {"1", "2", "4", "5", "6", "7", "8", "9", "10"}


def test_all_occurrences_change_and_the_new_word_is_not_there_yet() -> None:
    for seed in range(40):
        found = change("A red box on a red and blue mat", "color", seed)
        assert found is not None
        _, _, other = found.note.partition(" -> ")
        word = found.note.removeprefix("color: ").partition(" -> ")[0]
        assert word in ("red", "blue")
        assert word not in found.text.split()
        assert other not in ("red", "blue")
        assert found.text.split().count(other) == (2 if word == "red" else 1)
    grey = change("a grey mat", "color", 1)
    assert grey is not None
    assert "gray" not in grey.text.split()


def test_an_article_fits_the_new_word() -> None:
    texts = {found.text for seed in range(200) if (found := change("an elephant", "object", seed))}
    assert "a dog" in texts
    assert not any(text.startswith("an ") for text in texts)


def test_a_text_without_such_a_word_stays() -> None:
    for kind in ("object", "count", "color", "place"):
        assert change("Nothing of that kind: redder, cartoon, caret.", kind) is None
        assert change("", kind) is None
