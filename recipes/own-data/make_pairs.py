"""Write a small preference dataset in four scripts: JSONL with its own column names, and images next to it.

    python recipes/own-data/make_pairs.py my-pairs

Pictures of colored shapes (the easy-vqa package, MIT) with questions and answers in Arabic, Hindi, Japanese and
Russian. One column names the language.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

from orpo_ray.tiny_models.easy_vqa import easy_vqa_rows

SHAPES = {
    "ar": {"circle": "دائرة", "rectangle": "مستطيل", "triangle": "مثلث"},
    "hi": {"circle": "वृत्त", "rectangle": "आयत", "triangle": "त्रिभुज"},
    "ja": {"circle": "円", "rectangle": "長方形", "triangle": "三角形"},
    "ru": {"circle": "круг", "rectangle": "прямоугольник", "triangle": "треугольник"},
}
QUESTIONS = {
    "ar": "ما الشكل الموجود في الصورة؟",
    "hi": "चित्र में कौन सी आकृति है?",
    "ja": "画像にはどの図形がありますか。",
    "ru": "Какая фигура на изображении?",
}


def main(folder: Path, split: str, count: int) -> None:
    """Write `count` rows per language to `<folder>/<split>.jsonl`, and their images below `<folder>/images`."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows = [row for row in easy_vqa_rows(split) if row["chosen"] in SHAPES["ru"]]
    random.Random(0).shuffle(rows)
    with (folder / f"{split}.jsonl").open("w", encoding="utf-8") as file:
        for number, row in enumerate(rows[: count * len(QUESTIONS)]):
            language = list(QUESTIONS)[number % len(QUESTIONS)]
            image = f"images/{row['id']}.png"
            (folder / image).write_bytes(row["images"][0])
            words = SHAPES[language]
            pair = {
                "id": f"{language}-{row['id']}",
                "language": language,
                "picture": image,
                "question": QUESTIONS[language],
                "good": words[row["chosen"]],
                "bad": words[row["rejected"]],
            }
            file.write(json.dumps(pair, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    target = Path(sys.argv[1] if len(sys.argv) > 1 else "my-pairs")
    main(target, "train", 500)
    main(target, "test", 50)
    print(f"{target}/train.jsonl, {target}/test.jsonl")
