"""Arbitrary bytes and paths give an RGB image from inside the root or a bad row, and quickly."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, features

from orpo_ray.data.images import FORMATS
from support.broken_images import broken_files, encodings, outcome, quickly

# Pillow warns about corrupt files.
pytestmark = pytest.mark.filterwarnings("ignore")

INSIDE, SECRET = (0, 128, 0), (201, 33, 77)


def test_unmodified_files_are_valid() -> None:
    assert all(outcome(data) for data in encodings())
    kinds = {Image.open(io.BytesIO(data)).format for data in encodings()}
    assert kinds - {"MPO"} == set(FORMATS) - (set() if features.check("avif") else {"AVIF"})


@settings(quickly, max_examples=600)
@given(broken_files())
def test_broken_files(data: bytes) -> None:
    outcome(data)


@quickly
@given(st.integers(0, 999), st.integers(0, 16), st.binary(max_size=300))
def test_random_bytes(file: int, length: int, rest: bytes) -> None:
    outcome(encodings()[file % len(encodings())][:length] + rest)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image folder with links of all kinds, and a secret file outside."""
    parent = tmp_path_factory.mktemp("images")
    folder, secret = parent / "root", parent / "secret"
    (folder / "sub").mkdir(parents=True)
    secret.mkdir()
    Image.new("RGB", (2, 2), SECRET).save(secret / "secret.png")
    Image.new("RGB", (2, 2), SECRET).save(parent / "secret.png")
    Image.new("RGB", (2, 2), SECRET).save(parent / "root.png")
    Image.new("RGB", (2, 2), INSIDE).save(folder / "a.png")
    Image.new("RGB", (2, 2), INSIDE).save(folder / "sub" / "\u00e9.png")
    (folder / "link.png").symlink_to(secret / "secret.png")
    (folder / "relative.png").symlink_to("../secret/secret.png")
    (folder / "up").symlink_to("..")
    (folder / "sub" / "secret").symlink_to(secret)
    (folder / "good.png").symlink_to("sub/\u00e9.png")
    (folder / "round").symlink_to("round")
    (folder / "twice.png").symlink_to("up/root/link.png")
    os.mkfifo(folder / "pipe")
    return folder


WAYS = ["..", "..", ".", "", "sub", "up", "secret", "root"]
NAMES = [
    "a.png",
    "\u00e9.png",
    "link.png",
    "relative.png",
    "secret.png",
    "good.png",
    "twice.png",
    "root.png",
    "pipe",
    "round",
]
ODD = [
    *(
        "~",
        "...",
        "..\\..",
        "%2e%2e",
        "\x00",
        "..\x00",
        "\ud800",
        "\u2024.",
        "file:",
        "C:",
        " ",
        "\u202e",
        "*",
        "x" * 300,
    ),
    *("proc/self/root", "dev/zero", "dev/stdin", "./" * 3000),
]


@st.composite
def paths(draw: st.DrawFn, root: Path) -> str:
    """Mostly existing paths from several starting points, sometimes with unusual components."""
    ways = draw(st.lists(st.sampled_from(WAYS), max_size=3))
    if draw(st.integers(0, 4)) == 0:
        ways.insert(draw(st.integers(0, len(ways))), draw(st.one_of(st.sampled_from(ODD), st.text(max_size=8))))
    starts = ["", "", "", "/", "//", f"{root}/", f"{root.parent}/", "file://", "../root/"]
    return draw(st.sampled_from(starts)) + "/".join([*ways, draw(st.sampled_from(NAMES))])


@quickly
@given(st.data())
def test_no_path_leads_out(root: Path, data: st.DataObject) -> None:
    image = outcome(None, data.draw(paths(root)), root)
    assert image is None or image.getpixel((0, 0)) == INSIDE


class Careless:
    """A remote root that opens any path, so that only `load_image` checks the paths."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self, path: str, at_most: int) -> bytes:
        asked = os.path.normpath(os.path.join(self.folder, path))
        assert asked == str(self.folder) or asked.startswith(f"{self.folder}/")
        if not os.path.isfile(asked) or os.path.realpath(asked) != asked:
            raise FileNotFoundError(asked)
        return Path(asked).read_bytes()


@quickly
@given(st.data())
def test_no_path_leads_out_of_a_remote_folder(root: Path, data: st.DataObject) -> None:
    image = outcome(None, data.draw(paths(root)), Careless(root))
    assert image is None or image.getpixel((0, 0)) == INSIDE
