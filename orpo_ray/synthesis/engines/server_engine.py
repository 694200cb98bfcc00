"""Answers by a model behind an OpenAI-compatible address: vLLM, SGLang or a hosted service."""

from __future__ import annotations

import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from PIL import Image

from orpo_ray.config.synthesis import SynthesizeConfig
from orpo_ray.data.images import load_image
from orpo_ray.data.pairs import Image as RawImage
from orpo_ray.data.prompt_rows import PromptRow
from orpo_ray.errors import RowError, UserError
from orpo_ray.evaluation.chat_server import ChatServer, image_part
from orpo_ray.evaluation.draws import Draw, Drawn

# What every server decodes; images in other formats are sent as PNG.
_SENT_AS_THEY_ARE = {"JPEG": "image/jpeg", "PNG": "image/png"}


class ServerEngine:
    """An `Engine` over a server. Each answer is one request."""

    def __init__(self, config: SynthesizeConfig) -> None:
        self._server = ChatServer(config.server.url or "", config.server.model, "synthesize.server.url")
        self._max_tokens, self._concurrency = config.max_new_tokens, config.server.concurrency

    def check(self) -> None:
        """Check the address, and that a key would not travel in the clear. Raises UserError."""
        self._server.check()

    def prepare(self, part: int) -> None:
        """Do nothing: rows are asked one by one."""

    def answers(self, rows: Sequence[PromptRow], draws: Sequence[Sequence[Draw]]) -> list[list[Drawn] | RowError]:
        """Ask for answers, several at a time. Raises UserError if the server does not answer."""
        messages: list[list[dict[str, Any]] | RowError] = [_messages_or_error(row) for row in rows]
        found: list[list[Drawn] | RowError] = []
        with ThreadPoolExecutor(self._concurrency) as pool:
            asked = [
                each if isinstance(each, RowError) else [pool.submit(self._ask, each, draw) for draw in own]
                for each, own in zip(messages, draws, strict=True)
            ]
            try:
                for futures in asked:
                    found.append(futures if isinstance(futures, RowError) else [each.result() for each in futures])
            except UserError:
                pool.shutdown(cancel_futures=True)  # a server that does not answer is not asked for the rest
                raise
        return found

    def _ask(self, messages: list[dict[str, Any]], draw: Draw) -> Drawn:
        reply = self._server.reply(messages, self._max_tokens, draw.temperature, seed=draw.seed)
        return Drawn(reply.text.strip(), reply.finished)


def _messages_or_error(row: PromptRow) -> list[dict[str, Any]] | RowError:
    try:
        return chat_messages(row)
    except RowError as error:
        return error


def chat_messages(row: PromptRow) -> list[dict[str, Any]]:
    """Return the prompt of a row as the protocol has it, with images inside. Raises RowError for an unusable image."""
    images = iter(row.images)
    return [
        {
            "role": message["role"],
            "content": [
                _sent_image(next(images)) if part["type"] == "image" else {"type": "text", "text": part["text"]}
                for part in message["content"]
            ],
        }
        for message in row.prompt
    ]


def _sent_image(image: RawImage) -> dict[str, Any]:
    picture = load_image(image, None)  # also refuses what no model should get
    with Image.open(io.BytesIO(image["bytes"])) as opened:
        kind = _SENT_AS_THEY_ARE.get(opened.format or "")
    if kind is not None:
        return image_part(image["bytes"], kind)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return image_part(buffer.getvalue(), "image/png")
