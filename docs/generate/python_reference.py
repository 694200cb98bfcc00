"""The reference of the Python modules: one page per package, filled by mkdocstrings."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "orpo_ray"
CONTRIBUTING = PACKAGE.parent / "CONTRIBUTING.md"
# The page `reference/python/index.md`.
INDEX = """---
description: The packages of orpo-ray and what each is for.
---

# Python reference

What the recipe and the commands are made of. Packages further down import those above, never the other way round.
`config`, `storage`, `tiny_models`, `processing`, `data`, `model`, `objective` and `planning` import neither Ray nor
DeepSpeed, so you can use them in a plain PyTorch loop; the
[notebook](../../../notebooks/one-pair.ipynb) does.

!!! warning "Alpha"
    Names and signatures may change between versions. The [changelog](../../../CHANGELOG.md) names every break.

| Package | Purpose | Modules |
|---|---|---|
"""


@cache
def python_pages() -> tuple[tuple[str, str, str], ...]:
    """Title, URI and Markdown of every page: the index, then one page per package or top-level module."""
    index, pages = INDEX, []
    for name, purpose in _purposes().items():
        modules = _modules(name)
        links = ", ".join(f"[`{module.split('.')[-1]}`]({name}.md#{module})" for module in modules)
        index += f"| [`{name}`]({name}.md) | {purpose} | {links} |\n"
        blocks = "".join(f"::: {module}\n\n" for module in modules)
        text = f"# `orpo_ray.{name}`\n\n{purpose[0].upper()}{purpose[1:]}.\n\n{blocks}"
        pages.append((name, f"reference/python/{name}.md", text))
    return (("Overview", "reference/python/index.md", index), *pages)


def _purposes() -> dict[str, str]:
    """Package -> purpose, in the order of the layers, from the table in CONTRIBUTING.md."""
    rows = re.findall(r"^\| `(\w+)` \| (.+) \|$", CONTRIBUTING.read_text(encoding="utf-8"), re.MULTILINE)
    return {name: purpose for name, purpose in rows if name not in ("cli", "console")}


def _modules(name: str) -> list[str]:
    """Dotted names of the modules of a package that define something public."""
    files = sorted((PACKAGE / name).rglob("*.py")) or [PACKAGE / f"{name}.py"]
    return [_dotted(file) for file in files if _has_public_names(file)]


def _dotted(file: Path) -> str:
    return ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


def _has_public_names(file: Path) -> bool:
    body = ast.parse(file.read_text(encoding="utf-8")).body
    definitions = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return any(isinstance(node, definitions) and not node.name.startswith("_") for node in body)
