"""Bytes or a path -> RGB image, safely: no path out of its root, no decompression bomb, no truncated file."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps, UnidentifiedImageError

from orpo_ray.errors import BadRow

MAX_PIXELS = 64_000_000  # a decompression bomb is a small file that says it is larger than this


def load_image(image: Mapping[str, Any], root: Path | None) -> Image.Image:
    """Decode one `{"bytes": ..., "path": ...}` to RGB, upright, over white where it is transparent.

    root: the folder that paths are relative to and must not leave (None: paths are refused). Raises BadRow.
    """
    data, path = image["bytes"], image["path"]
    if data is None and "://" in path:
        raise BadRow("unsupported_url", f"{path}: images are read from files and bytes, not from addresses")
    try:
        opened = _open(io.BytesIO(data) if data is not None else _inside(path, root))
        return _to_rgb(ImageOps.exif_transpose(opened))
    except FileNotFoundError:
        raise BadRow("missing_image", f"no such file: {path}") from None
    # What PIL raises on broken files; SyntaxError is its PNG reader's word for a broken chunk.
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise BadRow("unreadable_image", f"{type(error).__name__}: {error}") from None


def _open(source: io.BytesIO | Path) -> Image.Image:
    image = Image.open(source)
    if image.width * image.height > MAX_PIXELS:
        raise BadRow("image_too_large", f"{image.width} x {image.height} pixels; at most {MAX_PIXELS} are read")
    return image


def _inside(path: str | Path, root: Path | None) -> Path:
    """The real path of `path` below `root`. Links are followed before the comparison, so they cannot lead out."""
    if root is None:
        raise BadRow("unsafe_path", f"{path}: image paths need data.image_root")
    full, root = (root / path).resolve(), root.resolve()
    if not full.is_relative_to(root):
        raise BadRow("unsafe_path", f"{path} leads out of data.image_root ({root})")
    return full


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode == "I":
        # PIL clips 16-bit values at 255 on conversion, which makes most images white: scale them instead.
        image = image.convert("I").point(lambda value: value / 256).convert("L")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        background = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        image = Image.alpha_composite(background, rgba)
    return image.convert("RGB")
