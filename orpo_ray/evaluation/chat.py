"""`orpo-ray chat`: talk with a model about images, in a terminal or with lines from a pipe."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import torch
from PIL import Image
from rich.console import Console

from orpo_ray.data.images import load_image
from orpo_ray.data.pairs import Message
from orpo_ray.errors import RowError, UserError
from orpo_ray.evaluation.generation import Answerer
from orpo_ray.evaluation.targets import find_target
from orpo_ray.storage.run_folder import RunFolder

HELP = "Type a message. /image FILE adds an image to the next one, /new starts again, /quit or Ctrl-D ends."


class Conversation:
    """The turns so far, and the images for the next message."""

    def __init__(self, answerer: Answerer, seed: int | None) -> None:
        """Begin.

        Args:
            answerer: the model.
            seed: of sampled answers; None for the most likely tokens.
        """
        self.answerer, self.seed = answerer, seed
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self._messages: list[Message] = []
        self._images: list[Image.Image] = []
        self._next: list[Image.Image] = []

    def add_image(self, path: str) -> None:
        """Put an image before the next message. Raises RowError."""
        found = Path(path).expanduser()
        self._next.append(load_image({"bytes": None, "path": found.name}, found.parent))

    def ask(self, text: str, write: Callable[[str], object]) -> None:
        """Answer a message.

        Args:
            text: the message.
            write: called with each piece of the answer as it comes.

        Raises:
            RowError: the chat template refuses the messages.
        """
        content: list[dict[str, Any]] = [{"type": "image"} for _ in self._next]
        messages = [*self._messages, {"role": "user", "content": [*content, {"type": "text", "text": text}]}]
        images = [*self._images, *self._next]
        rendered = self.answerer.encoder.render(messages, add_generation_prompt=True)
        streamer = _Streamer(self.answerer.encoder.tokenizer, write)
        answer = self.answerer.answer(rendered, images, self.seed, streamer)
        self._messages = [*messages, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]
        self._images, self._next = images, []


class _Streamer:
    """Passes on the text of an answer as its tokens come, a word at a time."""

    def __init__(self, tokenizer: Any, write: Callable[[str], object]) -> None:
        from transformers import TextStreamer

        class Streamer(TextStreamer):
            def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
                if text:
                    write(text)

        self._streamer = Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)

    def put(self, value: torch.Tensor) -> None:
        """Take tokens."""
        self._streamer.put(value)

    def end(self) -> None:
        """Pass on what is left."""
        self._streamer.end()


def chat(
    uri: str,
    overrides: Sequence[str],
    console: Console,
    images: Sequence[str] = (),
    max_new_tokens: int = 256,
    seed: int | None = None,
    lines: TextIO | None = None,
) -> None:
    """Load a model and answer lines until there are no more.

    Args:
        uri: a run's folder, or the folder of a model or of adapters.
        overrides: `FIELD=VALUE` for the recipe.
        console: gets everything but the answers, which go to stdout.
        images: files for the first message.
        max_new_tokens: most tokens of an answer.
        seed: of sampled answers; None for the most likely tokens.
        lines: where messages come from; by default stdin.

    Raises:
        UserError: the model or an image cannot be used.
    """
    lines = sys.stdin if lines is None else lines
    with contextlib.redirect_stdout(sys.stderr):
        target = find_target(RunFolder(uri.rstrip("/")), overrides)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        encoder = target.encoder(target.recipe).build()
        model = target.load(device, target.recipe.optim.seed).eval()
    talk = Conversation(Answerer(model, encoder, max_new_tokens), seed)
    for image in images:
        try:
            talk.add_image(image)
        except RowError as error:
            raise UserError(error.detail, field="--image", value=image, fix="give an image file") from None
    is_terminal = lines.isatty()
    if is_terminal:
        console.print(HELP, highlight=False)
    for line in _lines(lines, is_terminal):
        try:
            _follow(talk, line)
        except RowError as error:
            console.print(f"{error.reason}: {error.detail}", style="red", markup=False, highlight=False)


def _follow(talk: Conversation, line: str) -> None:
    command, _, rest = line.partition(" ")
    if command == "/image":
        talk.add_image(rest.strip())
    elif command == "/new":
        talk.clear()
    else:
        talk.ask(line, lambda piece: print(piece, end="", flush=True))
        print(flush=True)


def _lines(lines: TextIO, is_terminal: bool) -> Iterator[str]:
    """Yield lines that are not empty, until the end or /quit."""
    while True:
        if is_terminal:
            try:
                line = input("> ")
            except EOFError:
                return
        elif not (line := lines.readline()):
            return
        line = line.strip()
        if line == "/quit":
            return
        if line:
            yield line
