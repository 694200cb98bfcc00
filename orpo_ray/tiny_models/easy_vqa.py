"""The quickstart's preference pairs, made from the easy-vqa package: 64 x 64 shapes and questions about them.

Only the "what ..." questions are taken: right answer against another answer of the same kind. Yes/no questions are
left out, since a model can tell the better answer of most of them without looking.
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
    """TRL vision rows (`id, images, prompt, chosen, rejected`), always the same ones; images are PNG bytes."""
    require("easy_vqa", f"easy-vqa:{split}")
    import easy_vqa

    if split not in SPLITS:
        raise UserError(
            "easy-vqa has no such split",
            field="data.train or data.eval",
            value=f"easy-vqa:{split}",
            fix=" or ".join(f"easy-vqa:{name}" for name in SPLITS),
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
