"""Images of all kinds come out as upright RGB; what is broken or unsafe comes out as a reason."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from orpo_ray.data.images import load_image
from orpo_ray.errors import BadRow


def encode(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def load(data: bytes) -> Image.Image:
    return load_image({"bytes": data, "path": None}, None)


def reason(image: dict[str, object], root: Path | None = None) -> str:
    with pytest.raises(BadRow) as error:
        load_image(image, root)
    return error.value.reason


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    image = Image.new("RGB", (8, 6), (200, 30, 30)).convert(mode)
    loaded = load(encode(image, "TIFF"))
    assert (loaded.mode, loaded.size) == ("RGB", (8, 6))


def test_transparency_lies_on_white() -> None:
    assert load(encode(Image.new("RGBA", (2, 2), (255, 0, 0, 0)))).getpixel((0, 0)) == (255, 255, 255)


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    values = np.array([[0, 128 * 256], [64 * 256, 255 * 256]], np.uint16)
    assert np.asarray(load(encode(Image.fromarray(values))))[..., 0].tolist() == [[0, 128], [64, 255]]


def test_exif_orientation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert load(encode(Image.new("RGB", (8, 4)), "JPEG", exif=exif)).size == (4, 8)


def test_only_the_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    assert load(encode(frames[0], "GIF", save_all=True, append_images=frames[1:])).getpixel((0, 0)) == (255, 0, 0)


def test_broken_files() -> None:
    whole = encode(Image.effect_noise((64, 64), 50).convert("RGB"), "JPEG")
    assert reason({"bytes": whole[: len(whole) // 2], "path": None}) == "unreadable_image"
    assert reason({"bytes": b"not an image", "path": None}) == "unreadable_image"
    assert reason({"bytes": b"", "path": None}) == "unreadable_image"


def test_a_bomb_is_refused_before_it_is_decoded() -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    assert reason({"bytes": bomb, "path": None}) in ("image_too_large", "unreadable_image")


def test_paths_stay_inside_their_root(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside.png"
    root.mkdir()
    data = encode(Image.new("RGB", (3, 3)))
    outside.write_bytes(data)
    (root / "inside.png").write_bytes(data)
    (root / "link.png").symlink_to(outside)
    assert load_image({"bytes": None, "path": "inside.png"}, root).size == (3, 3)
    for path in ("../outside.png", str(outside), "link.png", "sub/../../outside.png"):
        assert reason({"bytes": None, "path": path}, root) == "unsafe_path"
    assert reason({"bytes": None, "path": "inside.png"}, None) == "unsafe_path"
    assert reason({"bytes": None, "path": "none.png"}, root) == "missing_image"
