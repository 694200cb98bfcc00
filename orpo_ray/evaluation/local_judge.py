"""Answers judged by a vision-language model in this process: a folder, or a model of the hub."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch

from orpo_ray.data.images import load_image
from orpo_ray.data.pairs import Message
from orpo_ray.errors import RowError, UserError
from orpo_ray.evaluation.generation import Answerer
from orpo_ray.evaluation.judge import MODEL_OPTION, Choice, question, verdict_of
from orpo_ray.evaluation.targets import find_base
from orpo_ray.model.loading import load_config
from orpo_ray.storage.run_folder import RunFolder

VERDICT_TOKENS = 64


class LocalJudge:
    """A `Judge` that loads its model when it is asked first: the models that it judges are gone by then.

    Args:
        name: folder of a run, a model or adapters, or a model of the hub.
        field: the option or recipe field that gives the name, for messages.
    """

    def __init__(self, name: str, field: str = MODEL_OPTION) -> None:
        self.name, self.field = name, field
        self._folder = RunFolder(name.rstrip("/"))  # a mirror of a remote run is deleted with it

    def check(self) -> None:
        """Check that the model is there. Raises UserError."""
        try:
            load_config(self._target.model)
        except UserError as error:
            raise UserError(
                f"the judge cannot be loaded: {error.problem}",
                field=self.field,
                value=self.name,
                fix="give the folder of a run or a model, or a model of the hub that this machine can reach",
            ) from None

    def better(self, prompt: str, images: tuple[bytes, ...], first: str, second: str) -> Choice:
        """Ask which answer is better. Raises RowError if the model cannot take the question."""
        content: list[dict[str, Any]] = [{"type": "image"} for _ in images]
        message: Message = {
            "role": "user",
            "content": [*content, {"type": "text", "text": question(prompt, first, second)}],
        }
        answerer = self._answerer
        try:
            shown = [load_image({"bytes": image, "path": None}, None) for image in images]
            text = answerer.encoder.render([message], add_generation_prompt=True)
            return verdict_of(answerer.answer(text, shown))
        except RowError as error:
            raise RowError("refused_by_judge", str(error)) from None

    @cached_property
    def _target(self) -> Any:
        return find_base(self.name, self._folder)

    @cached_property
    def _answerer(self) -> Answerer:
        target, device = self._target, torch.device("cuda" if torch.cuda.is_available() else "cpu")
        encoder = target.encoder(target.recipe).build()
        return Answerer(target.load(device, target.recipe.optim.seed).eval(), encoder, VERDICT_TOKENS)
