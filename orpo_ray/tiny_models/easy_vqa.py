"""Preference pairs made from the easy-vqa package: images of shapes (64 x 64), and questions.

`train` and `test`, for the quickstart, have the "what ..." questions: chosen is the correct answer, rejected another
shape or color. Yes/no questions are left out, because most of them can be answered without the image.

The other splits are for measuring whether a model looks although it need not:

- `all-train` has all questions. Of the yes/no questions, a text-only model gets 0.81 right.
- `yes-no-train` and `yes-no-test` have yes/no questions, each as often with either answer, so a text-only model
  gets 0.50 right.
- `color-train` has the yes/no questions about colors that deny nothing, of which a text-only model gets 0.88 right.
  `color-balanced` and `color-test` have each of them as often with either answer.
- `prior-train` has "what ..." questions with a planted prior, by which a text-only model gets 0.80 right: in four of
  five pairs, the chosen answer comes before the rejected one in `SHAPES` or `COLORS`. `test` has no such prior.
"""

from __future__ import annotations

import random
from collections import defaultdict
from functools import lru_cache
from pathlib import Path
from typing import Any

from orpo_ray.errors import UserError
from orpo_ray.extras import require

SHAPES = ("circle", "rectangle", "triangle")
COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
YES_NO = ("yes", "no")
SPLITS = ("train", "test", "all-train", "yes-no-train", "yes-no-test", "color-train", "color-balanced",
          "color-test", "prior-train")  # fmt: skip
_WITH_PRIOR_FOR_EACH_AGAINST = 4

Row = dict[str, Any]


@lru_cache(maxsize=len(SPLITS))
def easy_vqa_rows(split: str) -> list[Row]:
    """Return rows in TRL's vision format (`id, images, prompt, chosen, rejected`); images are PNG bytes.

    The rows are the same each time. Raises UserError for an unknown split.
    """
    require("easy_vqa", f"easy-vqa:{split}")
    if split not in SPLITS:
        raise UserError(
            "unknown split of easy-vqa",
            field="data.train or data.eval",
            value=f"easy-vqa:{split}",
            fix="use one of " + ", ".join(f"easy-vqa:{name}" for name in SPLITS),
        )
    if split == "all-train":
        return _rows("train", (SHAPES, COLORS, YES_NO))
    if split in ("yes-no-train", "yes-no-test"):
        return _balanced(_rows(split.removeprefix("yes-no-"), (YES_NO,)))
    if split == "color-train":
        return _about_colors(_rows("train", (YES_NO,)))
    if split in ("color-balanced", "color-test"):
        return _about_colors(easy_vqa_rows("yes-no-test" if split == "color-test" else "yes-no-train"))
    if split == "prior-train":
        return _with_prior(_rows("train", (SHAPES, COLORS)))
    return _rows(split, (SHAPES, COLORS))


def _rows(split: str, kinds: tuple[tuple[str, ...], ...]) -> list[Row]:
    """Make pairs of the questions of a split of the package whose answers are of these kinds."""
    import easy_vqa

    if split == "train":
        questions, paths = easy_vqa.get_train_questions(), easy_vqa.get_train_image_paths()
    else:
        questions, paths = easy_vqa.get_test_questions(), easy_vqa.get_test_image_paths()
    wrong = random.Random(0)
    images: dict[int, bytes] = {}
    rows = []
    for number, (question, answer, image_id) in enumerate(zip(*questions, strict=True)):
        kind = next((each for each in kinds if answer in each), None)
        if kind is None:
            continue
        if image_id not in images:
            images[image_id] = Path(paths[image_id]).read_bytes()
        text = [{"type": "image"}, {"type": "text", "text": question}]
        rows.append(
            {
                "id": f"easy-vqa-{split}-{number}",
                "images": [images[image_id]],
                "prompt": [{"role": "user", "content": text}],
                "chosen": answer,
                "rejected": wrong.choice([other for other in kind if other != answer]),
            }
        )
    return rows


def _question(row: Row) -> str:
    text: str = row["prompt"][0]["content"][1]["text"]
    return text


def _about_colors(rows: list[Row]) -> list[Row]:
    """Keep the questions that name a color and deny nothing."""
    words = [set(_question(row).rstrip("?").split()) for row in rows]
    return [row for row, said in zip(rows, words, strict=True) if said & set(COLORS) and not said & {"no", "not"}]


def _balanced(rows: list[Row]) -> list[Row]:
    """Keep as many rows of each question with one answer as with the other, at random."""
    by_question: dict[str, dict[str, list[int]]] = defaultdict(lambda: {answer: [] for answer in YES_NO})
    for place, row in enumerate(rows):
        by_question[_question(row)][row["chosen"]].append(place)
    draw, kept = random.Random(0), list[int]()
    for places in by_question.values():
        count = min(map(len, places.values()))
        kept += [place for each in places.values() for place in draw.sample(each, count)]
    return [rows[place] for place in sorted(kept)]


def _with_prior(rows: list[Row]) -> list[Row]:
    """Keep all rows whose chosen answer comes before the rejected one, and a quarter as many others, at random."""
    place = {answer: number for kind in (SHAPES, COLORS) for number, answer in enumerate(kind)}
    agrees = [place[row["chosen"]] < place[row["rejected"]] for row in rows]
    against = [number for number, each in enumerate(agrees) if not each]
    kept = set(random.Random(0).sample(against, sum(agrees) // _WITH_PRIOR_FOR_EACH_AGAINST))
    return [row for number, row in enumerate(rows) if agrees[number] or number in kept]
