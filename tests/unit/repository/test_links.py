"""Relative links and anchors in the repository's Markdown files lead somewhere when they are read on GitHub."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from support.paths import ROOT

FOLDERS = (".", ".github", "benchmarks", "cluster", "docs")
FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).glob("*.md"))
# Pages that exist on the site only; the strict build of the site checks links to them.
GENERATED = ROOT / "docs" / "reference"
LINK = re.compile(r"\]\((?!\w+:)([^)\s#]*)(?:#([^)\s]+))?\)")


def anchors(path: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ +(.+?)\s*$", without_code(path.read_text()), re.MULTILINE)
    plain = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
    return {heading.strip().replace(" ", "-") for heading in plain}


def without_code(text: str) -> str:
    return re.sub(r"^ *```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    for target, anchor in LINK.findall(without_code(path.read_text())):
        file = (path.parent / target).resolve() if target else path
        if file.is_relative_to(GENERATED):
            continue
        assert file.exists(), f"{target} does not exist"
        if anchor:
            assert anchor in anchors(file), f"{target} has no heading #{anchor}"


def test_the_files_that_readers_meet_are_checked() -> None:
    names = {str(path.relative_to(ROOT)) for path in FILES}
    assert {"README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/data.md", "benchmarks/README.md"} <= names
