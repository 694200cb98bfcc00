"""The documentation: built strictly, complete, and free of anything that a browser would load from elsewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from orpo_ray.config.recipe import Recipe
from support.paths import ROOT

# What a browser loads by itself: scripts, styles, images, fonts. Links that a reader follows may lead anywhere.
LOADED = re.compile(r"""<(?:script|img|iframe|source)\b[^>]*\bsrc=["']?(https?:)?//|@import\s|url\(["']?(https?:)?//""")
STYLESHEET = re.compile(r"""<link\b[^>]*\brel=["']?(?:stylesheet|icon|preconnect)[^>]*\bhref=["']?(https?:)?//""")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    mkdocs = Path(sys.executable).with_name("mkdocs")
    command = [mkdocs, "build", "--strict", "--quiet", "--site-dir", folder]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


def recipe_keys(schema: dict, node: dict, prefix: str = "") -> set[str]:
    """Dotted keys of every field in a JSON schema, sections followed."""
    keys = set()
    for name, value in node.get("properties", {}).items():
        references = [value, *value.get("anyOf", []), *value.get("oneOf", [])]
        sections = [each["$ref"].rsplit("/", 1)[1] for each in references if "$ref" in each]
        if not sections:
            keys.add(prefix + name)
        for section in sections:
            keys |= recipe_keys(schema, schema["$defs"][section], f"{prefix}{name}.")
    return keys


def test_every_recipe_field_is_in_the_reference(site: Path) -> None:
    page = (site / "reference" / "recipe" / "index.html").read_text()
    schema = Recipe.model_json_schema()
    keys = recipe_keys(schema, schema)
    assert {"name", "model.lora.r", "tracking.wandb.mode", "tune.search"} <= keys
    anchors = set(re.findall(r'id="?([\w.]+)', page))
    assert not keys - anchors


def test_every_recipe_field_says_what_it_means(site: Path) -> None:
    page = (site / "reference" / "recipe" / "index.html").read_text()
    fields = page.split('class="field"')[1:]
    assert len(fields) > 50
    for field in fields:
        text = re.sub(r"<[^>]+>", "", field.split("</p>", 2)[1])
        assert len(text.split()) >= 2, field[:300]


def test_every_module_is_in_the_reference(site: Path) -> None:
    pages = (site / "reference" / "python").rglob("*.html")
    text = "".join(page.read_text() for page in pages)
    for name in ("orpo_ray.data.formats.to_pair", "orpo_ray.config.load.load_recipe", "orpo_ray.errors.UserError"):
        assert f'id="{name}"' in text or f"id={name}" in text


def test_every_command_is_in_the_reference(site: Path) -> None:
    page = (site / "reference" / "commands" / "index.html").read_text()
    for command in (
        "train",
        "tune",
        "evaluate",
        "report",
        "runs",
        "init",
        "convert",
        "export",
        "plan",
        "schema",
        "data-check",
        "data-synthesize",
        "iterate",
    ):
        assert re.search(rf'id="?{command}\b', page)


def test_pages_load_nothing_from_elsewhere(site: Path) -> None:
    files = [*site.rglob("*.html"), *site.rglob("*.css")]
    assert len(files) > 20
    for file in files:
        text = file.read_text()
        assert not (found := LOADED.search(text) or STYLESHEET.search(text)), f"{file}: {found and found[0]}"
