"""Draw several answers to one prompt in one batch, each with a seed and a temperature of its own.

Legend: n draws, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import LogitsProcessor


@dataclass(frozen=True)
class Draw:
    """How one answer is drawn."""

    temperature: float
    """0 takes the most likely tokens."""
    seed: int


@dataclass(frozen=True)
class Drawn:
    """An answer that was drawn."""

    text: str
    finished: bool
    """Whether the model ended the answer itself."""


class OneTokenEach(LogitsProcessor):
    """Leaves one token of each row, drawn from the row's distribution with the row's own generator.

    The largest of `logits / temperature + Gumbel noise` is a draw from the softmax. So what a row draws depends on its
    own seed alone, and not on the other rows of the batch.
    """

    def __init__(self, draws: Sequence[Draw], device: torch.device) -> None:
        self._draws = draws
        self._generators = [torch.Generator(device).manual_seed(draw.seed) for draw in draws]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return scores [n, V] of which all but one are minus infinity in each row."""
        chosen = []
        for row, draw, generator in zip(scores.float(), self._draws, self._generators, strict=True):
            if draw.temperature:
                noise = -torch.empty_like(row).exponential_(generator=generator).log()
                row = row / draw.temperature + noise
            chosen.append(row.argmax())
        only = torch.stack(chosen).unsqueeze(1)
        return torch.full_like(scores, -torch.inf).scatter_(1, only, 0.0)
