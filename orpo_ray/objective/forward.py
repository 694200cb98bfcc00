"""PairBatch + model -> log-probs, in either layout: one packed row of pairs, or two padded rows a pair.

Legend: B pairs, T tokens a row, D hidden size, M target tokens, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from orpo_ray.data.packing import IMAGE, RESPONSE, Layout, PairBatch
from orpo_ray.errors import OrpoRayError
from orpo_ray.model.derived_family import family_of
from orpo_ray.model.loading import layout_of, without_adapters
from orpo_ray.model.shared_prefix import PrefixLayout
from orpo_ray.model.vision_cache import VisionCache
from orpo_ray.objective.cross_attention import cross_hidden_states, encode_cross_images
from orpo_ray.objective.logps import target_logps
from orpo_ray.objective.orpo import PairLogps, sum_by_pair
from orpo_ray.processing.pixel_norm import PixelNorm

# For PairModel's `pixels_at_once`: enough to keep the device busy, by its type.
PIXELS_AT_ONCE = {"cpu": 2**19, "cuda": 2**22}


class ImageNotUsed(OrpoRayError):
    """A step had images and the loss did not depend on them."""


class PairModel(nn.Module):
    """A vision-language model that takes a `PairBatch` and returns `PairLogps`; this is what the engine trains.

    layout: which batches it takes, as the model's attention was loaded. vision_cache: where features of a frozen vision
    part are kept. pixels_at_once: the vision part takes so many
    at a time, by default all. With gradient checkpointing that bounds what backward computes anew at once. Not for
    ZeRO-3: every call is a collective, and workers have unlike numbers of images.
    The wrapped model is called through its parts: the vision part once per pair, the language model on the row or
    rows, the output head only where there is a target token.
    """

    def __init__(
        self,
        model: nn.Module,
        pixel_norm: PixelNorm,
        pixels_at_once: int | None = None,
        vision_cache: Path | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.family = family_of(without_adapters(model).config)
        self.layout: Layout = layout_of(model)
        self.pixel_norm = pixel_norm
        self.pixels_at_once = pixels_at_once
        self.vision_cache: VisionCache | None = None
        if vision_cache is not None:
            self.vision_cache = VisionCache(vision_cache, without_adapters(model), self.family)
        self.watch_images = False
        self._image_gradient: torch.Tensor | None = None

    def forward(self, batch: PairBatch) -> PairLogps:
        """Sums of log-probs per pair, dummy pairs included."""
        base = without_adapters(self.model)
        hidden = self._hidden(base, batch)
        selected = hidden.flatten(0, 1).index_select(0, batch.target_position)  # [M, D]
        logps = target_logps(self._logits, selected, batch.target_ids, batch.head_chunks)
        return sum_by_pair(logps, batch.target_answer, batch.target_in_response, batch.num_pairs)

    def check_images_used(self) -> None:
        """After a backward with `watch_images`: raises ImageNotUsed if no gradient came back to the image features."""
        gradient, self._image_gradient, self.watch_images = self._image_gradient, None, False
        if gradient is None or not bool(gradient.abs().max() > 0):
            raise ImageNotUsed(
                "the step was given images, but its loss does not depend on them: no gradient reached the image "
                "features; the model's image placeholders do not take them"
            )

    def _hidden(self, base: Any, batch: PairBatch) -> torch.Tensor:
        """What the output head is given, [1, T, D] or [2B, T, D]."""
        if self.family.cross_attention:
            features = self._encode_crossed(base, batch) if batch.images else None
            return cross_hidden_states(base, batch, features)
        encoded: dict[str, Any] = {}
        if batch.images:
            encoded["mm_encoder_outputs"] = {"image": self._encode_images(base, batch)}
        inputs = self._packed_inputs(base, batch) if batch.spans else self._concatenated_inputs(batch)
        if self.family.is_derived:
            # What its head does besides is not known, so the logits are its own, at all positions.
            return base(input_ids=batch.input_ids, use_cache=False, **encoded, **inputs).logits
        hidden: torch.Tensor = base.model(
            input_ids=batch.input_ids, use_cache=False, **encoded, **inputs
        ).last_hidden_state
        return hidden

    def _packed_inputs(self, base: Any, batch: PairBatch) -> dict[str, Any]:
        """What makes one row of many pairs what it is: the layout for attention, and positions."""
        return {
            "shared_prefix": PrefixLayout.of(batch, self.family.bidirectional),
            "position_ids": self._positions(base, batch),
        }

    def _positions(self, base: Any, batch: PairBatch) -> torch.Tensor:
        """The positions that the model itself would give each sequence: [1, T], or [3, 1, T] with several axes."""
        if not self.family.multi_axis_positions:
            return batch.position_ids + self.family.first_position
        # One call for the whole row. Text goes on by 1 on all axes, so that each part is right but for its offset.
        positions, _ = base.model.get_rope_index(
            batch.input_ids,
            mm_token_type_ids=(batch.token_kind == IMAGE).int(),
            image_grid_thw=batch.images.get("image_grid_thw"),
        )
        parts = []
        for span in batch.spans:
            prompt, rejected = positions[..., span.start : span.rejected], positions[..., span.rejected : span.end]
            own = prompt - prompt[0, 0, 0]
            if span.is_single:
                parts.append(own)
                continue
            after_prompt = own[..., span.chosen - span.start].unsqueeze(-1)
            parts += [own, rejected - positions[..., span.rejected].unsqueeze(-1) + after_prompt]
        return torch.cat(parts, dim=-1)

    def _concatenated_inputs(self, batch: PairBatch) -> dict[str, Any]:
        """What the model's own forward asks for besides the tokens of [2B, T]; positions and mask it makes itself."""
        if self.family.token_types is None:
            return {}
        if self.family.multi_axis_positions:
            grid = batch.images.get("image_grid_thw")
            kinds = {self.family.token_types: (batch.token_kind == IMAGE).int()}
            if grid is not None and batch.images_shared:
                grid = grid.repeat(2, 1)
            return kinds | ({"image_grid_thw": grid} if grid is not None else {})
        assert self.family.bidirectional is not None
        if self.family.bidirectional.what == "prompt":
            return {self.family.token_types: (batch.token_kind >= RESPONSE).long()}
        return {self.family.token_types: (batch.token_kind == IMAGE).long()}

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """The output head, [m, D] -> [m, V]."""
        if self.family.is_derived:
            return hidden.clone()
        base = without_adapters(self.model)
        logits: torch.Tensor = base.get_output_embeddings()(hidden)
        softcap = base.config.get_text_config().final_logit_softcapping if self.family.softcaps_logits else None
        return logits if softcap is None else softcap * torch.tanh(logits / softcap)

    def _encode_images(self, base: Any, batch: PairBatch) -> Any:
        """Vision part and connector, once per image; in the concatenated layout both rows are given the features."""
        inputs = self._vision_inputs(base, batch)
        if self.vision_cache is not None:
            raw = {name: batch.images[name] for name in inputs}
            features = self.vision_cache.features(raw, inputs, lambda some: self._of_each(base, some))
            output, is_list = BaseModelOutputWithPooling(), features[0].ndim == 2
        else:
            outputs = [self._vision(base, part) for part in self._parts(inputs)]
            # A tensor with a row per image, or a list with an entry per image.
            output, is_list = outputs[0], isinstance(outputs[0].pooler_output, list | tuple)
            features = [f for o in outputs for f in (o.pooler_output if is_list else [o.pooler_output])]
        together = torch.cat(features)
        if self.watch_images:
            together = self._watched(together)
        # All chosen rows, then all rejected ones.
        copies = (together, together) if not batch.spans and batch.images_shared else (together,)
        output.pooler_output = copies if is_list else torch.cat(copies)
        if inner := getattr(output, "deepstack_features", None):
            output.deepstack_features = [(*layer,) * len(copies) for layer in inner]
        return output

    def _of_each(self, base: Any, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        """The features of each image, or of each tile where the vision part gives them so, for the cache."""
        count = len(inputs.get("image_grid_thw", inputs.get("image_sizes", inputs["pixel_values"])))
        found = []
        for part in self._parts(inputs):
            features = self._vision(base, part).pooler_output
            found += list(features) if isinstance(features, list | tuple) else list(features.split(1))
        # Idefics2 has all images of a row in one.
        return found if len(found) == count else list(torch.cat(found).chunk(count))

    def _encode_crossed(self, base: Any, batch: PairBatch) -> torch.Tensor:
        features = encode_cross_images(base, self._vision_inputs(base, batch))
        return self._watched(features) if self.watch_images else features

    def _vision_inputs(self, base: Any, batch: PairBatch) -> dict[str, torch.Tensor]:
        """What the vision part takes, pixels as the processor would have made them."""
        inputs = {name: batch.images[name] for name in self.family.image_inputs if name in batch.images}
        pixels = normalise_pixels(inputs["pixel_values"], self.pixel_norm).to(base.dtype)
        # Processors pad after normalising, so padding is 0 there and not -mean / std.
        if (mask := inputs.get("pixel_attention_mask")) is not None:
            pixels = pixels * mask.unsqueeze(1)
        if (mask := inputs.get("aspect_ratio_mask")) is not None:
            pixels = pixels * mask[..., None, None, None]
        return inputs | {"pixel_values": pixels}

    def _parts(self, inputs: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        """The vision input in parts of at most `pixels_at_once`, but whole tiles."""
        pixels = inputs["pixel_values"]
        if self.pixels_at_once is None or pixels.ndim != 4 or any(len(v) != len(pixels) for v in inputs.values()):
            return [inputs]
        tiles = max(1, self.pixels_at_once // (pixels.shape[-2] * pixels.shape[-1]))
        split = {name: value.split(tiles) for name, value in inputs.items()}
        return [{name: parts[i] for name, parts in split.items()} for i in range(len(split["pixel_values"]))]

    def _vision(self, base: Any, inputs: dict[str, torch.Tensor]) -> Any:
        if self.family.nested_images:
            inputs = {name: value.unsqueeze(0) for name, value in inputs.items()}
        return base.get_image_features(**inputs, return_dict=True)

    def _watched(self, features: torch.Tensor) -> torch.Tensor:
        if not features.requires_grad:  # vision part and connector are frozen
            features = features.detach().requires_grad_(True)
        features.register_hook(self._keep_gradient)
        return features

    def _keep_gradient(self, gradient: torch.Tensor) -> None:
        self._image_gradient = gradient.detach()


def normalise_pixels(pixels: torch.Tensor, norm: PixelNorm) -> torch.Tensor:
    """uint8 [..., 3, H, W], or [patches, 3 * pixels] -> float32, what the processor itself would have made of it."""
    mean = torch.tensor(norm.mean, device=pixels.device).view(-1, 1)
    std = torch.tensor(norm.std, device=pixels.device).view(-1, 1)
    by_channel = pixels.flatten(-2).flatten(0, -3) if pixels.ndim > 2 else pixels.reshape(len(pixels), 3, -1)
    return ((by_channel.float() * norm.rescale - mean) / std).view_as(pixels)
