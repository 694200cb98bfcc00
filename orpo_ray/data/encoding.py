"""`PreferencePair` -> `EncodedPair`: chat template, image tokens, pixels. Decided here once, carried downstream.

Legend: P prompt tokens, C chosen tokens, R rejected tokens (image placeholders count as tokens).
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from jinja2 import TemplateError
from PIL import Image

from orpo_ray.data.formats import Message, PreferencePair
from orpo_ray.data.images import load_image
from orpo_ray.errors import BadRow, UserError

_TEXT_OUTPUTS = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "labels")


@dataclass(frozen=True)
class EncodedPair:
    """A pair as the model will see it.

    prompt_ids [P], chosen_ids [C], rejected_ids [R]: int32, no padding; the answers end as the chat template ends them.
    prompt_is_text [P]: bool, False at image placeholders, which are never NLL targets.
    images: what the model's vision input takes (`pixel_values` as uint8 [tiles, 3, H, W], ...); empty without images.
    slot: its place in the order of the run (`data/order.py`); -1 for a filler.
    """

    id: str
    prompt_ids: np.ndarray
    chosen_ids: np.ndarray
    rejected_ids: np.ndarray
    prompt_is_text: np.ndarray
    images: dict[str, np.ndarray]
    slot: int = -1

    @property
    def row_length(self) -> int:
        """Tokens of the longer of prompt + chosen and prompt + rejected."""
        return len(self.prompt_ids) + max(len(self.chosen_ids), len(self.rejected_ids))

    def to_bytes(self) -> bytes:
        """For the object store: a plain safetensors buffer, nothing that executes when read."""
        tensors = {
            "id": np.frombuffer(self.id.encode(), np.uint8),
            "prompt_ids": self.prompt_ids,
            "chosen_ids": self.chosen_ids,
            "rejected_ids": self.rejected_ids,
            "prompt_is_text": self.prompt_is_text,
        }
        return safetensors.numpy.save(tensors | {f"images.{name}": value for name, value in self.images.items()})

    @classmethod
    def from_bytes(cls, data: bytes, slot: int) -> EncodedPair:
        """The inverse of `to_bytes`; the slot travels beside it."""
        tensors = safetensors.numpy.load(data)
        images = {name.removeprefix("images."): tensors.pop(name) for name in list(tensors) if name[:7] == "images."}
        return cls(id=tensors.pop("id").tobytes().decode(), images=images, slot=slot, **tensors)


@dataclass(frozen=True)
class EncoderSpec:
    """What an encoder is, small and hashable: it travels to the processes that encode, which keep one each.

    load_processor(model_id, revision) -> processor: handed in, since loading stands on a higher floor.
    """

    load_processor: Callable[[str, str | None], Any]
    model_id: str
    revision: str | None
    max_length: int

    def build(self) -> PairEncoder:
        """Load the processor (seconds) and make the encoder."""
        return PairEncoder(self.load_processor(self.model_id, self.revision), self.max_length)


@dataclass(frozen=True)
class _Draft:
    """A pair with its images decoded and its texts rendered, before tokens."""

    pair: PreferencePair
    images: list[Image.Image]
    prompt: str
    chosen: str
    rejected: str


class PairEncoder:
    """Encodes pairs with a model's own processor."""

    def __init__(self, processor: Any, max_length: int) -> None:
        self.processor, self.max_length = processor, max_length
        self.tokenizer = processor.tokenizer
        self.image_token: str = processor.image_token
        # Not always that token's own id: Gemma-3 writes one token where an image goes, and expands it into others.
        self.image_token_ids = [int(token) for token in processor.image_token_ids]
        if getattr(processor, "chat_template", None) is None:
            raise UserError(
                "the processor has no chat template", field="model.id", fix="use an instruction-tuned model"
            )

    def encode_many(self, pairs: Sequence[PreferencePair], roots: Sequence[Path | None]) -> list[EncodedPair | BadRow]:
        """Encode pairs, each with the folder of its image paths; one that can't be trained on comes out as BadRow."""
        results: list[EncodedPair | BadRow | None] = [None] * len(pairs)
        groups: dict[tuple[tuple[int, int], ...], list[tuple[int, _Draft]]] = defaultdict(list)
        for index, (pair, root) in enumerate(zip(pairs, roots, strict=True)):
            try:
                draft = self._draft(pair, root)
            except BadRow as bad:
                results[index] = bad
                continue
            groups[tuple(image.size for image in draft.images)].append((index, draft))
        for group in groups.values():
            # Images of one size come out of the processor in one shape, so a batch can be taken apart again.
            drafts = [draft for _, draft in group]
            for (index, draft), (ids, tensors) in zip(group, self._prompts(drafts), strict=True):
                results[index] = self._finish(draft, ids, tensors)
        return [result for result in results if result is not None]

    def filler(self, with_image: bool) -> EncodedPair:
        """A pair that stands in with weight 0 where a worker must run a forward and has nothing of its own."""
        images = [Image.new("RGB", (64, 64), "gray")] if with_image else []
        content = [{"type": "image"}] * len(images) + [{"type": "text", "text": "?"}]
        pair = PreferencePair("filler", [], [{"role": "user", "content": content}], "a", "b")
        draft = _Draft(pair, images, *self._texts(pair))
        encoded = self._finish(draft, *self._prompts([draft])[0])
        if isinstance(encoded, BadRow):
            raise UserError(f"even the shortest pair is a bad row: {encoded}", field="data.max_length")
        return encoded

    def _draft(self, pair: PreferencePair, root: Path | None) -> _Draft:
        self._refuse_placeholders(pair)
        return _Draft(pair, [load_image(image, root) for image in pair.images], *self._texts(pair))

    def _texts(self, pair: PreferencePair) -> tuple[str, str, str]:
        """The prompt as the chat template writes it, and what it writes after it for either answer."""
        prompt = self._render(pair.prompt, add_generation_prompt=True)
        return prompt, self._answer(pair, prompt, pair.chosen), self._answer(pair, prompt, pair.rejected)

    def _answer(self, pair: PreferencePair, prompt: str, answer: str) -> str:
        turn: Message = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
        full = self._render([*pair.prompt, turn], add_generation_prompt=False)
        if full.startswith(prompt):
            return full[len(prompt) :]
        # A template that renders a finished turn otherwise than an open one.
        return answer + (self.tokenizer.eos_token or "")

    def _prompts(self, drafts: list[_Draft]) -> list[tuple[np.ndarray, dict[str, np.ndarray]]]:
        """Of each: token ids [P] with expanded image tokens, and the vision input with pixels still in 0..255.

        The images of all drafts have the same number and sizes.
        """
        texts = [draft.prompt for draft in drafts]
        if not drafts[0].images:
            return [(ids, {}) for ids in self._tokenize(texts)]
        # Rescaling and normalising wait for the device: uint8 is a quarter of float32 on the way there.
        out = self.processor(
            text=texts,
            images=[draft.images for draft in drafts],
            add_special_tokens=False,
            do_rescale=False,
            do_normalize=False,
        )
        tensors = {name: np.asarray(value) for name, value in out.items() if name not in _TEXT_OUTPUTS}
        parts = [_part(tensors, place, len(drafts)) for place in range(len(drafts))]
        return [(np.asarray(ids, np.int32), part) for ids, part in zip(out["input_ids"], parts, strict=True)]

    def _finish(self, draft: _Draft, prompt_ids: np.ndarray, tensors: dict[str, np.ndarray]) -> EncodedPair | BadRow:
        # Tokenised apart from the prompt, so that no answer changes the prompt's tokens.
        chosen_ids, rejected_ids = self._tokenize([draft.chosen, draft.rejected])
        if not len(prompt_ids):
            return BadRow("empty_prompt", "the prompt has no tokens: nothing predicts the answers' first ones")
        if not len(chosen_ids) or not len(rejected_ids):
            return BadRow("empty_response", f"{'rejected' if len(chosen_ids) else 'chosen'} has no tokens")
        is_text = ~np.isin(prompt_ids, self.image_token_ids)
        encoded = EncodedPair(draft.pair.id, prompt_ids, chosen_ids, rejected_ids, is_text, tensors)
        if encoded.row_length > self.max_length:
            return BadRow(
                "too_long",
                f"prompt of {len(prompt_ids)} tokens ({int((~is_text).sum())} for images), answers of "
                f"{len(chosen_ids)} and {len(rejected_ids)}; data.max_length is {self.max_length}",
            )
        return encoded

    def _tokenize(self, texts: list[str]) -> list[np.ndarray]:
        return [np.asarray(ids, np.int32) for ids in self.tokenizer(texts, add_special_tokens=False)["input_ids"]]

    def _render(self, messages: list[Message], add_generation_prompt: bool) -> str:
        try:
            return self.processor.apply_chat_template(
                messages, add_generation_prompt=add_generation_prompt, tokenize=False
            )
        except TemplateError as error:  # templates refuse role orders that they do not know
            raise BadRow("refused_by_chat_template", str(error)) from None

    def _refuse_placeholders(self, pair: PreferencePair) -> None:
        """An image token in plain text would be taken for an image."""
        tokens = {self.image_token, *self.tokenizer.convert_ids_to_tokens(self.image_token_ids)}
        texts = [part["text"] for message in pair.prompt for part in message["content"] if part["type"] == "text"]
        for text in (*texts, pair.chosen, pair.rejected):
            if found := sorted(token for token in tokens if token in text):
                raise BadRow("placeholder_in_text", f"the text holds {found[0]!r}: {json.dumps(text[:80])}")


def _part(tensors: dict[str, np.ndarray], place: int, count: int) -> dict[str, np.ndarray]:
    """The tensors of one draft out of a batch of `count`, without the batch's own dimension."""
    part = {}
    for name, value in tensors.items():
        if tensors["pixel_values"].ndim == 5:  # [count, tiles, 3, H, W]
            part[name] = value[place]
        else:  # [count * tiles, 3, H, W]
            tiles = len(value) // count
            part[name] = value[place * tiles : (place + 1) * tiles]
    part["pixel_values"] = np.ascontiguousarray(part["pixel_values"].astype(np.uint8))
    mask = part.get("pixel_attention_mask")
    if mask is not None and mask.all():
        del part["pixel_attention_mask"]
    return part
