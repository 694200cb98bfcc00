"""The code in docs/extending.md: each section is applied to a copy of the package, then its checks run.

A block with a title is a file (python) or an edit of a file (diff); a Python block without a title is run.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

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


# Runs the checks of each section in a fork, with the package from the section's folder. The forks share the imports of
# other packages, which take longer than the checks.
IN_FORKS = """
import json, os, sys, traceback
import deepspeed, peft, ray.train, torch, transformers.models.auto

statuses = []
for folder, code in json.load(sys.stdin):
    pid = os.fork()
    if pid == 0:
        os.chdir(folder)
        sys.path.insert(0, folder)
        with open("said", "w") as said:
            os.dup2(said.fileno(), 1)
            os.dup2(said.fileno(), 2)
        status = 1
        try:
            exec(compile(code, "checks", "exec"), {"__name__": "__main__"})
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    statuses.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
print(json.dumps(statuses))
"""


def test_sections_work_as_they_are_written(tmp_path: Path) -> None:
    checks = []
    for number, (heading, blocks) in enumerate(sections().items()):
        folder = tmp_path / str(number)
        shutil.copytree(ROOT / "orpo_ray", folder / "orpo_ray", ignore=shutil.ignore_patterns("__pycache__"))
        code = applied(blocks, folder)
        assert code, f"{heading}: a section shows how to check what it adds"
        checks.append((str(folder), code))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-P", "-c", IN_FORKS]
    done = subprocess.run(
        command, input=json.dumps(checks), cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    statuses = json.loads(done.stdout.splitlines()[-1])  # what libraries print is before that
    failed = [
        f"{heading}:\n{(Path(folder) / 'said').read_text()}"
        for heading, (folder, _), status in zip(sections(), checks, statuses, strict=True)
        if status != 0
    ]
    assert not failed, "\n".join(failed)


def applied(blocks: list[Block], folder: Path) -> str:
    """Write and edit the files of a section. Returns the code of its checks."""
    checks = []
    for block in blocks:
        if block.title is None:
            checks += [block.code] if block.language == "python" else []
            continue
        path = folder / block.title
        if block.language == "diff":
            for hunk in block.code.split("@@\n"):
                path.write_text(edited(path.read_text(), hunk))
        else:
            assert not path.exists(), f"{block.title} exists already"
            path.write_text(block.code)
    return "\n".join(checks)


def test_yaml_blocks_can_be_read() -> None:
    blocks = [block for section in sections().values() for block in section if block.language == "yaml"]
    assert blocks
    for block in blocks:
        assert isinstance(yaml.safe_load(block.code), dict)
