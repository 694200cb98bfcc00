"""Answers by a model behind an OpenAI-compatible address: vLLM, SGLang or a hosted service."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from orpo_ray.config.synthesis import SynthesizeConfig
from orpo_ray.data.prompt_rows import PromptRow
from orpo_ray.errors import RowError, UserError
from orpo_ray.evaluation.chat_server import ChatServer, image_part, sent_image
from orpo_ray.evaluation.draws import Draw, Drawn
from orpo_ray.synthesis.refusals import check_some_are_taken

URL = "synthesize.server.url"


class ServerEngine:
    """An `Engine` over a server. Each answer is one request."""

    def __init__(self, config: SynthesizeConfig) -> None:
        self._server = ChatServer(config.server.url or "", config.server.model, URL)
        self._max_tokens, self._concurrency = config.max_new_tokens, config.server.concurrency

    def check(self) -> None:
        """Check the address, and that a key would not travel in the clear. Raises UserError."""
        self._server.check()

    def prepare(self, part: int) -> None:
        """Do nothing: rows are asked one by one."""

    def answers(self, rows: Sequence[PromptRow], draws: Sequence[Sequence[Draw]]) -> list[list[Drawn] | RowError]:
        """Ask for answers, several at a time. A row of which the server refuses a request has a RowError.

        Raises:
            UserError: the server does not answer, or it refuses all of these rows.
        """
        messages: list[list[dict[str, Any]] | RowError] = [_messages_or_error(row) for row in rows]
        found: list[list[Drawn] | RowError] = []
        with ThreadPoolExecutor(self._concurrency) as pool:
            asked = [
                each if isinstance(each, RowError) else [pool.submit(self._ask, each, draw) for draw in own]
                for each, own in zip(messages, draws, strict=True)
            ]
            try:
                for futures in asked:
                    found.append(futures if isinstance(futures, RowError) else _results_of(futures))
            except UserError:
                pool.shutdown(cancel_futures=True)  # a server that does not answer is not asked for the rest
                raise
        tried = [each for each, own, sent in zip(found, draws, messages, strict=True)
                 if own and not isinstance(sent, RowError)]  # fmt: skip
        fix = "correct synthesize.server.model, temperatures or max_new_tokens, or the rows, as the reason says"
        check_some_are_taken(tried, "server", URL, self._server.url, fix)
        return found

    def _ask(self, messages: list[dict[str, Any]], draw: Draw) -> Drawn:
        reply = self._server.reply(messages, self._max_tokens, draw.temperature, seed=draw.seed)
        return Drawn(reply.text.strip(), reply.finished)


def _results_of(futures: Sequence[Future[Drawn]]) -> list[Drawn] | RowError:
    """Wait for the answers to a row; the RowError of the first refused request instead of some answers."""
    try:
        return [each.result() for each in futures]
    except RowError as error:
        for each in futures:
            each.cancel()
        return error


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
                image_part(sent_image(next(images)))
                if part["type"] == "image"
                else {"type": "text", "text": part["text"]}
                for part in message["content"]
            ],
        }
        for message in row.prompt
    ]
