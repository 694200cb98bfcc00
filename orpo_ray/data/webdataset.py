"""Members of a sample in a webdataset tar file -> row."""

from __future__ import annotations

from orpo_ray.data.json_rows import Row, parse_json_row
from orpo_ray.errors import RowError

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif")


def split_name(name: str) -> tuple[str, str]:
    """Split a member's name into key and extension, at the first dot of its last component (webdataset convention)."""
    folder, _, last = name.rpartition("/")
    stem, _, extension = last.partition(".")
    return f"{folder}/{stem}", extension.lower()


def row_of_sample(key: str, members: list[tuple[str, bytes]]) -> Row | RowError:
    """Make a row from the members of a sample: columns from `.json`, a column per text (`.prompt.txt`), and images."""
    row: Row = {"id": key.lstrip("/")}
    images: list[bytes] = []
    for extension, content in members:
        kind = extension.rpartition(".")[2]
        if kind == "json":
            columns = parse_json_row(content)
            if isinstance(columns, RowError):
                return columns
            row |= columns
        elif kind in ("txt", "text"):
            try:
                row[extension.rpartition(".")[0] or "text"] = content.decode()
            except UnicodeDecodeError as error:
                return RowError("malformed_row", f"{extension} is not UTF-8: {error}")
        elif kind in IMAGE_SUFFIXES:
            images.append(content)
    return row | ({"images": images} if images else {})
