"""Small copies of images, inside a page."""

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
    try:
        picture = load_image(image, image_folder(root), allow_http)
    except RowError:
        return ""
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
