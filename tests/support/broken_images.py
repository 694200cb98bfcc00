"""Corrupt image files, and what `load_image` makes of them."""

from __future__ import annotations

import io
import time
from functools import cache
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from PIL import Image, features

from orpo_ray.data.images import ImageRoot, load_image
from orpo_ray.errors import RowError

quickly = settings(deadline=None, max_examples=500, suppress_health_check=[HealthCheck.too_slow])


@cache
def encodings() -> list[bytes]:
    """Valid files of every supported format, in their main variants."""
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
    """A valid file with some bytes overwritten, removed, repeated or inserted."""
    data = bytearray(draw(st.sampled_from(encodings())))
    for _ in range(draw(st.integers(0, 4))):
        place = draw(st.integers(0, max(len(data) - 1, 0)))
        # Headers, where most can go wrong, are in the first bytes.
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
    """Return the image, or None for a bad row. Any other exception, or more than 10 seconds, fails the test."""
    start = time.thread_time()
    image, detail = None, ""
    try:
        image = load_image({"bytes": data, "path": path}, root)
    except RowError as bad:
        detail = bad.detail
    assert time.thread_time() - start < 10
    assert detail.isprintable()
    assert len(detail) <= 200
    assert image is None or (image.mode == "RGB" and min(image.size) > 0)
    return image
