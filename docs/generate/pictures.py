"""Make the pictures of the README and the documentation, light and dark, by a Chromium that is installed.

    python docs/generate/pictures.py report runs/quickstart
    python docs/generate/pictures.py sweep runs/beta-lr-map

`report` is the top of a run's report; the run should have been made with `eval.on_start=true eval.generate=4`. `sweep`
is a plot of the fields of a sweep (docs/beta-and-learning-rate.md says which).
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import PIL.Image
from playwright.sync_api import sync_playwright

from orpo_ray.report.page import write_report

ASSETS = Path(__file__).parents[1] / "assets"
SIZE = {"width": 1280, "height": 860}
NARROW = {"width": 820, "height": 860}
COLORS = 128  # of the palette; a page has few colors, and the file is a third of the size


def main() -> None:
    """Write `<name>-light.png` and `<name>-dark.png`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=["report", "sweep"])
    parser.add_argument("run", help="run folder")
    parser.add_argument("--output", type=Path, default=ASSETS, help="folder of the pictures")
    options = parser.parse_args()
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        sys.exit("no Chromium is installed")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        if options.kind == "report":
            file = Path(write_report([options.run], str(Path(folder) / "report.html")))
            take(browser, file, options.output / "report", SIZE)
        else:
            file = Path(options.run) / "sweep.html"
            take(browser, file, options.output / "beta-learning-rate", NARROW, "#fields figure")
        browser.close()


def take(browser: Any, file: Path, name: Path, size: dict[str, int], part: str | None = None) -> None:
    """Take the pictures of a page, or of a part of it, given as a CSS selector."""
    for scheme in ("light", "dark"):
        page = browser.new_page(viewport=size, color_scheme=scheme)
        page.goto(file.resolve().as_uri())
        target = name.with_name(f"{name.name}-{scheme}.png")
        (page if part is None else page.locator(part)).screenshot(path=target)
        image = PIL.Image.open(target).convert("RGB").quantize(COLORS, dither=PIL.Image.Dither.NONE)
        image.save(target, optimize=True)
        print(target)


if __name__ == "__main__":
    main()
