"""Bytes, a path or an address -> RGB image, safely: nothing outside its root, no bomb, no truncated file."""

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

from orpo_ray.data.fetch import fetch, shown
from orpo_ray.errors import RowError
from orpo_ray.storage.files import TooLarge

MAX_BYTES = 256 * 2**20
MAX_PIXELS = 64_000_000  # a decompression bomb is a small file that says it is larger than this
MAX_RATIO = 200  # of the longer side to the shorter; Qwen's processors raise above it
# Of a JPEG, pixels x scans: usual are ten scans, and a small file with thousands of empty ones takes minutes.
MAX_SCANNED_PIXELS = 500 * MAX_PIXELS
# All others stay closed. Pillow would read many more, EPS among them, which runs a program (Ghostscript).
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Pillow warns of what is refused or mended here anyway. Set once, since `catch_warnings` is for all threads, too.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")


class ImageRoot(Protocol):
    """A folder of images that is not on this machine."""

    def read(self, path: str, at_most: int) -> bytes:
        """The content of the file at a relative path. Raises FileNotFoundError, TooLarge or another OSError."""


def load_image(image: Mapping[str, Any], root: Path | ImageRoot | None, allow_http: bool = False) -> Image.Image:
    """Decode one `{"bytes": ..., "path": ...}` to RGB, upright, over white where it is transparent.

    root: the folder that paths are relative to and must not leave (None: paths are refused). allow_http: download http
    and https addresses. Raises RowError, and nothing else.
    """
    try:
        return _decode(image_bytes(image, root, allow_http))
    except RowError as bad:
        reason, detail = bad.reason, bad.detail
    # Raised anew out here, so that a bad row that is kept for the report does not keep the image's bytes as well.
    raise RowError(reason, _printable(detail))


def image_bytes(image: Mapping[str, Any], root: Path | ImageRoot | None, allow_http: bool = False) -> bytes:
    """An image as it is stored, not decoded, under the same rules. Raises RowError."""
    data = image.get("bytes")
    if data is None:
        data = _read_path(image.get("path"), root, allow_http)
    if not isinstance(data, bytes):
        raise RowError("malformed_row", f"an image's bytes are {type(data).__name__}")
    if len(data) > MAX_BYTES:
        raise RowError("image_too_large", f"{len(data)} bytes; at most {MAX_BYTES} are read")
    return data


def _read_path(path: Any, root: Path | ImageRoot | None, allow_http: bool) -> bytes:
    if not isinstance(path, str):
        raise RowError("malformed_row", f"an image has no bytes, and its path is {type(path).__name__}")
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://|data:", path)
    if scheme and (scheme[1] or "").lower() in ("http", "https"):
        if not allow_http:
            raise RowError("unsupported_url", f"{shown(path)}: addresses are not downloaded; set data.allow_http: true")
        return fetch(path)
    if scheme:
        kind = scheme[1] or "data"
        raise RowError(
            "unsupported_url", f"images are read from files, bytes, http and https, not from {kind} addresses"
        )
    if root is None:
        raise RowError("unsafe_path", f"{path}: image paths need data.image_root")
    return _read_local(path, root) if isinstance(root, Path) else _read_remote(path, root)


def _read_local(path: str, root: Path) -> bytes:
    # A file that is replaced by a link after this comparison is not followed, and a pipe is not waited for.
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor = os.open(_inside(path, root), flags)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG):
            raise RowError("missing_image", f"no such file: {path}") from None
        raise RowError("unreadable_image", f"{path}: {error.strerror}") from None
    except (RuntimeError, ValueError) as error:  # links in a circle, NUL, half of a character
        raise RowError("unsafe_path", f"{path}: {error}") from None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise RowError("unreadable_image", f"{path} is not a regular file")
        if status.st_size > MAX_BYTES:
            raise RowError("image_too_large", f"{path}: {status.st_size} bytes; at most {MAX_BYTES} are read")
        with open(descriptor, "rb", closefd=False) as file:
            return file.read(status.st_size)
    except OSError as error:
        raise RowError("unreadable_image", f"{path}: {error.strerror}") from None
    finally:
        os.close(descriptor)


def _inside(path: str, root: Path) -> Path:
    """The real path of `path` below `root`. Links are followed before the comparison, so they cannot lead out."""
    full, root = (root / path).resolve(), root.resolve()
    if not full.is_relative_to(root):
        raise RowError("unsafe_path", f"{path} leads out of data.image_root ({root})")
    return full


def _read_remote(path: str, root: ImageRoot) -> bytes:
    if not path or path.startswith("/") or ".." in PurePosixPath(path).parts:
        raise RowError("unsafe_path", f"{path!r} leads out of data.image_root")
    # Control characters, halves of characters, what some stores take for a slash, and how fsspec chains file systems.
    if re.search(r"[\x00-\x1f\x7f\ud800-\udfff\\]|://|::", path):
        raise RowError("unsafe_path", f"{path!r} is no plain path below data.image_root")
    try:
        return root.read(path, MAX_BYTES)
    except RowError:
        raise
    except FileNotFoundError:
        raise RowError("missing_image", f"no such file: {path}") from None
    except TooLarge as error:
        raise RowError("image_too_large", f"{path}: {error}") from None
    except Exception as error:  # noqa: BLE001 - stores raise their own kinds; a row must not end the run
        raise RowError("download_failed", f"{path}: {type(error).__name__}: {error}") from None


def _decode(data: bytes) -> Image.Image:
    try:
        return _to_rgb(_upright(_open(data)))
    except RowError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise RowError("image_too_large", str(error)) from None
    except UnidentifiedImageError:
        raise RowError("unreadable_image", f"no whole {', '.join(FORMATS[:-1])} or {FORMATS[-1]} image") from None
    # Pillow's readers trust the file in places: a broken one makes them raise anything, from struct.error over
    # SyntaxError (their word for a broken PNG chunk) to MemoryError.
    except Exception as error:  # noqa: BLE001
        raise RowError("unreadable_image", f"{type(error).__name__}: {error}") from None


def _open(data: bytes) -> Image.Image:
    """The decoded image, its first frame if there are more. Nothing is decoded before its size is known."""
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    long, short = max(image.size), min(image.size)
    if long * short > MAX_PIXELS:
        raise RowError("image_too_large", f"{image.width} x {image.height} pixels; at most {MAX_PIXELS} are read")
    if long > short * MAX_RATIO:
        raise RowError(
            "extreme_aspect_ratio", f"{image.width} x {image.height} pixels; at most {MAX_RATIO} : 1 is read"
        )
    scans = data.count(b"\xff\xda") if image.format in ("JPEG", "MPO") else 0
    if scans * long * short > MAX_SCANNED_PIXELS:
        raise RowError("unreadable_image", f"a JPEG of {image.width} x {image.height} pixels in {scans} scans")
    image.load()
    return image


def _upright(image: Image.Image) -> Image.Image:
    """Turned as its EXIF block says. Pillow's `exif_transpose` writes that block anew, and fails where it cannot."""
    try:
        turn = _UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # noqa: BLE001 - as in `_decode`; the pixels of an image with a broken EXIF block are good
        return image
    return image if turn is None else image.transpose(turn)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        image = _gray(image)
    if image.mode == "La":  # converts to nothing else
        image = image.convert("LA")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        background = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        image = Image.alpha_composite(background, rgba)
    return image.convert("RGB")


def _gray(image: Image.Image) -> Image.Image:
    """Gray of 16 or 32 bits, or of floats, in 8 bits. Pillow clips at 255, which makes most such images white."""
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
    """On one line and short, without what no terminal or file takes (control characters, halves of characters)."""
    text = text if len(text) <= 200 else text[:197] + "..."
    return "".join(character if character.isprintable() else "\ufffd" for character in text)
