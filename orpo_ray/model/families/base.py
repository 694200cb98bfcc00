"""Differences between families of vision-language models, as methods with defaults that suit most families.

Add a family: write an entry in `registry.py` with the prefixes of its parameter names. If it behaves differently from
`Family`, subclass it and override the methods in question. What transformers states itself (image token, output head,
processor) is read from transformers.

Legend: B pairs, T tokens of a row, n images or tiles of a batch, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from orpo_ray.data.collate_images import PIXELS, ImageArrays, TokenRows, concatenate_images
from orpo_ray.data.packing import PairBatch
from orpo_ray.data.sharing import Shares
from orpo_ray.errors import OrpoRayError
from orpo_ray.model.prefix_layout import Bidirectional, PrefixLayout
from orpo_ray.model.sequence_group import SequenceGroup
from orpo_ray.processing.pixel_norm import PixelNorm, normalize_pixels

# Layers that attend from token to token and to nothing else: the ones that can share a prefix.
_ATTENTION_LAYERS = {"full_attention", "sliding_attention"}
# Language models that the tests show equal on both paths. Others may add to attention scores what the shared-prefix
# path does not know (sinks, ALiBi), or may not call the registered attention at all.
TESTED_LANGUAGE_MODELS = {
    "llama", "mistral", "ministral3", "qwen2", "qwen3", "phi3", "gemma", "gemma2", "gemma3_text", "qwen2_5_vl_text",
    "qwen3_vl_text", "smollm3",
}  # fmt: skip

# In `PairBatch.images`: int64 [image tokens], where features take their place in the flattened rows.
IMAGE_POSITIONS = "image_positions"
Prefixes = tuple[str, ...]
ImageTensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class ImageFeatures:
    """What vision encoder and connector made of a batch's images, each encoded once."""

    features: torch.Tensor
    """Of all images, one after another: [n, tokens, D] or [tokens of all images, D]."""
    output: Any
    """transformers' output that held the features. The model's forward takes it back."""
    is_list: bool
    """Whether the model's forward takes a list of features, rather than one tensor."""

    @classmethod
    def of(cls, outputs: Sequence[Any]) -> ImageFeatures:
        """Join the outputs of one or several calls of `Family.encode_images`."""
        output = outputs[0]
        is_list = isinstance(output.pooler_output, list | tuple)
        features = [each for o in outputs for each in (o.pooler_output if is_list else [o.pooler_output])]
        return cls(_concatenated(features), output, is_list)

    @classmethod
    def of_each(cls, features: Sequence[torch.Tensor]) -> ImageFeatures:
        """Join the features of single images, as the vision cache keeps them."""
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        return cls(_concatenated(features), BaseModelOutputWithPooling(), is_list=features[0].ndim == 2)

    def watched(self, hook: Callable[[torch.Tensor], None]) -> ImageFeatures:
        """The same features, with `hook` called on their gradient."""
        features = self.features
        if not features.requires_grad:  # vision encoder and connector are frozen
            features = features.detach().requires_grad_(True)
        features.register_hook(hook)
        return replace(self, features=features)

    def repeated(self, copies: int) -> ImageFeatures:
        """The features of several copies of a packed row, for families that know where they go (`image_token`)."""
        return replace(self, features=torch.cat([self.features] * copies))

    def as_output(self, copies: int) -> Any:
        """transformers' output with the features repeated: once for a packed row, twice for rows of both answers."""
        output, repeated = self.output, (self.features,) * copies
        output.pooler_output = repeated if self.is_list else _concatenated(repeated)
        if deepstack := getattr(output, "deepstack_features", None):
            output.deepstack_features = [(*layer,) * copies for layer in deepstack]
        return output


@dataclass(frozen=True)
class Family:
    """A family whose images become tokens of the row, behind a plainly causal mask (LLaVA and its like).

    Instances are small and picklable.
    """

    vision: Prefixes
    """Prefixes of the vision encoder's parameter names, below the `...ForConditionalGeneration` model."""
    connector: Prefixes
    """Prefixes of the connector's parameter names; it may lie inside the vision encoder."""
    language: Prefixes
    """Prefixes of the language model's parameter names."""
    image_inputs: tuple[str, ...] = (PIXELS,)
    """Which of the processor's tensors the vision encoder takes."""
    image_token: int | None = None
    """Id of the tokens whose embeddings are replaced by image features; None until the family is fitted to a config, or
    if the model itself has to replace them."""

    @property
    def bidirectional(self) -> Bidirectional | None:
        """Which tokens of a prompt also see later tokens; None if none do."""
        return None

    @property
    def shares(self) -> Shares:
        """What pairs of a packed row can share. Where all tokens of a prompt see each other, only whole prompts."""
        bidirectional = self.bidirectional
        return "prompts" if bidirectional is not None and bidirectional.scope == "prompt" else "images"

    def fitted(self, config: Any) -> Family:
        """This family with what its other methods must know of a model's config."""
        token = getattr(config, "image_token_id", None)
        return replace(self, image_token=getattr(config, "image_token_index", None) if token is None else token)

    def prefixes(self, component: str) -> Prefixes:
        """Parameter prefixes of `vision`, `connector` or `language`, as `str.startswith` takes them."""
        return {"vision": self.vision, "connector": self.connector, "language": self.language}[component]

    def why_not_shared_prefix(self, config: Any) -> str | None:
        """Why a model with this transformers config must take the concatenated path; None if it need not."""
        text = config.get_text_config()
        if others := set(getattr(text, "layer_types", None) or ()) - _ATTENTION_LAYERS:
            return f"the language model has layers of type {', '.join(sorted(others))}"
        if text.model_type not in TESTED_LANGUAGE_MODELS:
            return f"shared prefixes are not tested for the language model {text.model_type}"
        if getattr(text, "use_bidirectional_attention", False) and self.bidirectional is None:
            return "the language model is bidirectional"
        return None

    def can_cache_images(self, config: Any) -> bool:
        """Whether the features of an image are one tensor that depends on that image alone."""
        return True

    # ---- Images

    def collate(self, inputs: Sequence[ImageArrays], rows: TokenRows) -> dict[str, np.ndarray]:
        """Join the image tensors of several prompts; see `orpo_ray.data.collate_images.Collate`."""
        return concatenate_images(inputs) | self.image_positions(rows)

    def image_positions(self, rows: TokenRows) -> dict[str, np.ndarray]:
        """Where image features go. Found here, because a search on the device would make every step wait for it."""
        return {} if self.image_token is None else {IMAGE_POSITIONS: np.flatnonzero(rows.ids == self.image_token)}

    def vision_inputs(self, images: Mapping[str, torch.Tensor], norm: PixelNorm, dtype: torch.dtype) -> ImageTensors:
        """What the vision encoder takes, with pixels rescaled and normalized as by the processor.

        Args:
            images: the batch's image tensors, as `collate` made them; pixels are uint8.
            norm: the processor's numbers.
            dtype: of the pixels that the vision encoder takes.
        """
        inputs = {name: images[name] for name in self.image_inputs if name in images}
        return inputs | {PIXELS: normalize_pixels(inputs[PIXELS], norm).to(dtype)}

    def encode_images(self, base: Any, inputs: ImageTensors) -> Any:
        """Run vision encoder and connector.

        Args:
            base: the transformers model.
            inputs: of some or all images, as `vision_inputs` made them.

        Returns:
            transformers' output, with the features as `pooler_output`: [n, tokens, D], or a list with a tensor per
            image.
        """
        return base.get_image_features(**inputs, return_dict=True)

    def rows_per_image(self, config: Any, inputs: Mapping[str, torch.Tensor]) -> list[int]:
        """How many rows of pixels each image has; tiles that are encoded independently count as images."""
        return [1] * len(inputs[PIXELS])

    # ---- Language model

    def hidden_states(self, base: Any, batch: PairBatch, images: ImageFeatures | None) -> torch.Tensor:
        """Run the language model: what `logits` takes at every position, [1, T, D] or [2B, T, D].

        Args:
            base: the transformers model.
            batch: in either layout.
            images: None if no pair has an image.
        """
        hidden: torch.Tensor = base.model(**self._forward_inputs(base, batch, images)).last_hidden_state
        return hidden

    def repeated_images(self, images: Mapping[str, torch.Tensor], copies: int, tokens: int) -> ImageTensors:
        """What the language model needs of a batch's image tensors, for a row of several copies of its packed row.

        Args:
            images: the batch's image tensors.
            copies: how many.
            tokens: T of one copy.
        """
        if IMAGE_POSITIONS not in images:
            return {}
        positions = images[IMAGE_POSITIONS]
        copy = torch.arange(copies, device=positions.device).unsqueeze(1)
        return {IMAGE_POSITIONS: (positions + copy * tokens).flatten()}

    def own_hidden_states(
        self, base: Any, batch: PairBatch, images: ImageFeatures | None, group: SequenceGroup
    ) -> torch.Tensor:
        """Run the language model on this worker's tokens of a packed row: [1, t, D], see `SequenceGroup`."""
        inputs = self._forward_inputs(base, batch, images)
        tokens = "inputs_embeds" if "inputs_embeds" in inputs else "input_ids"
        inputs |= {
            tokens: group.own(inputs[tokens], 1),
            "position_ids": group.own(inputs["position_ids"], -1),
            "attention_mask": group.own(inputs["attention_mask"], -1),
            "shared_prefix": PrefixLayout.of(batch, self.bidirectional, group),
        }
        hidden: torch.Tensor = base.model(**inputs).last_hidden_state
        return hidden

    def why_not_divided(self, config: Any) -> str | None:
        """Why the row of a model with this transformers config cannot be divided among workers; None if it can."""
        if why := self.why_not_shared_prefix(config):
            return f"it cannot share a prefix: {why}"
        if self.image_token is None:
            return "the model itself puts image features into the row"
        return None

    def why_not_beside_others(self, config: Any) -> str | None:
        """Why the row of a model with this transformers config cannot run in several copies, one for each adapter."""
        if why := self.why_not_divided(config):
            return why
        return None if self.can_cache_images(config) else "the first language layers take image features too"

    def packed_positions(self, base: Any, batch: PairBatch) -> torch.Tensor:
        """Positions in a packed row as the model itself would number each sequence: [1, T], or [axes, 1, T]."""
        return batch.position_ids

    def concatenated_inputs(self, batch: PairBatch) -> dict[str, Any]:
        """What the model's forward takes besides tokens and images in the concatenated layout.

        Positions and mask are made by the model itself.
        """
        return {}

    def output_head(self, base: Any) -> torch.nn.Module | None:
        """The module that `logits` runs; None if `hidden_states` has already run it."""
        head: torch.nn.Module = base.get_output_embeddings()
        return head

    def logits(self, base: Any, hidden: torch.Tensor) -> torch.Tensor:
        """Run the output head on some positions: [m, D] -> [m, V], a new tensor.

        Without the head's hooks: `PairModel` runs them once around the calls for all positions.
        """
        logits: torch.Tensor = base.get_output_embeddings().forward(hidden)
        return logits

    def _forward_inputs(self, base: Any, batch: PairBatch, images: ImageFeatures | None) -> dict[str, Any]:
        """All arguments of the model's forward."""
        inputs: dict[str, Any] = {"use_cache": False}
        copies = 1 if batch.branches or not batch.images_shared else 2
        if images is not None and IMAGE_POSITIONS in batch.images:
            inputs["inputs_embeds"] = _embeddings(base, batch, images.features, copies)
        else:
            inputs["input_ids"] = batch.input_ids
            if images is not None:
                inputs["mm_encoder_outputs"] = {"image": images.as_output(copies)}
        if batch.branches:
            inputs["shared_prefix"] = PrefixLayout.of(batch, self.bidirectional)
            inputs["position_ids"] = self.packed_positions(base, batch)
            # Attention ignores the mask. One of four dimensions keeps transformers from making its own, for which it
            # would read the positions back from the device.
            inputs["attention_mask"] = batch.token_kind[None, None]
            return inputs
        return inputs | self.concatenated_inputs(batch)


def _concatenated(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Concatenate; a single tensor is not copied."""
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))


def _embeddings(base: Any, batch: PairBatch, features: torch.Tensor, copies: int) -> torch.Tensor:
    """Embeddings of all tokens, with image features in place of image tokens: [rows, T, D].

    The models do this too, but look for the image tokens on the device, read their number back twice, and again in the
    backward pass.

    Raises:
        OrpoRayError: there are more or fewer features than image tokens.
    """
    positions = batch.images[IMAGE_POSITIONS]
    features = features.flatten(0, -2)
    if len(features) * copies != len(positions):
        raise OrpoRayError(
            f"image features and image tokens do not match: {len(features) * copies} and {len(positions)}"
        )
    # The image token may lie outside the vocabulary, so it is not looked up.
    ids = batch.input_ids.flatten().index_fill(0, positions, 0)
    embeddings: torch.Tensor = base.get_input_embeddings()(ids.view_as(batch.input_ids))
    features = _concatenated((features.to(embeddings.dtype),) * copies)
    return embeddings.flatten(0, 1).index_copy(0, positions, features).view_as(embeddings)
