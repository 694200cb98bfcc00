"""The model of this process that answers prompts and scores answers. Processor and weights are loaded when used first.

It is the recipe's `synthesize.model`, or without one the recipe's own model before training.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch

from orpo_ray.config.recipe import Recipe
from orpo_ray.data.encoding import PairEncoder
from orpo_ray.data.pairs import PreferencePair
from orpo_ray.data.prompt_rows import PromptRow
from orpo_ray.errors import RowError, UserError
from orpo_ray.evaluation.answer_scores import AnswerLogps, iter_answer_logps
from orpo_ray.evaluation.generation import Answerer, check_room
from orpo_ray.evaluation.targets import Target, find_base
from orpo_ray.model.loading import load_config
from orpo_ray.objective.base import load_objective
from orpo_ray.objective.pair_model import PairModel
from orpo_ray.objective.step_planner import StepPlanner
from orpo_ray.processing.pixel_norm import PixelNorm
from orpo_ray.storage.run_folder import RunFolder
from orpo_ray.synthesis.candidates import as_pair

FIELD = "synthesize.model"


class LocalModel:
    """A model of this process.

    Args:
        recipe: names the model, and says how pairs are encoded.
    """

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        name = recipe.synthesize.model
        self._folder = None if name is None else RunFolder(name.rstrip("/"))  # a mirror of a remote run is kept with it

    def check(self) -> None:
        """Check that the model is there and has a processor. Raises UserError."""
        try:
            load_config(self.target.model)
        except UserError as error:
            if self._folder is None:
                raise
            raise UserError(
                f"the model cannot be loaded: {error.problem}",
                field=FIELD,
                value=self._recipe.synthesize.model,
                fix="give the folder of a finished run or of a model, or a model of the hub",
            ) from None
        _ = self.encoder

    @cached_property
    def target(self) -> Target:
        """Where the model is. Raises UserError."""
        recipe, name = self._recipe, self._recipe.synthesize.model
        if self._folder is None or name is None:
            return Target(recipe.model.id, recipe, recipe.model)
        return find_base(name, self._folder)

    @cached_property
    def encoder(self) -> PairEncoder:
        """Encodes pairs for the model."""
        return self.target.encoder(self._recipe).build()

    @cached_property
    def answerer(self) -> Answerer:
        """Draws answers of the model."""
        return Answerer(self._model.model, self.encoder, self._recipe.synthesize.max_new_tokens)

    def prompt_of(self, row: PromptRow) -> str:
        """Render the prompt of a row with the bytes of its images. Raises RowError if the model cannot take it."""
        text, images = self.encoder.prompt_of(as_pair(row, "", ""), None)
        check_room(self.encoder, self.encoder.inputs_of(text, images))
        return text

    def tokens_of(self, prompt: str) -> list[int]:
        """Return the tokens of a rendered prompt, in which one placeholder stands for each image."""
        (tokens,) = self.encoder.prompts.tokenize([prompt])
        return [int(token) for token in tokens]

    def logps(self, pairs: Sequence[PreferencePair]) -> list[AnswerLogps | RowError]:
        """Return the log-probs of both answers of pairs with the bytes of their images."""
        roots = [None] * len(pairs)
        return list(iter_answer_logps(pairs, roots, self._model, self.encoder, self._planner))

    @cached_property
    def _device(self) -> torch.device:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @cached_property
    def _model(self) -> PairModel:
        loaded = self.target.load(self._device, self._recipe.optim.seed)
        return PairModel(loaded, PixelNorm.of(self.encoder.processor)).eval()

    @cached_property
    def _planner(self) -> StepPlanner:
        budget = self._recipe.optim.tokens_per_microbatch
        return StepPlanner.of(load_objective(self._recipe), budget, self.encoder, self._model, self._device)
