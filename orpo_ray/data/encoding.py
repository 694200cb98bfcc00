"""`PreferencePair` -> `EncodedPair`: apply the chat template, the tokenizer and the image processor.

Which tokens are the response, which are image placeholders and what is truncated is decided here, once.

Legend: P prompt tokens, C chosen tokens, R rejected tokens (image placeholders count as tokens).
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import TemplateError
from PIL import Image

from orpo_ray.data.image_changes import changed
from orpo_ray.data.images import ImageRoot, load_image
from orpo_ray.data.input_bounds import MAX_PIXELS_OF_ANSWER, InputBounds
from orpo_ray.data.pairs import Image as RawImage
from orpo_ray.data.pairs import Message, PreferencePair
from orpo_ray.errors import RowError, UserError
from orpo_ray.processing.processor import load_processor
from orpo_ray.processing.prompts import EncodedPrompt, PromptEncoder
from orpo_ray.storage.files import image_folder

# What processors raise on image sizes that they were not made for.
REFUSALS = (ValueError, TypeError, ArithmeticError, LookupError, RuntimeError)
Root = Path | ImageRoot | None  # what image paths are relative to


@dataclass(frozen=True)
class EncodedPair:
    """A pair as the model takes it."""

    id: str
    """The id of its row."""
    prompt_ids: np.ndarray
    """int32 [P], without padding."""
    chosen_ids: np.ndarray
    """int32 [C]; ends as the chat template ends an answer."""
    rejected_ids: np.ndarray
    """int32 [R]; ends as the chat template ends an answer."""
    prompt_is_text: np.ndarray
    """bool [P]: False at image placeholders, which are never NLL targets."""
    images: dict[str, np.ndarray]
    """The image tensors of the model's processor (`pixel_values` as uint8 [tiles, 3, H, W], ...); empty without images.
    """
    sample_index: int = -1
    """Position in the order of the run (`data/order.py`); -1 for a dummy pair."""
    rejected_prompt: EncodedPrompt | None = None
    """The prompt of the rejected answer, if that answer was given to other images."""
    other_prompt: EncodedPrompt | None = None
    """The prompt with the images that the chosen answer is contrasted with; None without an image preference."""
    truncated: int = 0
    """Tokens cut from the answers."""
    language: str | None = None
    """Of the `PreferencePair`."""
    domain: str | None = None
    """Of the `PreferencePair`."""

    @property
    def prompt(self) -> EncodedPrompt:
        """The prompt of the chosen answer, and of the rejected one unless that has its own."""
        return EncodedPrompt(self.prompt_ids, self.prompt_is_text, self.images)

    @property
    def row_length(self) -> int:
        """Tokens of prompt + chosen or prompt + rejected, whichever is longer."""
        second = self.rejected_prompt.ids if self.rejected_prompt else self.prompt_ids
        return max(len(self.prompt_ids) + len(self.chosen_ids), len(second) + len(self.rejected_ids))


@dataclass(frozen=True)
class EncoderSpec:
    """How to make an encoder. Small and hashable, because it is sent to the processes that encode."""

    model_id: str
    """`model.id` of the recipe."""
    revision: str | None
    """Branch, tag or commit on the hub."""
    max_length: int
    """Most tokens of prompt + answer."""
    truncate: bool = False
    """Whether to cut answers that are too long, instead of refusing the pair."""
    allow_http: bool = False
    """Whether to fetch images that are named by URL."""
    trust_remote_code: bool = False
    """Whether to run Python code that comes with the processor."""
    bound_length: int | None = None
    """Length in tokens that bounds texts and images before they are tokenized and decoded; by default max_length."""

    def build(self) -> PairEncoder:
        """Load the processor, which takes seconds, and make the encoder. Raises UserError."""
        processor = load_processor(self.model_id, self.revision, self.trust_remote_code)
        return PairEncoder(processor, self.max_length, self.truncate, self.allow_http, self.bound_length)


@dataclass(frozen=True)
class _Draft:
    """A pair with its images decoded and its texts rendered, before it has tokens."""

    pair: PreferencePair
    root: Root
    images: list[Image.Image]
    rejected_images: list[Image.Image] | None  # None if the rejected answer was given to the same images
    other_images: list[Image.Image] | None  # None if the chosen answer is not contrasted with others
    prompt: str
    chosen: str
    rejected: str

    @property
    def image_lists(self) -> dict[str, list[Image.Image]]:
        """The images of each prompt to encode."""
        lists = {"own": self.images, "rejected": self.rejected_images, "other": self.other_images}
        return {side: images for side, images in lists.items() if images is not None}

    def has_images_of(self, pair: PreferencePair, root: Root) -> bool:
        """Whether a pair has the same images, as objects of a row that both are from."""
        own = self.pair
        same = pair.images is own.images and pair.rejected_images is own.rejected_images and pair.other == own.other
        return same and root == self.root


def _key(prompt: str, images: list[Image.Image]) -> Hashable:
    """Identify a prompt and its images. Prompts with one key are encoded once."""
    return prompt, *map(id, images)


class PairEncoder:
    """Encodes pairs with a model's own processor."""

    def __init__(
        self,
        processor: Any,
        max_length: int,
        truncate: bool = False,
        allow_http: bool = False,
        bound_length: int | None = None,
    ) -> None:
        """Make an encoder; for the arguments see `EncoderSpec`. Raises UserError without a chat template."""
        self.processor, self.max_length, self.truncate, self.allow_http = processor, max_length, truncate, allow_http
        self.tokenizer = processor.tokenizer
        self.prompts = PromptEncoder(processor)
        self.bounds = InputBounds.of(self.tokenizer, bound_length or max_length)
        if getattr(processor, "chat_template", None) is None:
            raise UserError(
                "the processor has no chat template", field="model.id", fix="use an instruction-tuned model"
            )

    def encode_many(self, pairs: Sequence[PreferencePair], roots: Sequence[Root]) -> list[EncodedPair | RowError]:
        """Encode pairs.

        Args:
            pairs: the pairs.
            roots: for each pair, the folder that its image paths are relative to.

        Returns:
            An EncodedPair for each pair, or a RowError for one that cannot be trained on.
        """
        drafts: list[_Draft | RowError] = []
        groups: dict[tuple[tuple[int, int], ...], dict[Hashable, tuple[str, list[Image.Image]]]] = defaultdict(dict)
        before: _Draft | None = None
        for pair, root in zip(pairs, roots, strict=True):
            try:
                before = self._draft(pair, root, before)
            except RowError as bad:
                drafts.append(bad)
                continue
            drafts.append(before)
            for images in before.image_lists.values():
                sizes = tuple(image.size for image in images)
                groups[sizes][_key(before.prompt, images)] = before.prompt, images
        prompts: dict[Hashable, EncodedPrompt | RowError] = {}
        for rendered in groups.values():
            # The processor gives images of one size one shape, so its batch can be split by prompt again.
            prompts |= dict(zip(rendered, self._encode_prompts(list(rendered.values())), strict=True))
        return [
            draft
            if isinstance(draft, RowError)
            else self._finish(
                draft, {side: prompts[_key(draft.prompt, images)] for side, images in draft.image_lists.items()}
            )
            for draft in drafts
        ]

    def dummy_pair(self, with_image: bool) -> EncodedPair:
        """A pair of weight 0, for a worker that must run a forward but has no pair."""
        images = [Image.new("RGB", (64, 64), "gray")] if with_image else []
        content = [{"type": "image"}] * len(images) + [{"type": "text", "text": "?"}]
        pair = PreferencePair("dummy_pair", [], [{"role": "user", "content": content}], "a", "b")
        draft = _Draft(pair, None, images, None, None, *self._texts(pair))
        encoded = self._finish(draft, {"own": self.prompts.encode([(draft.prompt, images)])[0]})
        if isinstance(encoded, RowError):
            raise UserError(
                f"cannot encode even the shortest possible pair: {encoded}",
                field="data.max_length",
                fix="increase data.max_length",
            )
        return encoded

    @cached_property
    def closing_tokens(self) -> int:
        """Number of tokens that the chat template adds to an answer, such as the end of its turn."""
        pair = PreferencePair("closing", [], [{"role": "user", "content": [{"type": "text", "text": "?"}]}], "a", "b")
        whole, alone = self.prompts.tokenize([self._texts(pair)[1], pair.chosen])
        return len(whole) - len(alone)

    def prompt_of(self, pair: PreferencePair, root: Root) -> tuple[str, list[Image.Image]]:
        """Render the prompt of a pair and load its images, for a model that answers it. Raises RowError."""
        self.bounds.check(pair)
        self._refuse_placeholders(pair)
        return self.render(pair.prompt, add_generation_prompt=True), self._load(pair.images, root)

    def inputs_of(self, text: str, images: list[Image.Image]) -> dict[str, Any]:
        """Return what the model's own `forward` takes for a rendered prompt. Raises RowError."""
        try:
            return self.prompts.model_inputs(text, images)
        except REFUSALS as error:
            raise RowError("refused_by_processor", f"{type(error).__name__}: {error}"[:300]) from None

    def _draft(self, pair: PreferencePair, root: Root, before: _Draft | None) -> _Draft:
        """Load images and render texts. Pairs of one row follow each other, and their images are loaded once."""
        self.bounds.check(pair)
        self._refuse_placeholders(pair)
        if before is not None and before.has_images_of(pair, root):
            return _Draft(pair, root, before.images, before.rejected_images, before.other_images, *self._texts(pair))
        images = self._load(pair.images, root)
        rejected_images = None if pair.rejected_images is None else self._load(pair.rejected_images, root)
        return _Draft(pair, root, images, rejected_images, self._other_images(pair, images), *self._texts(pair))

    def _other_images(self, pair: PreferencePair, own: list[Image.Image]) -> list[Image.Image] | None:
        """Load the images to contrast the chosen answer with. Without them, the pair is still a pair."""
        other = pair.other
        if other is None:
            return None
        if other.images is None:
            return [changed(image, other.change or "blank", other.seed, place) for place, image in enumerate(own)]
        try:
            return self._load(other.images, image_folder(other.image_root))
        except RowError:  # it is reported as a bad row where it is a pair's own
            return None

    def _load(self, images: list[RawImage], root: Root) -> list[Image.Image]:
        loaded: list[Image.Image] = []
        pixels = 0
        for image in images:
            loaded.append(load_image(image, root, self.allow_http))
            pixels += loaded[-1].width * loaded[-1].height
            if pixels > MAX_PIXELS_OF_ANSWER:
                found = f"the first {len(loaded)} of {len(images)} images have {pixels} pixels"
                raise RowError("image_too_large", f"{found}; at most {MAX_PIXELS_OF_ANSWER} can be decoded together")
        return loaded

    def _texts(self, pair: PreferencePair) -> tuple[str, str, str]:
        """The prompt as the chat template renders it, and what the template adds to it for each answer."""
        prompt = self.render(pair.prompt, add_generation_prompt=True)
        return prompt, self._answer(pair, prompt, pair.chosen), self._answer(pair, prompt, pair.rejected)

    def _answer(self, pair: PreferencePair, prompt: str, answer: str) -> str:
        turn: Message = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
        full = self.render([*pair.prompt, turn], add_generation_prompt=False)
        if full.startswith(prompt):
            return full[len(prompt) :]
        # This template renders a finished turn differently from an open one.
        return answer + (self.tokenizer.eos_token or "")

    def _encode_prompts(self, rendered: list[tuple[str, list[Image.Image]]]) -> Sequence[EncodedPrompt | RowError]:
        """Encode prompts together. If the processor refuses, encode each alone; refused ones become a RowError."""
        try:
            return self.prompts.encode(rendered)
        except REFUSALS as error:
            if len(rendered) > 1:
                return [found for one in rendered for found in self._encode_prompts([one])]
            sizes = ", ".join(f"{image.width} x {image.height}" for image in rendered[0][1])
            problem = f"the processor refuses images of {sizes}: {type(error).__name__}: {error}"
            return [RowError("refused_by_processor", problem[:300])]

    def _finish(self, draft: _Draft, prompts: Mapping[str, EncodedPrompt | RowError]) -> EncodedPair | RowError:
        """Make a pair of a draft and its encoded prompts, named as in `_Draft.image_lists`."""
        prompt, rejected_prompt, other = prompts["own"], prompts.get("rejected"), prompts.get("other")
        if isinstance(prompt, RowError):
            return prompt
        if isinstance(rejected_prompt, RowError):
            return rejected_prompt
        # Tokenized separately from the prompt, so no answer changes the prompt's tokens.
        chosen_ids, rejected_ids = self.prompts.tokenize([draft.chosen, draft.rejected])
        if not len(prompt.ids):
            return RowError(
                "empty_prompt", "the prompt has no tokens, so nothing predicts the first token of an answer"
            )
        if not len(chosen_ids) or not len(rejected_ids):
            return RowError("empty_response", f"{'rejected' if len(chosen_ids) else 'chosen'} has no tokens")
        encoded = EncodedPair(
            draft.pair.id,
            prompt.ids,
            chosen_ids,
            rejected_ids,
            prompt.is_text,
            prompt.images,
            rejected_prompt=rejected_prompt,
            language=draft.pair.language,
            domain=draft.pair.domain,
        )
        fitted = encoded if encoded.row_length <= self.max_length else self._too_long(encoded)
        if isinstance(fitted, RowError) or not isinstance(other, EncodedPrompt):
            return fitted
        fits = len(other.ids) + len(fitted.chosen_ids) <= self.max_length
        return replace(fitted, other_prompt=other) if fits else fitted

    def _too_long(self, pair: EncodedPair) -> EncodedPair | RowError:
        """Cut the answers, if the recipe says so and the prompt leaves space. Prompts are never cut."""
        prompt, second = pair.prompt, pair.rejected_prompt or pair.prompt
        limit = self.max_length - max(len(prompt.ids), len(second.ids))
        if self.truncate and limit > 0:
            chosen, rejected = pair.chosen_ids[:limit], pair.rejected_ids[:limit]
            if pair.rejected_prompt is None and np.array_equal(chosen, rejected):
                return RowError(
                    "identical_responses", f"the answers are the same up to data.max_length ({self.max_length})"
                )
            cut = len(pair.chosen_ids) + len(pair.rejected_ids) - len(chosen) - len(rejected)
            return replace(pair, chosen_ids=chosen, rejected_ids=rejected, truncated=cut)
        return RowError(
            "too_long",
            f"prompt of {len(prompt.ids)} tokens ({int((~prompt.is_text).sum())} for images), answers of "
            f"{len(pair.chosen_ids)} and {len(pair.rejected_ids)}; data.max_length is {self.max_length}",
        )

    def render(self, messages: list[Message], add_generation_prompt: bool) -> str:
        """Write messages as the chat template does. Raises RowError if the template refuses them."""
        try:
            return self.processor.apply_chat_template(
                messages, add_generation_prompt=add_generation_prompt, tokenize=False
            )
        except TemplateError as error:  # templates refuse orders of roles that they do not know
            raise RowError("refused_by_chat_template", str(error)) from None

    def _refuse_placeholders(self, pair: PreferencePair) -> None:
        """Refuse image tokens in plain text: the model would take them for images."""
        ids = self.prompts.image_token_ids
        tokens = {self.prompts.image_token, *self.tokenizer.convert_ids_to_tokens(ids)}
        texts = [part["text"] for message in pair.prompt for part in message["content"] if part["type"] == "text"]
        for text in (*texts, pair.chosen, pair.rejected):
            if found := sorted(token for token in tokens if token in text):
                raise RowError("placeholder_in_text", f"the text contains {found[0]!r}: {json.dumps(text[:80])}")
