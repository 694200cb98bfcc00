"""Gemma-3 and PaliGemma: some tokens of a prompt see later ones."""

from __future__ import annotations

from typing import Any

import torch

from orpo_ray.data.packing import IMAGE, RESPONSE, PairBatch
from orpo_ray.model.families.base import Family
from orpo_ray.model.families.llava_like import PREFIXES
from orpo_ray.model.prefix_layout import Bidirectional

_IMAGE_INPUTS = ("pixel_values", "image_sizes")


class Gemma3(Family):
    """The tokens of an image see each other, within a sliding window if the layer has one."""

    @property
    def bidirectional(self) -> Bidirectional:
        """Tokens of one image."""
        return Bidirectional("images", within_window=True)

    def concatenated_inputs(self, batch: PairBatch) -> dict[str, Any]:
        """1 at image tokens."""
        return {"token_type_ids": (batch.token_kind == IMAGE).long()}


class PaliGemma(Family):
    """All tokens of a prompt see each other, positions begin at 1, and the head caps its logits."""

    @property
    def bidirectional(self) -> Bidirectional:
        """All tokens of the prompt, whatever the window."""
        return Bidirectional("prompt", within_window=False)

    def packed_positions(self, base: Any, batch: PairBatch) -> torch.Tensor:
        """The first token of a sequence has position 1."""
        return batch.position_ids + 1

    def concatenated_inputs(self, batch: PairBatch) -> dict[str, Any]:
        """1 behind the prompt."""
        return {"token_type_ids": (batch.token_kind >= RESPONSE).long()}

    def logits(self, base: Any, hidden: torch.Tensor) -> torch.Tensor:
        """Apply `final_logit_softcapping`, if the config has one (PaliGemma 2)."""
        logits = super().logits(base, hidden)
        softcap = base.config.get_text_config().final_logit_softcapping
        return logits if softcap is None else softcap * torch.tanh(logits / softcap)


GEMMA3 = Gemma3(**PREFIXES, image_inputs=_IMAGE_INPUTS)
PALIGEMMA = PaliGemma(**PREFIXES, image_inputs=_IMAGE_INPUTS)
