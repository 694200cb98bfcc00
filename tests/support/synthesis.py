"""Rows, recipes and sets for synthetic pairs."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from PIL import Image

from orpo_ray.config.recipe import Recipe
from orpo_ray.data.prompt_rows import PromptRow
from orpo_ray.errors import RowError
from orpo_ray.evaluation.draws import Draw, Drawn
from orpo_ray.tiny_models.easy_vqa import easy_vqa_rows
from support.tiny_runs import tiny_recipe

COLORS = ("red", "green", "blue", "yellow", "black", "white", "purple", "gray")


def picture(color: str, kind: str = "PNG") -> bytes:
    """An image file of one color."""
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), color).save(buffer, kind)
    return buffer.getvalue()


def row_of(number: int, answer: str | None = None, question: str = "What color is it?") -> PromptRow:
    """A row with an image of one of `COLORS`."""
    content = [{"type": "image"}, {"type": "text", "text": question}]
    image = {"bytes": picture(COLORS[number % len(COLORS)]), "path": None}
    return PromptRow(f"r{number}", [image], [{"role": "user", "content": content}], answer, f"f:{number}")


class PlannedEngine:
    """An engine whose answers a function of row and draw says."""

    def __init__(self, answer: Any) -> None:
        self.answer, self.asked = answer, list[PromptRow]()

    def check(self) -> None:
        """Nothing can be wrong."""

    def prepare(self, part: int) -> None:
        """Nothing to do."""

    def answers(self, rows: Sequence[PromptRow], draws: Sequence[Sequence[Draw]]) -> list[list[Drawn] | RowError]:
        """Answer as planned."""
        self.asked += rows
        return [[Drawn(self.answer(row, draw), True) for draw in own] for row, own in zip(rows, draws, strict=True)]


def write_questions(folder: Path, count: int, split: str = "train", first: int = 0) -> Path:
    """Write easy-vqa questions with their answers, as a JSONL file and image files."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    path = folder / f"{split}.jsonl"
    with path.open("w") as file:
        for row in easy_vqa_rows(split)[first : first + count]:
            image = f"images/{row['id']}.png"
            (folder / image).write_bytes(row["images"][0])
            question = row["prompt"][0]["content"][1]["text"]
            line = {"id": row["id"], "image": image, "question": question, "answer": row["chosen"]}
            file.write(json.dumps(line) + "\n")
    return path


def synthesis_recipe(storage: Path, name: str, source: Path | str, **fields: Any) -> Recipe:
    """A recipe that makes pairs with the tiny model, ten rows to a part."""
    section = {"source": str(source), "rows_per_part": 10, "max_new_tokens": 3, "candidates": 3, "temperatures": 1.0}
    return tiny_recipe(storage, name, synthesize=section | fields)


def set_of(folder: Path) -> dict[str, bytes]:
    """Every file of a set, hidden ones included, by its name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in (folder / "data").rglob("*") if path.is_file()}


def pairs_of(folder: Path) -> list[dict[str, Any]]:
    """The pairs of a set."""
    files = sorted((folder / "data" / "train").glob("*.parquet"))
    return [row for file in files for row in pq.read_table(file).to_pylist()]


def lines_of(folder: Path) -> list[dict[str, Any]]:
    """What became of each row of a set."""
    files = sorted((folder / "data" / "candidates").glob("*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]
