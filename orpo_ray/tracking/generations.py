"""`generations.jsonl`: the model's own answers to some held-out pairs, one line per evaluation and pair."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from orpo_ray.config.recipe import Recipe
from orpo_ray.data.bad_rows import BadRow
from orpo_ray.storage.run_folder import GENERATIONS_FILE, RunFolder
from orpo_ray.tracking.jsonl import keep_lines


@dataclass(frozen=True)
class Generation:
    """The answers of a model to the prompt of a held-out pair."""

    sample_index: int
    """Place of the pair in the order of the held-out pairs."""
    id: str
    """Of the pair."""
    data: str
    """Digest of the held-out data."""
    prompt: str
    """Text of the prompt, a line for each part."""
    chosen: str
    rejected: str
    greedy: str
    """The answer of the most likely tokens."""
    sampled: str
    """An answer drawn with a seed that depends on the pair alone."""
    images: tuple[bytes, ...] = ()
    """Small JPEGs."""

    def as_line(self) -> dict[str, Any]:
        """Return what the file holds: the texts."""
        line = asdict(self)
        del line["images"]
        return line


_LINE_FIELDS = ("step", *(each.name for each in fields(Generation) if each.name != "images"))


def is_generations_line(line: Mapping[str, Any]) -> bool:
    """Whether a line has all fields, and numbers for its step and its pair."""
    numbers = (line.get("step"), line.get("sample_index"))
    return all(name in line for name in _LINE_FIELDS) and all(type(number) is int for number in numbers)


def as_markdown(generation: Generation) -> str:
    """Write a generation as text, with the answers as quotations."""
    parts = {name: getattr(generation, name) for name in ("prompt", "chosen", "rejected", "greedy", "sampled")}
    return "\n\n".join(f"**{name}**\n\n" + _indented(text) for name, text in parts.items())


def _indented(text: str) -> str:
    """Write a text as a block of code, in which Markdown has no meaning."""
    return "\n".join(f"    {line}" for line in (text or "(nothing)").splitlines())


class GenerationsFile:
    """Appends generations to the run folder; drops those of steps that a resumed run repeats."""

    def __init__(self, folder: RunFolder, step: int) -> None:
        self._folder = folder
        folder.pull(GENERATIONS_FILE)
        self._path = folder.path / GENERATIONS_FILE
        keep_lines(self._path, lambda line: line["step"] <= step, is_generations_line)

    @classmethod
    def open(cls, recipe: Recipe, folder: RunFolder, step: int) -> GenerationsFile | None:
        """Open the file of a run with `eval.generate`."""
        return cls(folder, step) if recipe.eval.generate else None

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Do nothing: metrics have their own file."""

    def log_bad_rows(self, rows: Sequence[BadRow]) -> None:
        """Do nothing: bad rows have their own file."""

    def log_generations(self, step: int, generations: Sequence[Generation]) -> None:
        """Write a line for each pair."""
        with self._path.open("a", encoding="utf-8") as file:
            for each in generations:
                file.write(json.dumps({"step": step} | each.as_line(), ensure_ascii=False) + "\n")

    def flush(self) -> None:
        """Push the file to a remote run folder."""
        self._folder.push(GENERATIONS_FILE)

    def close(self) -> None:
        """Push the file."""
        self.flush()


def lines_by_pair(lines: Iterable[dict[str, Any]]) -> dict[int, dict[int, dict[str, Any]]]:
    """Return sample index -> step -> line, in order; of a step that was evaluated twice, the later one."""
    found: dict[int, dict[int, dict[str, Any]]] = {}
    for line in lines:
        found.setdefault(line["sample_index"], {})[line["step"]] = line
    return {index: dict(sorted(found[index].items())) for index in sorted(found)}
