"""Print a page as a PDF, with a browser of this machine: only a browser draws the page as it is."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from orpo_ray.errors import UserError

FIELD = "--pdf"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "microsoft-edge")
TIMEOUT_S = 120.0
OFFLINE = "--host-resolver-rules=MAP * ~NOTFOUND"


def print_pdf(page: Path, output: Path) -> None:
    """Print a page.

    Args:
        page: the HTML file.
        output: the PDF file to write.

    Raises:
        UserError: there is no browser, or the browser does not print the page, or the file cannot be written.
    """
    browser = next((found for name in BROWSERS if (found := shutil.which(name)) is not None), None)
    if browser is None:
        raise UserError(
            "no Chromium, Chrome or Edge is on this machine to print the page with",
            field=FIELD,
            value=str(output),
            fix="install one (apt-get install chromium), or open the page in a browser and print it",
        )
    # Beside the output, since a browser that is a snap has a /tmp of its own.
    with _written(output), tempfile.TemporaryDirectory(prefix=".orpo-ray-pdf-", dir=output.resolve().parent) as folder:
        printed = Path(folder) / "page.pdf"
        command = [browser, "--headless", "--disable-gpu", "--no-first-run", f"--user-data-dir={folder}/profile"]
        if os.geteuid() == 0:
            command.append("--no-sandbox")  # Chromium refuses to start as root otherwise
        command += [OFFLINE, "--no-pdf-header-footer", f"--print-to-pdf={printed}", page.resolve().as_uri()]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT_S)
            said = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        except (OSError, subprocess.TimeoutExpired) as error:
            said = str(error)
        if not printed.is_file():
            fix = "open the page in a browser and print it"
            raise UserError(f"{browser} did not print the page: {said}", field=FIELD, value=str(output), fix=fix)
        printed.replace(output)


@contextmanager
def _written(output: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        fix = "give a file in a folder that you can write to"
        raise UserError(f"cannot write the PDF: {error}", field=FIELD, value=str(output), fix=fix) from None
