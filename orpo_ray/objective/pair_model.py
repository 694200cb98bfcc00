"""PairBatch + model -> log-probs, in either layout: one packed row of pairs, or two padded rows per pair.

Legend: B pairs, T tokens of a row, D hidden size, M target tokens, V vocabulary.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from orpo_ray.data.balance import Layout
from orpo_ray.data.collate_images import PIXELS, Collate
from orpo_ray.data.packing import PairBatch
from orpo_ray.errors import OrpoRayError
from orpo_ray.model.families.base import ImageFeatures, ImageTensors
from orpo_ray.model.families.registry import family_of
from orpo_ray.model.hooked_call import call_with
from orpo_ray.model.loading import layout_of, vocabulary_size, without_adapters
from orpo_ray.model.sequence_group import SequenceGroup
from orpo_ray.model.vision_cache import KEYS, VisionCache
from orpo_ray.model.whole_shape import whole_shape
from orpo_ray.objective.logps import PairLogps, count_chunks, sum_by_pair, target_logps
from orpo_ray.processing.pixel_norm import PixelNorm

# Values for PairModel's `pixels_at_once` that keep the device busy, by its type.
PIXELS_AT_ONCE = {"cpu": 2**19, "cuda": 2**22}


class ImageNotUsed(OrpoRayError):
    """A step had images, but its loss did not depend on them."""


class PairModel(nn.Module):
    """A vision-language model that takes a `PairBatch` and returns `PairLogps`; this is what the engine trains.

    The wrapped model is called module by module: the vision encoder once per pair, the language model on the row or
    rows, the output head only where there is a target token. What differs by family is asked of `family`.
    """

    layout: Layout
    """Layout of the batches, which depends on the attention that the model was loaded with."""
    group: SequenceGroup | None = None
    """The workers that compute each batch together with this one; None if there are none."""
    keeps_tokens: bool = False
    """Whether `forward` keeps the log-prob of each target token, for a report."""
    token_logps: torch.Tensor | None = None
    """[M], of the latest batch, if they are kept."""
    head_device: str | None = None
    """Type of the device whose chunks the output head takes, if not the one that it runs on."""

    def __init__(
        self,
        model: nn.Module,
        pixel_norm: PixelNorm,
        pixels_at_once: int | None = None,
        vision_cache: Path | None = None,
    ) -> None:
        """Wrap a model.

        Args:
            model: transformers' model, or peft's wrapper around one.
            pixel_norm: how its processor normalizes pixels.
            pixels_at_once: most pixels that the vision encoder takes in one call; None means all. With gradient
                checkpointing this bounds what the backward pass recomputes at once. Not for ZeRO-3: every call is a
                collective there, and workers have different numbers of images.
            vision_cache: folder to keep the features of a frozen vision encoder in.

        Raises:
            UserError: the family is unknown, or its features cannot be cached.
        """
        super().__init__()
        base = without_adapters(model)
        self.model = model
        self.family = family_of(base.config)
        self.layout = layout_of(model)
        self.pixel_norm = pixel_norm
        self.pixels_at_once = pixels_at_once
        self.vision_cache = None if vision_cache is None else VisionCache(vision_cache, base, self.family)
        self.watch_images = False
        self._image_gradient: torch.Tensor | None = None

    def forward(self, batch: PairBatch) -> PairLogps:
        """Sums of log-probs per pair, dummy pairs included."""
        return self.logps(batch, self.encode_images(batch))

    def encode_images(self, batch: PairBatch) -> ImageFeatures | None:
        """Run vision encoder and connector once per image, or read their features from the cache; None for no image."""
        return self._encode_images(without_adapters(self.model), batch) if batch.images else None

    def logps(self, batch: PairBatch, images: ImageFeatures | None) -> PairLogps:
        """Sums of log-probs per pair, given what `encode_images` made of the batch's images.

        In a group, each worker computes the terms at its own positions. Every worker gets the same loss from the sums.
        Its gradient is that of its own terms. The sum over workers, which an engine takes, is the gradient of the loss.
        """
        base, group = without_adapters(self.model), self.group
        assert batch.workers == (1 if group is None else group.size), "these are not this worker's targets"
        if group is None:
            hidden = self.family.hidden_states(base, batch, images)
        else:
            hidden = self.family.own_hidden_states(base, batch, images, group)
        selected = hidden.flatten(0, 1).index_select(0, batch.target_position)  # [M, D]
        logps = self._logps(base, selected, batch.target_ids)
        if self.keeps_tokens:
            self.token_logps = logps.detach()
        sums = sum_by_pair(logps, batch.target_sum, batch.target_in_response, batch.pairs)
        return sums if group is None else sums.changed(group.sum)

    def _logps(self, base: Any, hidden: torch.Tensor, target_ids: torch.Tensor) -> torch.Tensor:
        """Log-probs [M] of target tokens, from the hidden state before each [M, D]."""
        device_type = self.head_device or hidden.device.type
        chunks = count_chunks(len(target_ids), vocabulary_size(base), device_type)

        def all_chunks(hidden: torch.Tensor) -> torch.Tensor:
            return target_logps(partial(self.family.logits, base), hidden, target_ids, chunks)

        head = self.family.output_head(base)
        return all_chunks(hidden) if head is None else call_with(head, all_chunks, hidden)

    @property
    def tokens_per_image_value(self) -> float:
        """The vision encoder's work for a value of an image tensor, in tokens of the language model with that work.

        An estimate by which a step's pairs are distributed over the workers: weights in matrices times what they are
        applied to, three times where there is a backward pass.
        """
        if self.vision_cache is not None:
            return 0.0
        base = without_adapters(self.model)
        embeddings = base.get_input_embeddings().weight
        vision, language = (
            [
                parameter
                for name, parameter in base.named_parameters()
                if name.startswith(self.family.prefixes(component))
                and len(whole_shape(parameter)) > 1
                and parameter is not embeddings
            ]
            for component in ("vision", "language")
        )
        # The convolution over pixels; class tokens and positions have up to three dimensions.
        patches = next((whole_shape(weight) for weight in vision if len(whole_shape(weight)) > 3), None)
        if patches is None or not language:
            return 0.0
        passes = 3 if any(parameter.requires_grad for parameter in vision) else 1
        return passes / 3 * (_size(vision) / patches[1:].numel()) / _size(language)

    @property
    def collate(self) -> Collate:
        """How the image tensors of a batch for this model are joined."""
        collate = self.family.collate
        return collate if self.vision_cache is None else self.vision_cache.with_keys(collate)

    def check_images_used(self) -> None:
        """Check, after a backward pass with `watch_images`, that a gradient reached the image features.

        Raises:
            ImageNotUsed: none did.
        """
        self.watch_images = False
        assert self._image_gradient is not None, "there was no forward pass with watch_images"
        largest = self._image_gradient.abs().max().float()  # of one type on all workers
        self._image_gradient = torch.zeros_like(largest)
        if self.group is not None:
            largest = self.group.largest(largest)  # a worker may have no image token
        if bool(largest == 0):  # a gradient that is not finite is the matter of the divergence guard
            raise ImageNotUsed(
                "the loss of this step does not depend on its images: no gradient reached the image features\n"
                "  fix: check the chat template (orpo-ray data check shows image tokens per pair), or use a listed "
                "family"
            )

    def _encode_images(self, base: Any, batch: PairBatch) -> ImageFeatures:
        inputs = self.family.vision_inputs(batch.images, self.pixel_norm, base.dtype)
        if self.vision_cache is not None:
            inputs = {name: inputs[name] for name in self.family.image_inputs if name in inputs}
            raw = inputs | {PIXELS: batch.images[PIXELS]}
            each = self.vision_cache.features(
                raw, inputs, lambda missing: self._features_of_each(base, missing), batch.images.get(KEYS)
            )
            features = ImageFeatures.of_each(each)
        else:
            features = ImageFeatures.of([self.family.encode_images(base, chunk) for chunk in self._chunks(inputs)])
        if not self.watch_images:
            return features
        # What there is until a gradient comes. On the device of the batch, since workers compare it.
        self._image_gradient = torch.zeros((), device=batch.input_ids.device)
        return features.watched(self._keep_gradient)

    def _features_of_each(self, base: Any, inputs: ImageTensors) -> list[torch.Tensor]:
        """The features of each image, or of each tile where tiles are encoded independently."""
        count = len(self.family.rows_per_image(base.config, inputs))
        found: list[torch.Tensor] = []
        for chunk in self._chunks(inputs):
            features = self.family.encode_images(base, chunk).pooler_output
            found += list(features) if isinstance(features, list | tuple) else list(features.split(1))
        # Idefics2 returns all images of a row in one tensor.
        return found if len(found) == count else list(torch.cat(found).chunk(count))

    def _chunks(self, inputs: ImageTensors) -> list[ImageTensors]:
        """Cut the vision input into chunks of at most `pixels_at_once`, but of whole tiles."""
        pixels = inputs[PIXELS]
        if self.pixels_at_once is None or pixels.ndim != 4 or any(len(v) != len(pixels) for v in inputs.values()):
            return [inputs]
        tiles = max(1, self.pixels_at_once // (pixels.shape[-2] * pixels.shape[-1]))
        split = {name: value.split(tiles) for name, value in inputs.items()}
        return [{name: chunks[i] for name, chunks in split.items()} for i in range(len(split[PIXELS]))]

    def _keep_gradient(self, gradient: torch.Tensor) -> None:
        self._image_gradient = gradient.detach()


def _size(parameters: list[nn.Parameter]) -> int:
    """Count the elements of weights. A 4-bit weight holds several of them in one of its own."""
    states = [getattr(parameter, "quant_state", None) for parameter in parameters]
    return sum(
        whole_shape(parameter).numel() if state is None else state.shape.numel()
        for parameter, state in zip(parameters, states, strict=True)
    )
