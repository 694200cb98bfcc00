"""Load images from bytes, paths or URLs as RGB. Refuses paths outside the image root, decompression bombs and
truncated files.
"""

from __future__ import annotations

import errno
import io
import os
import re
import stat
import warnings
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from orpo_ray.data.fetch import fetch, redact_url
from orpo_ray.errors import RowError
from orpo_ray.storage.files import TooLarge

MAX_BYTES = 256 * 2**20
MAX_PIXELS = 64_000_000  # small files with larger images are decompression bombs
MAX_RATIO = 200  # longer side / shorter side; the Qwen processors raise above this
# JPEG: pixels x scans. About ten scans are usual; a small file with thousands of empty scans takes minutes to decode.
MAX_SCANNED_PIXELS = 500 * MAX_PIXELS
# Pillow reads more formats, but some are unsafe: EPS runs a program (Ghostscript).
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
_TRANSPOSE_BY_ORIENTATION = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Pillow warns about images that are refused or repaired here. The filters are set once and globally, since
# `catch_warnings` is not thread-safe.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")


class ImageRoot(Protocol):
    """An image folder that is not on this machine."""

    def read(self, path: str, at_most: int) -> bytes:
        """Read the file at a relative path. Raises FileNotFoundError, TooLarge or another OSError."""


def load_image(image: Mapping[str, Any], root: Path | ImageRoot | None, allow_http: bool = False) -> Image.Image:
    """Decode an image to RGB, rotated upright, on a white background if transparent.

    Args:
        image: `{"bytes": ..., "path": ...}`.
        root: folder that paths are relative to and must stay in; None refuses paths.
        allow_http: whether to download http and https URLs.

    Raises:
        RowError: the image cannot be used. No other exception is raised.
    """
    try:
        return _decode(read_image_bytes(image, root, allow_http))
    except RowError as bad:
        reason, detail = bad.reason, bad.detail
    # Raised outside the handler: the traceback of the original error would keep the image's bytes in memory.
    raise RowError(reason, _printable(detail))


def read_image_bytes(image: Mapping[str, Any], root: Path | ImageRoot | None, allow_http: bool = False) -> bytes:
    """Read the encoded bytes of an image, under the same rules as `load_image`. Raises RowError."""
    data = image.get("bytes")
    if data is None:
        data = _read_path(image.get("path"), root, allow_http)
    if not isinstance(data, bytes):
        raise RowError("malformed_row", f"image bytes must be bytes, found {type(data).__name__}")
    if len(data) > MAX_BYTES:
        raise RowError("image_too_large", f"{len(data)} bytes exceed the limit of {MAX_BYTES}")
    return data


def _read_path(path: Any, root: Path | ImageRoot | None, allow_http: bool) -> bytes:
    if not isinstance(path, str):
        raise RowError("malformed_row", f"an image needs bytes or a path, found a path of type {type(path).__name__}")
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://|data:", path)
    if scheme and (scheme[1] or "").lower() in ("http", "https"):
        if not allow_http:
            raise RowError("unsupported_url", f"{redact_url(path)}: downloads are disabled; set data.allow_http: true")
        return fetch(path)
    if scheme:
        kind = scheme[1] or "data"
        raise RowError("unsupported_url", f"unsupported image URL scheme: {kind}; use a path, bytes, http or https")
    if root is None:
        raise RowError("unsafe_path", f"{path}: image paths require data.image_root")
    return _read_local(path, root) if isinstance(root, Path) else _read_remote(path, root)


def _read_local(path: str, root: Path) -> bytes:
    # Do not follow a link that replaces the file after the check in `inside`, and do not wait for a pipe.
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor = os.open(inside(path, root), flags)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG):
            raise RowError("missing_image", f"no such file: {path}") from None
        raise RowError("unreadable_image", f"{path}: {error.strerror}") from None
    except (RuntimeError, ValueError) as error:  # circular links, NUL, lone surrogates
        raise RowError("unsafe_path", f"{path}: {error}") from None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise RowError("unreadable_image", f"{path} is not a regular file")
        if status.st_size > MAX_BYTES:
            raise RowError("image_too_large", f"{path}: {status.st_size} bytes exceed the limit of {MAX_BYTES}")
        with open(descriptor, "rb", closefd=False) as file:
            return file.read(status.st_size)
    except OSError as error:
        raise RowError("unreadable_image", f"{path}: {error.strerror}") from None
    finally:
        os.close(descriptor)


def inside(path: str, root: Path) -> Path:
    """Resolve `path` below `root`. Links are resolved before the check, so they cannot lead out of `root`."""
    full, root = (root / path).resolve(), root.resolve()
    if not full.is_relative_to(root):
        raise RowError("unsafe_path", f"{path} is outside data.image_root ({root})")
    return full


def check_remote(path: str) -> None:
    """Raise RowError unless a path leads to a file below a folder in an object store."""
    if not path or path.startswith("/") or ".." in PurePosixPath(path).parts:
        raise RowError("unsafe_path", f"{path!r} is outside data.image_root")
    # Control characters, lone surrogates, backslashes (a separator in some stores), and fsspec's chained URLs.
    if re.search(r"[\x00-\x1f\x7f\ud800-\udfff\\]|://|::", path):
        raise RowError("unsafe_path", f"{path!r} is not a plain relative path")


def _read_remote(path: str, root: ImageRoot) -> bytes:
    check_remote(path)
    try:
        return root.read(path, MAX_BYTES)
    except RowError:
        raise
    except FileNotFoundError:
        raise RowError("missing_image", f"no such file: {path}") from None
    except TooLarge as error:
        raise RowError("image_too_large", f"{path}: {error}") from None
    except Exception as error:  # noqa: BLE001 - stores raise their own exceptions; a row must not end the run
        raise RowError("download_failed", f"{path}: {type(error).__name__}: {error}") from None


def _decode(data: bytes) -> Image.Image:
    try:
        return _to_rgb(_rotate_upright(_open(data)))
    except RowError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise RowError("image_too_large", str(error)) from None
    except UnidentifiedImageError:
        raise RowError("unreadable_image", f"not a complete {', '.join(FORMATS[:-1])} or {FORMATS[-1]} image") from None
    # For a corrupt file, Pillow's decoders raise many kinds of errors, among them struct.error, SyntaxError (for a
    # corrupt PNG chunk) and MemoryError.
    except Exception as error:  # noqa: BLE001
        raise RowError("unreadable_image", f"{type(error).__name__}: {error}") from None


def _open(data: bytes) -> Image.Image:
    """Decode an image, of animations the first frame. The size is checked before anything is decoded."""
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    long, short = max(image.size), min(image.size)
    if long * short > MAX_PIXELS:
        raise RowError("image_too_large", f"{image.width} x {image.height} pixels exceed the limit of {MAX_PIXELS}")
    if long > short * MAX_RATIO:
        raise RowError(
            "extreme_aspect_ratio", f"{image.width} x {image.height} pixels exceed the aspect ratio of {MAX_RATIO} : 1"
        )
    scans = data.count(b"\xff\xda") if image.format in ("JPEG", "MPO") else 0
    if scans * long * short > MAX_SCANNED_PIXELS:
        raise RowError(
            "unreadable_image", f"a JPEG of {image.width} x {image.height} pixels with {scans} scans, which is too many"
        )
    image.load()
    return image


def _rotate_upright(image: Image.Image) -> Image.Image:
    """Rotate an image by its EXIF orientation.

    Pillow's `exif_transpose` also rewrites the EXIF block, which fails if the block is corrupt.
    """
    try:
        transpose = _TRANSPOSE_BY_ORIENTATION.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # noqa: BLE001 - as in `_decode`; pixels can be good although the EXIF block is corrupt
        return image
    return image if transpose is None else image.transpose(transpose)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        image = _to_8_bit_gray(image)
    if image.mode == "La":  # Pillow converts this mode only to LA
        image = image.convert("LA")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        background = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        image = Image.alpha_composite(background, rgba)
    return image.convert("RGB")


def _to_8_bit_gray(image: Image.Image) -> Image.Image:
    """Scale a grayscale image of 16 bits, 32 bits or floats to 8 bits.

    Pillow clips values at 255 instead, which makes most such images white.
    """
    values = np.asarray(image)
    if image.mode == "F":
        values = np.where(np.isfinite(values), values, 0)
    high = float(values.max())
    if image.mode == "F" and high <= 255:
        scale = 255.0 if high <= 1 else 1.0
    else:
        scale = 1 / 256 if high <= 65535 else 255 / high
    gray = np.clip(np.multiply(values, scale, dtype=np.float32) + 0.5, 0, 255).astype(np.uint8)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        gray[values == transparent] = 255
    return Image.fromarray(gray)


def _printable(text: str) -> str:
    """Shorten to 200 characters, and replace line breaks, control characters and lone surrogates."""
    text = text if len(text) <= 200 else text[:197] + "..."
    return "".join(character if character.isprintable() else "\ufffd" for character in text)
