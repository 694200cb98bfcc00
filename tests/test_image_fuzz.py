"""Whatever the bytes and whatever the path: an RGB image from inside the root or a bad row, nothing else, and soon."""

from __future__ import annotations

import io
import os
import time
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, features

from orpo_ray.data.images import FORMATS, ImageRoot, load_image
from orpo_ray.errors import RowError

# Pillow says in words what else it finds in broken files.
pytestmark = pytest.mark.filterwarnings("ignore")

INSIDE, SECRET = (0, 128, 0), (201, 33, 77)
quickly = settings(deadline=None, max_examples=500, suppress_health_check=[HealthCheck.too_slow])


@cache
def encodings() -> list[bytes]:
    """Real files of every format that is read, in their main variants."""
    color = Image.merge("RGB", [Image.effect_noise((24, 20), sigma) for sigma in (20, 40, 60)])
    alpha, gray = color.convert("RGBA"), color.convert("L")
    exif = Image.Exif()
    exif[0x0112] = 6
    deep = Image.fromarray(np.arange(480, dtype=np.uint16).reshape(20, 24) * 100)
    frames = {"save_all": True}
    variants: list[tuple[str, Image.Image, dict[str, object]]] = [
        *(("JPEG", color, {"exif": exif}), ("JPEG", color, {"progressive": True}), ("JPEG", color.convert("CMYK"), {})),
        *(
            ("MPO", color, frames),
            ("PNG", alpha, {"exif": exif}),
            ("PNG", color.quantize(9), {"transparency": b"\0\7"}),
        ),
        *(("PNG", deep, {}), ("PNG", alpha, frames), ("GIF", color, frames), ("GIF", color.quantize(5), {})),
        *(("BMP", image, {}) for image in (color, gray, color.quantize(9), color.convert("1"))),
        *(("WEBP", alpha, {"lossless": True}), ("WEBP", color, {"exif": exif}), ("WEBP", alpha, frames)),
        *(("TIFF", color, {"compression": name}) for name in (None, "tiff_lzw", "tiff_deflate", "jpeg", "packbits")),
        *(
            ("TIFF", deep, {}),
            ("TIFF", gray.convert("F"), {}),
            ("TIFF", color, frames),
            ("TIFF", alpha, {"exif": exif}),
        ),
        *(("TIFF", gray.convert("1"), {"compression": "group4"}), ("TIFF", color.quantize(9), {})),
        *(("PPM", image, {}) for image in (color, gray, gray.convert("1"), gray.convert("I"), gray.convert("F"))),
    ]
    if features.check("avif"):
        variants += [("AVIF", alpha, {"exif": exif}), ("AVIF", color, frames)]
    found = []
    for kind, image, options in variants:
        buffer = io.BytesIO()
        second = {"append_images": [image.rotate(90)]} if options == frames else {}
        image.copy().save(buffer, kind, **options, **second)  # a copy: a JPEG leaves its options in the image
        found.append(buffer.getvalue())
    return [*found, b"P3\n2 1\n255\n0 0 0 255 9 9\n", b"P2\n2 1\n999\n0 998\n", b"P1\n2 1\n0 1\n"]


@st.composite
def broken_files(draw: st.DrawFn) -> bytes:
    """A real file, cut, spliced, and overwritten in places."""
    data = bytearray(draw(st.sampled_from(encodings())))
    for _ in range(draw(st.integers(0, 4))):
        place = draw(st.integers(0, max(len(data) - 1, 0)))
        # Most that can go wrong stands in the first bytes.
        place = place % 64 if draw(st.booleans()) else place
        length = draw(st.integers(0, 40))
        match draw(st.sampled_from(["overwrite", "extreme", "cut", "remove", "repeat", "insert", "splice"])):
            case "overwrite":
                data[place : place + length] = draw(st.binary(min_size=length, max_size=length))
            case "extreme":
                extreme = draw(st.sampled_from([b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff", b"\0\0\0\1", b"\x80"]))
                data[place : place + len(extreme)] = extreme
            case "cut":
                del data[place:]
            case "remove":
                del data[place : place + length]
            case "repeat":
                data[place:place] = data[place : place + length] * draw(st.integers(1, 50))
            case "insert":
                data[place:place] = draw(st.binary(max_size=40))
            case "splice":
                other = draw(st.sampled_from(encodings()))
                data[place:] = other[draw(st.integers(0, len(other))) :]
    return bytes(data)


def outcome(data: bytes | None, path: str | None = None, root: Path | ImageRoot | None = None) -> Image.Image | None:
    """The image, or None for a bad row; any other exception fails the test, and so does a long wait."""
    start = time.monotonic()
    image, detail = None, ""
    try:
        image = load_image({"bytes": data, "path": path}, root)
    except RowError as bad:
        detail = bad.detail
    assert time.monotonic() - start < 10
    assert detail.isprintable()
    assert len(detail) <= 200
    assert image is None or (image.mode == "RGB" and min(image.size) > 0)
    return image


def test_the_files_are_good_before_they_are_broken() -> None:
    assert all(outcome(data) for data in encodings())
    kinds = {Image.open(io.BytesIO(data)).format for data in encodings()}
    assert kinds - {"MPO"} == set(FORMATS) - (set() if features.check("avif") else {"AVIF"})


@settings(quickly, max_examples=2000)
@given(broken_files())
def test_broken_files(data: bytes) -> None:
    outcome(data)


@quickly
@given(st.integers(0, 999), st.integers(0, 16), st.binary(max_size=300))
def test_random_bytes(file: int, length: int, rest: bytes) -> None:
    outcome(encodings()[file % len(encodings())][:length] + rest)


@pytest.mark.slow
@settings(quickly, max_examples=20_000)
@given(broken_files())
def test_many_broken_files(data: bytes) -> None:
    outcome(data)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images, with links of all kinds, beside a secret."""
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
    """Mostly ways that exist, from several starts; sometimes with something odd on the way."""
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
    """A remote root that opens whatever it is asked for: `load_image` alone holds the paths to it."""

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
