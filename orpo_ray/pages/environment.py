"""Templates of self-contained pages: one file that loads nothing from any network.

Prompts and answers are untrusted text, with three protections between them and the browser: Jinja escapes all of it,
control characters are replaced by visible ones, and each page's content security policy allows only its own script and
style, by their hashes.

A page's template gets `page_style` and `page_script`, and can import the macros of parts.html.
"""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from orpo_ray.pages.text_format import counted, number, percent, shortened, visible

HERE = Path(__file__).parent
_INLINE_IMAGE = re.compile(r"data:image/[a-z0-9.+-]+;base64,[A-Za-z0-9+/]+=*")


@cache
def page_template(file: Path) -> Template:
    """Load the template of a page, which can import `parts.html`."""
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        finalize=visible,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=FileSystemLoader([file.parent, HERE]),
    )
    environment.filters |= {
        "number": number,
        "counted": counted,
        "percent": percent,
        "shortened": shortened,
        "sha256": _sha256,
    }
    environment.tests["inline"] = _INLINE_IMAGE.fullmatch  # other images would be loaded from a disk or network
    environment.globals |= {
        "page_style": _Verbatim((HERE / "page.css").read_text("utf-8")),
        "page_script": _Verbatim((HERE / "page.js").read_text("utf-8")),
    }
    return environment.get_template(file.name)


class _Verbatim(str):
    """Text of this package that goes into a page as it is: Jinja does not escape what has `__html__`."""

    def __html__(self) -> str:
        return str(self)


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
