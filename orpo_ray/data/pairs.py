"""`PreferencePair`, and what checks that messages, images and answers form one.

Images are not decoded and texts not tokenized here. Functions raise RowError for values that cannot be used.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from orpo_ray.errors import RowError

Image = dict[str, Any]  # {"bytes": bytes | None, "path": str | None}
Message = dict[str, Any]  # {"role": str, "content": [{"type": "image"} | {"type": "text", "text": str}, ...]}
Video = list[Image] | str  # frames, or the path of a folder of frames

# Characters of all texts of a pair, for any model: a table of some rows of that size is too large for Arrow.
MAX_CHARACTERS = 64 << 20


@dataclass(frozen=True)
class OtherImages:
    """The images under which the chosen answer should be less likely (`orpo.other_image`)."""

    images: list[Image] | None
    """As many as the pair has; None for its own images, changed."""
    image_root: str | None = None
    """Folder that the paths of `images` are relative to."""
    change: str | None = None
    """How the pair's own images are changed: crop, noise or blank."""
    seed: int = 0
    """Of the change."""


@dataclass(frozen=True)
class Ranking:
    """The rated answers of a row, and all pairs of them."""

    answers: list[str]
    """In the order of the row."""
    better: list[int]
    """For each pair, which of the answers is chosen."""
    worse: list[int]
    """For each pair, which of the answers is rejected."""


@dataclass(frozen=True)
class PreferencePair:
    """One image-text preference, independent of the format of its row."""

    id: str
    """Unique and stable, so that the user can find the row."""
    images: list[Image]
    """`{"bytes": ..., "path": ...}` with one of them None, in the order of their placeholders in the prompt."""
    prompt: list[Message]
    """Messages before the answer; content is a list of `{"type": "image"}` and `{"type": "text", "text": ...}`, and of
    `{"type": "video"}` until frames take their place."""
    chosen: str
    """Text of the better answer."""
    rejected: str
    """Text of the worse answer."""
    source: str = field(default="", compare=False)
    """File and line or row."""
    rejected_images: list[Image] | None = None
    """Images of the rejected side if they differ, as many as `images`; the two texts may then be equal."""
    other: OtherImages | None = None
    """Images to contrast the chosen answer with; None without an image preference."""
    videos: list[Video] = field(default_factory=list)
    """Those of the prompt's `{"type": "video"}` parts, in their order, until frames take their place (`videos.py`)."""
    language: str | None = field(default=None, compare=False)
    """As `data.language` names it; None without one."""
    domain: str | None = field(default=None, compare=False)
    """The same by `data.domain`."""
    ranking: Ranking | None = None
    """Further pairs of the row's answers (`data.pairs_from_ranking`); None if the row is one pair."""


def make_pair(
    row_id: str,
    source: str,
    images: list[Image],
    prompt: list[Message],
    chosen: str,
    rejected: str,
    rejected_images: list[Image] | None = None,
) -> PreferencePair:
    """Make a pair and check it.

    Args:
        row_id: id of the row.
        source: file and line or row.
        images: images in the row's own column; if empty, the images inside the prompt's messages are used.
        prompt: messages before the answer.
        chosen: text of the better answer.
        rejected: text of the worse answer.
        rejected_images: images of the rejected side, if they differ.

    Raises:
        RowError: the parts do not form a pair.
    """
    _check_not_empty(chosen, rejected)
    paths = [image["path"] or "" for image in rejected_images or ()]
    videos = [part["video"] for message in prompt for part in message["content"] if "video" in part]
    images, prompt = check_prompt(images, prompt, (chosen, rejected), (row_id, *paths))
    if rejected_images == images:
        rejected_images = None
    if rejected_images is None:
        _check_different(chosen, rejected)
    if rejected_images is not None and len(rejected_images) != len(images):
        raise RowError("image_count_mismatch", f"{len(rejected_images)} rejected image(s) for {len(images)} image(s)")
    return PreferencePair(row_id, images, prompt, chosen, rejected, source, rejected_images, videos=videos)


def check_prompt(
    images: list[Image], prompt: list[Message], answers: Sequence[str], names: Sequence[str]
) -> tuple[list[Image], list[Message]]:
    """Check the images and the prompt of a row, and give the prompt a placeholder for each image.

    Args:
        images: images in the row's own column; if empty, the images inside the prompt's messages are used.
        prompt: messages before the answer.
        answers: the answers of the row, which count for its size.
        names: its id and paths.

    Returns:
        The images, and the prompt with placeholders only.

    Raises:
        RowError: no model can take the row.
    """
    _check_size(prompt, *answers)
    images = images or [part["image"] for message in prompt for part in message["content"] if "image" in part]
    _check_prompt_not_empty(prompt)
    prompt = _place_images(_without_media(prompt), len(images))
    check_encodable(prompt, *answers, *names, *(image["path"] or "" for image in images))
    return images, prompt


def check_answers(chosen: str, rejected: str) -> None:
    """Check that two answers to the same images form a pair. Raises RowError."""
    _check_not_empty(chosen, rejected)
    _check_different(chosen, rejected)


def check_texts(answers: list[str]) -> None:
    """Check that answers can be stored and are not too long. Raises RowError."""
    _check_size([], *answers)
    _check_surrogates(*answers)


def _check_not_empty(chosen: str, rejected: str) -> None:
    if not chosen.strip() or not rejected.strip():
        raise RowError("empty_response", f"{'rejected' if chosen.strip() else 'chosen'} is empty")


def _check_different(chosen: str, rejected: str) -> None:
    if chosen == rejected:
        raise RowError("identical_responses", f"chosen and rejected are equal: {chosen[:80]!r}")


def _check_size(prompt: list[Message], *answers: str) -> None:
    texts = [part["text"] for message in prompt for part in message["content"] if part["type"] == "text"]
    size = sum(map(len, (*texts, *answers)))
    if size > MAX_CHARACTERS:
        raise RowError("too_long", f"the texts have {size} characters; a pair has at most {MAX_CHARACTERS}")


def _without_media(messages: list[Message]) -> list[Message]:
    """Replace parts that contain their image or video by plain placeholders."""
    return [
        {
            **message,
            "content": [part if part["type"] == "text" else {"type": part["type"]} for part in message["content"]],
        }
        for message in messages
    ]


def _place_images(messages: list[Message], count: int) -> list[Message]:
    """Check that the prompt has a placeholder per image; if it has none, add them before the first user text."""
    placed = sum(part["type"] == "image" for message in messages for part in message["content"])
    if placed == count:
        return messages
    if placed:
        raise RowError(
            "image_count_mismatch", f"the prompt has {placed} image placeholder(s), but the row has {count} image(s)"
        )
    for index, message in enumerate(messages):
        if message["role"] == "user":
            content = [{"type": "image"}] * count + message["content"]
            return [*messages[:index], {**message, "content": content}, *messages[index + 1 :]]
    raise RowError("malformed_row", "the row has images, but the prompt has no user message to put them in")


def _check_prompt_not_empty(prompt: list[Message]) -> None:
    """The last message must not be empty; an image without text is enough."""
    last = prompt[-1]
    has_content = any(part["type"] != "text" or part["text"].strip() for part in last["content"])
    if not has_content or last["role"] == "system":
        raise RowError("empty_prompt", "the prompt is empty")


def check_encodable(prompt: list[Message], *texts: str) -> None:
    """Raise RowError for lone surrogates, which JSON can contain, but tokenizers and files cannot encode."""
    _check_surrogates(json.dumps(prompt, ensure_ascii=False), *texts)


def _check_surrogates(*texts: str) -> None:
    try:
        "".join(texts).encode()
    except UnicodeEncodeError as error:
        raise RowError("malformed_row", f"a text contains a lone surrogate: {error}") from None
