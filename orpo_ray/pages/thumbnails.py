"""Small copies of images, for pages and trackers."""

from __future__ import annotations

import base64
import io

from orpo_ray.data.images import load_image
from orpo_ray.data.pairs import Image
from orpo_ray.errors import RowError
from orpo_ray.storage.files import image_folder

THUMBNAIL = 480  # longer side, in pixels


def thumbnail(image: Image, root: str | None, allow_http: bool) -> str:
    """Return a small JPEG as a data URI; an empty string if the image can no longer be read."""
    found = small_jpeg(image, root, allow_http)
    return "" if found is None else "data:image/jpeg;base64," + base64.b64encode(found).decode()


def small_jpeg(image: Image, root: str | None, allow_http: bool) -> bytes | None:
    """Return a small JPEG of an image; None if the image cannot be read."""
    try:
        picture = load_image(image, image_folder(root), allow_http)
    except RowError:
        return None
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=80)
    return buffer.getvalue()
