"""Preference pairs for the quickstart, made from the easy-vqa package: images of shapes (64 x 64), and questions.

Only the "what ..." questions are used: chosen is the correct answer, rejected another shape or color. Yes/no questions
are left out, because most of them can be answered without the image.
"""

from __future__ import annotations

import random
from functools import lru_cache
from pathlib import Path
from typing import Any

from orpo_ray.errors import UserError
from orpo_ray.extras import require

SHAPES = ("circle", "rectangle", "triangle")
COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SPLITS = ("train", "test")


@lru_cache(maxsize=2)
def easy_vqa_rows(split: str) -> list[dict[str, Any]]:
    """Return rows in TRL's vision format (`id, images, prompt, chosen, rejected`); images are PNG bytes.

    The rows are the same each time. Raises UserError for an unknown split.
    """
    require("easy_vqa", f"easy-vqa:{split}")
    import easy_vqa

    if split not in SPLITS:
        raise UserError(
            "unknown split of easy-vqa",
            field="data.train or data.eval",
            value=f"easy-vqa:{split}",
            fix="use " + " or ".join(f"easy-vqa:{name}" for name in SPLITS),
        )
    if split == "train":
        questions, paths = easy_vqa.get_train_questions(), easy_vqa.get_train_image_paths()
    else:
        questions, paths = easy_vqa.get_test_questions(), easy_vqa.get_test_image_paths()
    wrong = random.Random(0)
    images: dict[int, bytes] = {}
    rows = []
    for number, (question, answer, image_id) in enumerate(zip(*questions, strict=True)):
        kind = SHAPES if answer in SHAPES else COLORS
        if answer not in kind:
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
