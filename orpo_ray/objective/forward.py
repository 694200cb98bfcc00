"""PairBatch + model -> log-probs. The concatenated path, which every family has: two rows a pair, one image pass.

Legend: B pairs, T tokens a row, D hidden size, M target tokens, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from orpo_ray.data.packing import PairBatch
from orpo_ray.errors import OrpoRayError
from orpo_ray.model.families import family_of
from orpo_ray.model.loading import PixelNorm, without_adapters
from orpo_ray.objective.orpo import PairLogps, sum_by_pair


class ImageNotUsed(OrpoRayError):
    """A step had images and the loss did not depend on them."""


class PairModel(nn.Module):
    """A vision-language model that takes a `PairBatch` and returns `PairLogps`; this is what the engine trains.

    The wrapped model is called through its parts: the vision part once per pair, the language model on both rows,
    the output head only where there is a target token.
    """

    def __init__(self, model: nn.Module, pixel_norm: PixelNorm) -> None:
        super().__init__()
        self.model = model
        self.family = family_of(without_adapters(model).config.model_type)
        self.pixel_norm = pixel_norm
        self.watch_images = False
        self._image_gradient: torch.Tensor | None = None

    def forward(self, batch: PairBatch) -> PairLogps:
        """Sums of log-probs per pair, fillers included."""
        base = without_adapters(self.model)
        encoded: dict[str, Any] = {}
        if batch.images:
            encoded["mm_encoder_outputs"] = {"image": self._encode_images(base, batch.images)}
        hidden = base.model(input_ids=batch.input_ids, use_cache=False, **encoded).last_hidden_state  # [2B, T, D]
        selected = hidden.flatten(0, 1)[batch.target_position]  # [M, D]
        logits = base.get_output_embeddings()(selected).float()  # [M, V]
        logps = -F.cross_entropy(logits, batch.target_ids, reduction="none")
        return sum_by_pair(logps, batch.target_row, batch.target_in_response, batch.num_pairs)

    def check_images_used(self) -> None:
        """After a backward with `watch_images`: raises ImageNotUsed if no gradient came back to the image features."""
        gradient, self._image_gradient, self.watch_images = self._image_gradient, None, False
        if gradient is None or not bool(gradient.abs().max() > 0):
            raise ImageNotUsed(
                "the step was given images, but its loss does not depend on them: no gradient reached the image "
                "features; the model's image placeholders do not take them"
            )

    def _encode_images(self, base: Any, images: dict[str, torch.Tensor]) -> Any:
        """Vision part and connector, once per image; the features are then given to both rows."""
        inputs = {name: images[name] for name in self.family.image_inputs if name in images}
        inputs["pixel_values"] = normalise_pixels(inputs["pixel_values"], self.pixel_norm).to(base.dtype)
        if (mask := inputs.get("pixel_attention_mask")) is not None:
            # The processor pads after normalising, so padding is 0 there and not -mean / std.
            inputs["pixel_values"] = inputs["pixel_values"] * mask.unsqueeze(1)
        if self.family.nested_images:
            inputs = {name: value.unsqueeze(0) for name, value in inputs.items()}
        output = base.get_image_features(**inputs, return_dict=True)
        features = output.pooler_output
        if isinstance(features, list | tuple):
            features = torch.cat(list(features))
        features = features.flatten(0, -2)  # [image tokens, D]
        if self.watch_images:
            features = self._watched(features)
        output.pooler_output = (features, features)  # all chosen rows, then all rejected ones
        return output

    def _watched(self, features: torch.Tensor) -> torch.Tensor:
        if not features.requires_grad:  # vision part and connector are frozen
            features = features.detach().requires_grad_(True)
        features.register_hook(self._keep_gradient)
        return features

    def _keep_gradient(self, gradient: torch.Tensor) -> None:
        self._image_gradient = gradient.detach()


def normalise_pixels(pixels: torch.Tensor, norm: PixelNorm) -> torch.Tensor:
    """uint8 [tiles, 3, H, W] -> float32, what the processor itself would have made of it."""
    mean = torch.tensor(norm.mean, device=pixels.device).view(-1, 1, 1)
    std = torch.tensor(norm.std, device=pixels.device).view(-1, 1, 1)
    return (pixels.float() * norm.rescale - mean) / std
