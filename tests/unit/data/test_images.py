"""All kinds of images are loaded as upright RGB; corrupt and unsafe ones are bad rows."""

from __future__ import annotations

import io
import pickle
import struct
import time
import warnings
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageFile, features

from orpo_ray.data import images
from orpo_ray.data.images import FORMATS, load_image
from orpo_ray.errors import RowError

WHITE = (255, 255, 255)


def encode(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def load(data: bytes) -> Image.Image:
    return load_image({"bytes": data, "path": None}, None)


def failure(image: dict[str, object]) -> RowError:
    with pytest.raises(RowError) as error:
        load_image(image, None)
    assert error.value.detail.isprintable()
    assert len(error.value.detail) <= 200
    error.value.detail.encode()
    return error.value


def reason(image: dict[str, object]) -> str:
    return failure(image).reason


def png(width: int, height: int, depth: int = 8, color: int = 2, pixels: bytes = b"") -> bytes:
    """A PNG whose header claims this size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "YCbCr", "I", "I;16", "I;16B", "F"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    if mode == "I;16B":
        image = Image.frombytes(mode, (8, 6), bytes(96))
    else:
        image = Image.new("RGB", (8, 6), (200, 30, 30)).convert("L" if mode == "I;16" else "RGB").convert(mode)
    # Pillow before 13 cannot read an uncompressed YCbCr TIFF, its own included.
    loaded = load(encode(image, "TIFF", **({"compression": "jpeg"} if mode == "YCbCr" else {})))
    assert (loaded.mode, loaded.size) == ("RGB", (8, 6))


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_is_read(kind: str) -> None:
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    loaded = load(encode(Image.new("RGB", (8, 6), "red"), kind))
    assert (loaded.mode, loaded.size) == ("RGB", (8, 6))
    assert np.abs(np.asarray(loaded, int) - (255, 0, 0)).max() <= 3


def test_multi_picture_files_give_the_first_picture() -> None:
    data = encode(Image.new("RGB", (8, 6), "red"), "MPO", save_all=True, append_images=[Image.new("RGB", (8, 6))])
    assert load(data).getpixel((0, 0)) == (254, 0, 0)


@pytest.mark.parametrize("kind", ["EPS", "PCX", "TGA", "PDF", "ICNS", "JPEG2000", "SGI", "DDS", "ICO", "MSP"])
def test_other_formats_are_refused(kind: str) -> None:
    image = Image.new("1" if kind == "MSP" else "RGB", (64, 64))
    assert reason({"bytes": encode(image, kind), "path": None}) == "unreadable_image"


def test_pillow_does_not_accept_truncated_files() -> None:
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


def test_transparency_becomes_white() -> None:
    assert load(encode(Image.new("RGBA", (2, 2), (255, 0, 0, 0)))).getpixel((0, 0)) == WHITE
    assert load(encode(Image.new("LA", (2, 2), (7, 0)))).getpixel((0, 0)) == WHITE
    assert load(encode(Image.new("RGBA", (2, 2), (255, 0, 0, 128)))).getpixel((0, 0)) == (255, 127, 127)
    assert load(encode(Image.new("RGB", (2, 2), "red"), transparency=(255, 0, 0))).getpixel((0, 0)) == WHITE
    assert load(encode(Image.new("RGBA", (2, 2), (9, 9, 9, 0)), "WEBP", lossless=True)).getpixel((0, 0)) == WHITE


def test_transparent_palettes_become_white() -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putdata([0, 1])
    for options in ({"transparency": b"\x00\xff"}, {"transparency": 0}):
        loaded = load(encode(palette, **options))
        assert [loaded.getpixel((x, 0)) for x in (0, 1)] == [WHITE, (0, 0, 255)]
    assert load(encode(palette, "GIF", transparency=0)).getpixel((0, 0)) == WHITE


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    values = np.array([[0, 128 * 256], [64 * 256, 255 * 256]], np.uint16)
    expected = [[0, 128], [64, 255]]
    swapped = Image.frombytes("I;16B", (2, 2), values.astype(">u2").tobytes())
    plain = b"P5 2 2 65535\n" + values.astype(">u2").tobytes()
    wide = Image.fromarray(values.astype(np.int32))
    for data in (encode(Image.fromarray(values)), encode(swapped, "TIFF"), plain, encode(wide, "TIFF")):
        assert np.asarray(load(data))[..., 0].tolist() == expected


def test_transparent_16_bit_gray_becomes_white() -> None:
    values = Image.fromarray(np.array([[1000, 40_000]], np.uint16))
    assert np.asarray(load(encode(values, transparency=1000)))[0, :, 0].tolist() == [255, 156]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0, 0.5, 1], [0, 128, 255]),
        ([-5, 100, 255], [0, 100, 255]),
        ([0, 32768, 65535], [0, 128, 255]),
        ([0, 1e6, 4e6], [0, 64, 255]),
        ([np.nan, np.inf, 200], [0, 0, 200]),
        ([-3, -2, -1], [0, 0, 0]),
    ],
)
def test_floats_are_scaled_by_their_range(values: list[float], expected: list[int]) -> None:
    image = Image.fromarray(np.array([values], np.float32))
    assert np.asarray(load(encode(image, "TIFF")))[0, :, 0].tolist() == expected


def test_large_integers_are_scaled_by_their_range() -> None:
    image = Image.fromarray(np.array([[-7, 0, 2**29, 2**31 - 1]], np.int32))
    assert np.asarray(load(encode(image, "TIFF")))[0, :, 0].tolist() == [0, 0, 64, 255]


def test_cmyk() -> None:
    """Adobe stores CMYK JPEGs inverted."""
    cyan = Image.new("CMYK", (8, 8), (255, 0, 0, 0))
    for data in (encode(cyan, "JPEG", quality=95), encode(cyan, "TIFF")):
        assert np.abs(np.asarray(load(data), int) - (0, 255, 255)).max() <= 3


def test_one_bit_is_black_or_white() -> None:
    image = Image.new("1", (9, 1))
    image.putpixel((3, 0), 1)
    for kind in ("PNG", "TIFF", "BMP", "PPM", "GIF"):
        assert np.asarray(load(encode(image, kind)))[0, :, 0].tolist() == [0, 0, 0, 255, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_exif_orientation_is_applied(kind: str, orientation: int) -> None:
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    upright = np.zeros((48, 32), np.uint8)
    upright[:16, :16] = 250  # top left
    upright[:16, 16:] = 120  # top right
    # As a camera in this orientation stores the image.
    stored = {
        2: np.fliplr(upright),
        3: np.rot90(upright, 2),
        4: np.flipud(upright),
        5: upright.T,
        6: np.rot90(upright),
        7: np.rot90(upright, 2).T,
        8: np.rot90(upright, -1),
    }.get(orientation, upright)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {} if kind in ("PNG", "TIFF") else {"quality": 95}
    data = encode(Image.fromarray(np.ascontiguousarray(stored)).convert("RGB"), kind, exif=exif, **options)
    loaded = np.asarray(load(data), int)[..., 0]
    assert loaded.shape == upright.shape
    assert np.abs(loaded - upright).mean() < 6


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_a_broken_exif_block_leaves_the_image() -> None:
    for exif in (
        b"Exif\x00\x00nonsense",
        b"Exif\x00\x00II*\x00\xff\xff\xff\xff",
        b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\x00",
    ):
        assert load(encode(Image.new("RGB", (8, 4)), "JPEG", exif=exif)).size == (8, 4)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF", "AVIF"])
def test_only_the_first_frame_of_an_animation(kind: str) -> None:
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    frames = [Image.new("RGB", (16, 16), color) for color in ("red", "blue")]
    loaded = load(encode(frames[0], kind, save_all=True, append_images=frames[1:]))
    assert np.abs(np.asarray(loaded, int) - (255, 0, 0)).max() <= 3


def test_broken_files() -> None:
    for data in (b"not an image", b"", b"\x89PNG\r\n\x1a\n", b"BM", b"GIF89a", b"II*\x00", b"\xff\xd8\xff", b"P6 9"):
        assert reason({"bytes": data, "path": None}) == "unreadable_image"


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("part", [0.3, 0.6, 0.9])
def test_truncated_files(kind: str, part: float) -> None:
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    whole = encode(Image.effect_noise((64, 64), 50).convert("RGB"), kind)
    assert load(whole)
    assert reason({"bytes": whole[: int(len(whole) * part)], "path": None}) == "unreadable_image"


@pytest.mark.parametrize("error", [struct.error, MemoryError, RecursionError, zlib.error, AssertionError, KeyError])
def test_whatever_pillow_raises_is_a_bad_row(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    def load_badly(self: object) -> None:
        raise error("half of a character: \ud800, a bell: \x07, " + 1000 * "long")

    monkeypatch.setattr(ImageFile.ImageFile, "load", load_badly)
    bad = failure({"bytes": encode(Image.new("RGB", (2, 2)), "BMP"), "path": None})
    assert (bad.reason, bad.detail.startswith(error.__name__)) == ("unreadable_image", True)


def test_lab() -> None:
    lab = ImageCms.profileToProfile(
        Image.new("RGB", (4, 4), "red"),
        ImageCms.createProfile("sRGB"),
        ImageCms.createProfile("LAB"),
        outputMode="LAB",
    )
    assert lab is not None
    assert np.abs(np.asarray(load(encode(lab, "TIFF")), int) - (255, 0, 0)).max() <= 8


@pytest.mark.parametrize(("width", "height"), [(60_000, 60_000), (8001, 8000), (10_000, 9000), (2**31 - 1, 2**31 - 1)])
def test_a_bomb_is_refused_before_it_is_decoded(width: int, height: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        start = time.thread_time()
        assert reason({"bytes": png(width, height), "path": None}) == "image_too_large"
        assert time.thread_time() - start < 1


def test_pillow_does_not_warn_of_bombs() -> None:
    from importlib import reload

    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        reload(images)
        with pytest.raises(RowError):
            images.load_image({"bytes": png(10_000, 9000), "path": None}, None)
    assert not seen


def test_a_jpeg_with_too_many_scans_is_refused_before_it_is_decoded() -> None:
    data = encode(Image.new("L", (2000, 2000)), "JPEG", progressive=True)
    assert load(data)
    last = data[data.rindex(b"\xff\xda") : -2]
    bomb = data[:-2] + last * 10_000 + data[-2:]
    start = time.thread_time()
    assert reason({"bytes": bomb, "path": None}) == "unreadable_image"
    assert time.thread_time() - start < 1


def test_large_bytes_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_BYTES", 10)
    assert reason({"bytes": encode(Image.new("RGB", (3, 3))), "path": None}) == "image_too_large"


def test_extreme_ratios_are_refused() -> None:
    """Qwen's processors raise above 200 : 1."""
    assert load(encode(Image.new("RGB", (400, 2)))).size == (400, 2)
    assert reason({"bytes": encode(Image.new("RGB", (402, 2))), "path": None}) == "extreme_aspect_ratio"
    assert reason({"bytes": encode(Image.new("L", (1, 60_000))), "path": None}) == "extreme_aspect_ratio"


def test_rows_of_other_types() -> None:
    for image in ({"bytes": None, "path": None}, {}, {"bytes": "text", "path": None}, {"bytes": None, "path": 7}):
        assert reason(image) == "malformed_row"


def test_bytes_come_before_the_path() -> None:
    data = encode(Image.new("RGB", (3, 3)))
    assert load_image({"bytes": data, "path": "../../none.png"}, None).size == (3, 3)


def test_a_row_error_does_not_keep_the_image_in_memory() -> None:
    data = encode(Image.new("RGB", (300, 1)))
    bad: Any = failure({"bytes": data, "path": None})
    assert bad.__context__ is None
    assert str(pickle.loads(pickle.dumps(bad))) == str(bad)
