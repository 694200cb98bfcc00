"""MkDocs hooks: pages made from code and from files outside docs/, and links that work on GitHub and on the site."""

from __future__ import annotations

import posixpath
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # the reference is of the checkout, whatever version is installed

from command_reference import command_reference
from python_reference import python_pages
from recipe_reference import recipe_reference

from orpo_ray.config.rules import RULES

# Files of the repository that are pages of the site, under the same path.
REPOSITORY_PAGES = (
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "benchmarks/README.md",
    "benchmarks/against_peers.md",
)
REFUSED = "<!-- generated: refused combinations -->"
# The target of an inline link or image: `](target)` or `](target#anchor)`, but no address and no bare anchor.
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)\s#]+)(#[^)\s]*)?(?=\))")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put one page per package into the navigation."""
    pages = [{title: uri} for title, uri, _ in python_pages()]
    for section in config.nav or []:
        if "Reference" in section:
            section["Reference"] = [{"Python": pages} if "Python" in entry else entry for entry in section["Reference"]]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages and those from outside docs/."""
    pages = {uri: (ROOT / uri).read_text(encoding="utf-8") for uri in REPOSITORY_PAGES}
    pages["reference/recipe.md"] = recipe_reference()
    pages["reference/commands.md"] = command_reference()
    pages |= {uri: text for _, uri, text in python_pages()}
    for uri, text in pages.items():
        files.append(File.generated(config, uri, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Resolve links as GitHub does: to a page of the site if there is one, else to the file on GitHub."""
    here = posixpath.dirname(_repository_path(page.file.src_uri))

    def resolved(match: re.Match[str]) -> str:
        target, anchor = match[1], match[2] or ""
        path = posixpath.normpath(posixpath.join(here, target))
        page_uri = path.removeprefix("docs/")
        if page_uri in files.src_uris:
            return posixpath.relpath(page_uri, posixpath.dirname(page.file.src_uri) or ".") + anchor
        if (ROOT / path).exists() and not path.startswith("../"):
            kind = "tree" if (ROOT / path).is_dir() else "blob"
            return f"{config.repo_url.rstrip('/')}/{kind}/main/{path}{anchor}"
        return match[0]  # MkDocs warns about it

    if REFUSED in markdown:
        markdown = markdown.replace(REFUSED, _refused_combinations())
    return _outside_code(markdown, lambda text: LINK.sub(resolved, text))


def _refused_combinations() -> str:
    rows = "".join(f"| {rule.combination} | {rule.reason} | {rule.alternative} |\n" for rule in RULES)
    return f"| Combination | Reason | Use instead |\n|---|---|---|\n{rows}"


def _repository_path(uri: str) -> str:
    return uri if uri in REPOSITORY_PAGES else f"docs/{uri}"


def _outside_code(markdown: str, change: Any) -> str:
    """Apply a change to all text but fenced code blocks."""
    parts = re.split(r"(^ *```.*?^ *```[^\n]*$)", markdown, flags=re.MULTILINE | re.DOTALL)
    return "".join(part if index % 2 else change(part) for index, part in enumerate(parts))
