"""Videos of a row as frames: ordered lists of images, which the model takes as several images.

A video is a list of frames or a folder of them. `with_videos` puts the videos of a row into its prompt where it is
read; `with_frames` replaces each by some of its frames, evenly spaced. Video files are not decoded.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import numpy as np

from orpo_ray.data.images import FORMATS, check_remote, inside
from orpo_ray.data.pairs import Image, Message, PreferencePair, Video, check_encodable
from orpo_ray.data.row_values import read_images
from orpo_ray.errors import RowError, preview
from orpo_ray.storage.files import TooLarge

MARK = "<video>"  # position of a video, in formats with inline images
VIDEO_FILES = (".mp4", ".webm", ".mkv", ".avi", ".mov", ".m4v", ".mpg", ".mpeg", ".flv", ".wmv", ".ts", ".3gp")
FRAME_FILES = (".jpg", ".tif", *(f".{name.lower()}" for name in FORMATS))
MOST_FILES = 100_000  # in a folder of frames


class FrameFolder(Protocol):
    """A folder of images that is not on this machine."""

    def names(self, path: str, at_most: int) -> list[str]:
        """Return the names of the files in a folder at a relative path. Raises FileNotFoundError or OSError."""


def read_videos(row: Mapping[str, Any]) -> list[Video]:
    """Read the videos of a row from its column `videos`; an empty list if it has none.

    `videos` is a list of videos, each a list of frames or the path of a folder of frames. A list of frames alone is one
    video. Raises RowError.
    """
    value = row.get("videos")
    if value is None or value in ("", []):
        return []
    is_one = not isinstance(value, list | tuple) or all(map(_is_frame, value))
    return [read_video(each) for each in ([value] if is_one else value)]


def read_video(value: Any) -> Video:
    """Read one video: a list of frames, or the path of a folder of frames. Raises RowError."""
    if isinstance(value, list | tuple):
        for frame in value:
            _refuse_file(frame)
        if not value:
            raise RowError("missing_image", "a video has no frames")
        return read_images(value)
    _refuse_file(value)
    if not isinstance(value, str) or not value or _is_frame(value):
        problem = f"a video must be a list of frames or a folder of frames, found {preview(value)}"
        raise RowError("malformed_row", problem)
    return value


def with_videos(pair: PreferencePair, videos: list[Video], inline: bool) -> PreferencePair:
    """Put the videos of a row into its pair.

    Args:
        pair: as `make_pair` returns it, with the videos inside the prompt's messages as they are in the row.
        videos: of the row's own column; if empty, those inside the messages are used.
        inline: whether `<video>` in a text marks the position of a video.

    Raises:
        RowError: the prompt has video parts, but not as many as there are videos.
    """
    prompt = pair.prompt
    placed = sum(part["type"] == "video" for part in _parts(prompt))
    videos = videos or [read_video(video) for video in pair.videos]
    if not videos and not placed:
        return pair
    if videos and not placed and inline:
        prompt = [{**turn, "content": _split_at_marks(turn["content"])} for turn in prompt]
        placed = sum(part["type"] == "video" for part in _parts(prompt))
    if not placed:
        prompt = _placed_first(prompt, len(videos))
    elif placed != len(videos):
        problem = f"the prompt has {placed} video placeholder(s), but the row has {len(videos)} video(s)"
        raise RowError("video_count_mismatch", problem)
    frames = [frame["path"] or "" for video in videos if isinstance(video, list) for frame in video]
    check_encodable(prompt, *frames, *(video for video in videos if isinstance(video, str)))
    return replace(pair, prompt=prompt, videos=videos)


def with_frames(pair: PreferencePair, max_frames: int, root: Path | FrameFolder | None) -> PreferencePair:
    """Replace each video by its frames, as images in the prompt.

    Args:
        pair: as `with_videos` returns it.
        max_frames: frames of each video; of a longer one, so many are taken at even distances.
        root: folder that a folder of frames is relative to and must stay in.

    Raises:
        RowError: a folder of frames cannot be read.
    """
    if not pair.videos:
        return pair
    frames_of = [video if isinstance(video, list) else _frames_in(video, root) for video in pair.videos]
    clips = [_spaced(frames, max_frames) for frames in frames_of]
    following = iter(clips)
    prompt: list[Message] = []
    for turn in pair.prompt:
        content: list[dict[str, Any]] = []
        for part in turn["content"]:
            content += [{"type": "image"}] * len(next(following)) if part["type"] == "video" else [part]
        prompt.append({**turn, "content": content})

    def merged(images: list[Image]) -> list[Image]:
        """The images and the frames, in the order of the prompt."""
        own, frames, found = iter(images), iter(clips), list[Image]()
        for part in _parts(pair.prompt):
            if part["type"] == "video":
                found += next(frames)
            elif part["type"] == "image":
                found.append(next(own))
        return found

    rejected = None if pair.rejected_images is None else merged(pair.rejected_images)
    return replace(pair, prompt=prompt, images=merged(pair.images), rejected_images=rejected, videos=[])


def _spaced(frames: list[Image], most: int) -> list[Image]:
    """Take at most so many frames at even distances, the first and the last among them."""
    if len(frames) <= most:
        return frames
    return [frames[place] for place in np.linspace(0, len(frames) - 1, most).round().astype(int)]


def _frames_in(folder: str, root: Path | FrameFolder | None) -> list[Image]:
    """List the images in a folder by name, numbers by their value."""
    names = sorted(filter(_has_frame_suffix, _names_in(folder, root)), key=_by_number)
    if not names:
        raise RowError("missing_image", f"no frames in the folder {folder}; they must end in {', '.join(FRAME_FILES)}")
    return [{"bytes": None, "path": f"{folder.rstrip('/')}/{name}"} for name in names]


def _names_in(folder: str, root: Path | FrameFolder | None) -> list[str]:
    if root is None:
        raise RowError("unsafe_path", f"{folder}: folders of frames require data.image_root")
    try:
        if not isinstance(root, Path):
            check_remote(folder)
            return root.names(folder, MOST_FILES)
        names: list[str] = []
        for path in inside(folder, root).iterdir():
            names.append(path.name)
            if len(names) > MOST_FILES:
                raise TooLarge(f"more than {MOST_FILES} files")
        return names
    except (FileNotFoundError, NotADirectoryError):
        raise RowError("missing_image", f"no such folder of frames: {folder}") from None
    except (OSError, RuntimeError, ValueError) as error:  # circular links, NUL, lone surrogates
        raise RowError("unreadable_image", f"{folder}: {type(error).__name__}: {error}") from None


def _by_number(name: str) -> list[tuple[int, int | str]]:
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in re.split(r"([0-9]+)", name) if part]


def _has_frame_suffix(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in FRAME_FILES


def _path_of(value: Any) -> str:
    if isinstance(value, Mapping):
        value = value.get("path") or value.get("url")
    path = value if isinstance(value, str) else ""
    return path.partition("?")[0] if "://" in path else path


def _is_frame(value: Any) -> bool:
    """Whether a value can only be an image."""
    path = _path_of(value)
    is_data = path[:5].lower() == "data:" or (isinstance(value, Mapping) and not path)
    return isinstance(value, bytes) or is_data or _has_frame_suffix(path)


def _refuse_file(value: Any) -> None:
    path = PurePosixPath(_path_of(value))
    if path.suffix.lower() in VIDEO_FILES:
        raise RowError(
            "unsupported_media",
            f"{path} is a video file; extract frames (mkdir {path.stem}; ffmpeg -i {path.name} -vf fps=1 "
            f"{path.stem}/%04d.jpg) and give the folder or the list of frames",
        )


def _parts(prompt: list[Message]) -> Iterable[dict[str, Any]]:
    return (part for turn in prompt for part in turn["content"])


def _split_at_marks(content: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Split texts at `<video>` into text and video parts. White space is unchanged."""
    found: list[dict[str, Any]] = []
    for part in content:
        if part["type"] != "text":
            found.append(part)
            continue
        for index, between in enumerate(part["text"].split(MARK)):
            found += [{"type": "video"}] if index else []
            found += [{"type": "text", "text": between}] if between else []
    return found


def _placed_first(prompt: list[Message], count: int) -> list[Message]:
    """Put videos before the first text of the first user message, after images."""
    for index, turn in enumerate(prompt):
        if turn["role"] == "user":
            content = turn["content"]
            first = next((place for place, part in enumerate(content) if part["type"] != "image"), len(content))
            content = [*content[:first], *[{"type": "video"}] * count, *content[first:]]
            return [*prompt[:index], {**turn, "content": content}, *prompt[index + 1 :]]
    raise RowError("malformed_row", "the row has videos, but the prompt has no user message to put them in")
