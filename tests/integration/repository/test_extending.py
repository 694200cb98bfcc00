"""The code in docs/extending.md: each section is applied to a copy of the package, then its checks run.

A block with a title is a file (python) or an edit of a file (diff); a Python block without a title is run.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from support.paths import ROOT

PAGE = ROOT / "docs" / "extending.md"
BLOCK = re.compile(r'^```(?P<language>\w+)(?: title="(?P<title>[^"]+)")?\n(?P<code>.*?)^```$', re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """One fenced code block."""

    language: str
    title: str | None
    code: str


def sections() -> dict[str, list[Block]]:
    """The blocks of each section, by its heading."""
    _, *parts = re.split(r"^## ", PAGE.read_text(), flags=re.MULTILINE)
    return {
        part.split("\n", 1)[0]: [Block(m["language"], m["title"], m["code"]) for m in BLOCK.finditer(part)]
        for part in parts
    }


def edited(text: str, diff: str) -> str:
    """Apply a diff without line numbers. Its context and removed lines must occur in the file exactly once."""
    lines = diff.splitlines(keepends=True)
    before = "".join(line[1:] for line in lines if line[0] in " -")
    after = "".join(line[1:] for line in lines if line[0] in " +")
    assert text.count(before) == 1, f"the page is out of date: the file does not have these lines once:\n{before}"
    return text.replace(before, after)


@pytest.mark.parametrize("heading", sections())
def test_a_section_works_as_it_is_written(heading: str, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "orpo_ray", tmp_path / "orpo_ray", ignore=shutil.ignore_patterns("__pycache__"))
    checks = []
    for block in sections()[heading]:
        if block.title is None:
            checks += [block.code] if block.language == "python" else []
            continue
        path = tmp_path / block.title
        if block.language == "diff":
            for hunk in block.code.split("@@\n"):
                path.write_text(edited(path.read_text(), hunk))
        else:
            assert not path.exists(), f"{block.title} exists already"
            path.write_text(block.code)
    assert checks, "a section shows how to check what it adds"
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", "\n".join(checks)]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_yaml_blocks_can_be_read() -> None:
    blocks = [block for section in sections().values() for block in section if block.language == "yaml"]
    assert blocks
    for block in blocks:
        assert isinstance(yaml.safe_load(block.code), dict)
