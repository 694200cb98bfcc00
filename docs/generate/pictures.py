"""Make the README's pictures of a report: the top of the page, light and dark, by a Chromium that is installed.

    python docs/generate/pictures.py runs/quickstart

The run should have been made with `eval.on_start=true eval.generate=4`.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

import PIL.Image
from playwright.sync_api import sync_playwright

from orpo_ray.report.page import write_report

ASSETS = Path(__file__).parents[1] / "assets"
WIDTH, HEIGHT = 1280, 860
COLORS = 128  # of the palette; a page has few colors, and the file is a third of the size


def main() -> None:
    """Write `report-light.png` and `report-dark.png`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="run folder")
    parser.add_argument("--output", type=Path, default=ASSETS, help="folder of the pictures")
    options = parser.parse_args()
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        sys.exit("no Chromium is installed")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        page_file = write_report([options.run], str(Path(folder) / "report.html"))
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for scheme in ("light", "dark"):
            page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT}, color_scheme=scheme)
            page.goto(Path(page_file).as_uri())
            target = options.output / f"report-{scheme}.png"
            page.screenshot(path=target)
            PIL.Image.open(target).convert("RGB").quantize(COLORS, dither=PIL.Image.Dither.NONE).save(
                target, optimize=True
            )
            print(target)
        browser.close()


if __name__ == "__main__":
    main()
