"""Write image files that rows refer to."""

from __future__ import annotations

from pathlib import Path

from PIL import Image


def write_frames(folder: Path, count: int) -> None:
    """Write `frame1.png` and on, each brighter than the one before, and a file that is no frame."""
    folder.mkdir(parents=True)
    for number in range(1, count + 1):
        Image.new("RGB", (32, 24), (240 * number // count, 40, 0)).save(folder / f"frame{number}.png")
    (folder / "notes.txt").write_text("not a frame")
