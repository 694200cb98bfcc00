"""The script of a text."""

from __future__ import annotations

import pytest

from orpo_ray.data.scripts import script_of


@pytest.mark.parametrize(
    ("text", "script"),
    [
        ("What is on the table?", "Latin"), ("Что на столе?", "Cyrillic"), ("ما هذا؟", "Arabic"),
        ("桌子上有什么", "Han"), ("机の上に何がありますか", "Japanese"), ("책상 위에 뭐가 있어?", "Hangul"),
        ("मेज पर क्या है", "Devanagari"), ("42 + 7 = 49!", "none"), ("", "none"), ("ΑΒΓ abcd", "Latin"),
        ("ab яю", "Cyrillic"), ("яю ab", "Cyrillic"), ("\uff21\uff22\uff23", "Latin"),
    ],
)  # fmt: skip
def test_script_of(text: str, script: str) -> None:
    assert script_of(text) == script
