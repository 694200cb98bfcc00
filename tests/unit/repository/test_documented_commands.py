"""Commands and recipes that the README, the docs and the recipes themselves show are accepted as they stand."""

from __future__ import annotations

import re
import shlex
from collections import defaultdict
from typing import Any

import pytest
import yaml

from orpo_ray.config.load import load_recipe, parse_recipe
from support.paths import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "recipes").glob("*.yaml"))]
BLOCK = re.compile(r"^ *```(\w+)[^\n]*\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
WITH_RECIPE = ("train", "tune", "iterate", "plan", "submit", "data check", "data prepare", "data synthesize")
WRITING = ("train", "tune", "iterate", "data prepare", "data synthesize")
OTHERS = ("chat", "evaluate", "export", "report", "runs", "init", "convert", "schema", "doctor")


def commands() -> list[tuple[str, str]]:
    """(page, command) for every `orpo-ray ...` in a shell block or in a recipe's comments."""
    found = []
    for page in PAGES:
        text = page.read_text()
        if page.suffix == ".md":
            text = "\n".join(code for language, code in BLOCK.findall(text) if language in ("bash", "text"))
            text = text.replace("\\\n", " ")
        for line in text.splitlines():
            # Not `orpo-ray-...` of a path, and not a word of a sentence.
            if match := re.match(r"(?:[#$ ]*|.*-- )(orpo-ray (?:data )?\w+.*)", line):
                found.append((page.name, match[1].split(" #")[0].strip().rstrip("`.")))
    return found


def test_there_are_commands_of_every_kind() -> None:
    text = "\n".join(command for _, command in commands())
    for name in (*WITH_RECIPE, "evaluate", "export"):
        assert f"orpo-ray {name} " in text


@pytest.mark.parametrize(("page", "command"), commands())
def test_a_command_is_accepted(page: str, command: str) -> None:
    name = next(name for name in (*WITH_RECIPE, *OTHERS) if command.startswith(f"orpo-ray {name}"))
    arguments = shlex.split(command.removeprefix(f"orpo-ray {name}"))
    if name in OTHERS or not arguments[0].startswith("recipes/"):
        return
    overrides = [argument for argument in arguments[1:] if re.match(r"[\w.]+=", argument)]
    load_recipe(ROOT / arguments[0], overrides)


def test_commands_of_a_page_with_other_settings_write_other_folders() -> None:
    """So that a page can be followed from top to bottom: a folder with another run or another set is refused."""
    found: dict[tuple[str, str, str], set[str]] = defaultdict(set)
    for page, command in commands():
        name = next((name for name in WRITING if command.startswith(f"orpo-ray {name} recipes/")), None)
        if name is not None:
            recipe, *options = shlex.split(command.removeprefix(f"orpo-ray {name}"))
            overrides = [option for option in options if re.match(r"[\w.]+=", option)]
            found[page, name, load_recipe(ROOT / recipe, overrides).run_uri].add(command)
    assert len(found) > 10
    assert not [key for key, each in found.items() if len(each) > 1]


def recipe_blocks() -> list[Any]:
    """YAML blocks with sections of a recipe."""
    pages = [page for page in PAGES if page.suffix == ".md"]
    blocks = [(page.name, code) for page in pages for language, code in BLOCK.findall(page.read_text())
              if language == "yaml"]  # fmt: skip
    return [pytest.param(code, id=f"{page} {code.splitlines()[0]}") for page, code in blocks]


@pytest.mark.parametrize("code", recipe_blocks())
def test_a_recipe_is_accepted(code: str) -> None:
    raw = yaml.safe_load(code)
    raw.setdefault("name", "x")
    raw["model"] = {"id": "x", **raw.get("model", {})}
    raw["data"] = {"train": "x.jsonl", **raw.get("data", {})}
    parse_recipe(raw)
