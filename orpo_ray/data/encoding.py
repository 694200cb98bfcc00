"""`PreferencePair` -> `EncodedPair`: chat template, image tokens, pixels. Decided here once, carried downstream.

Legend: P prompt tokens, C chosen tokens, R rejected tokens (image placeholders count as tokens).
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from jinja2 import TemplateError
from PIL import Image

from orpo_ray.data.images import ImageRoot, load_image
from orpo_ray.data.pairs import Message, PreferencePair
from orpo_ray.errors import RowError, UserError
from orpo_ray.processing.processor import load_processor
from orpo_ray.processing.prompts import EncodedPrompt, PromptEncoder

Root = Path | ImageRoot | None  # what image paths are relative to


@dataclass(frozen=True)
class EncodedPair:
    """A pair as the model will see it.

    prompt_ids [P], chosen_ids [C], rejected_ids [R]: int32, no padding; the answers end as the chat template ends them.
    prompt_is_text [P]: bool, False at image placeholders, which are never NLL targets.
    images: what the model's vision input takes (`pixel_values` as uint8 [tiles, 3, H, W], ...); empty without images.
    sample_index: position in the order of the run (`data/order.py`); -1 for a dummy pair.
    rejected_prompt: the prompt of the rejected answer, if it has images of its own.
    truncated: number of tokens cut from the answers.
    """

    id: str
    prompt_ids: np.ndarray
    chosen_ids: np.ndarray
    rejected_ids: np.ndarray
    prompt_is_text: np.ndarray
    images: dict[str, np.ndarray]
    sample_index: int = -1
    rejected_prompt: EncodedPrompt | None = None
    truncated: int = 0

    @property
    def prompt(self) -> EncodedPrompt:
        """What the chosen answer was given to, and the rejected one unless that has its own."""
        return EncodedPrompt(self.prompt_ids, self.prompt_is_text, self.images)

    @property
    def row_length(self) -> int:
        """Tokens of the longer of prompt + chosen and prompt + rejected."""
        second = self.rejected_prompt.ids if self.rejected_prompt else self.prompt_ids
        return max(len(self.prompt_ids) + len(self.chosen_ids), len(second) + len(self.rejected_ids))

    def to_bytes(self) -> bytes:
        """For the object store: a plain safetensors buffer, nothing that executes when read."""
        tensors = {
            "id": np.frombuffer(self.id.encode(), np.uint8),
            "prompt_ids": self.prompt_ids,
            "chosen_ids": self.chosen_ids,
            "rejected_ids": self.rejected_ids,
            "prompt_is_text": self.prompt_is_text,
            "truncated": np.array([self.truncated]),
        }
        tensors |= {f"images.{name}": value for name, value in self.images.items()}
        if (second := self.rejected_prompt) is not None:
            tensors |= {"rejected_prompt.ids": second.ids, "rejected_prompt.is_text": second.is_text}
            tensors |= {f"rejected_images.{name}": value for name, value in second.images.items()}
        return safetensors.numpy.save(tensors)

    @classmethod
    def from_bytes(cls, data: Any, sample_index: int) -> EncodedPair:
        """Read what `to_bytes` wrote. Arrays are views of the buffer; the sample index is stored beside it."""
        tensors = _views(data)
        second = None
        if "rejected_prompt.ids" in tensors:
            ids, is_text = tensors.pop("rejected_prompt.ids"), tensors.pop("rejected_prompt.is_text")
            second = EncodedPrompt(ids, is_text, _taken(tensors, "rejected_images."))
        return cls(
            id=tensors.pop("id").tobytes().decode(),
            images=_taken(tensors, "images."),
            truncated=int(tensors.pop("truncated")[0]),
            sample_index=sample_index,
            rejected_prompt=second,
            **tensors,
        )


@dataclass(frozen=True)
class EncoderSpec:
    """What an encoder is, small and hashable: it travels to the processes that encode, which keep one each."""

    model_id: str
    revision: str | None
    max_length: int
    truncate: bool = False
    allow_http: bool = False
    trust_remote_code: bool = False

    def build(self) -> PairEncoder:
        """Load the processor (seconds) and make the encoder."""
        processor = load_processor(self.model_id, self.revision, self.trust_remote_code)
        return PairEncoder(processor, self.max_length, self.truncate, self.allow_http)


@dataclass(frozen=True)
class _Draft:
    """A pair with its images decoded and its texts rendered, before tokens. rejected_images: if it has its own."""

    pair: PreferencePair
    images: list[Image.Image]
    rejected_images: list[Image.Image] | None
    prompt: str
    chosen: str
    rejected: str

    @property
    def image_lists(self) -> list[list[Image.Image]]:
        """The images of each prompt that is to be encoded."""
        return [self.images] if self.rejected_images is None else [self.images, self.rejected_images]


class PairEncoder:
    """Encodes pairs with a model's own processor.

    truncate: cut the answers of a pair that is longer than max_length, instead of refusing it. allow_http: fetch images
    that are named by address.
    """

    def __init__(self, processor: Any, max_length: int, truncate: bool = False, allow_http: bool = False) -> None:
        self.processor, self.max_length, self.truncate, self.allow_http = processor, max_length, truncate, allow_http
        self.tokenizer = processor.tokenizer
        self.prompts = PromptEncoder(processor)
        if getattr(processor, "chat_template", None) is None:
            raise UserError(
                "the processor has no chat template", field="model.id", fix="use an instruction-tuned model"
            )

    def encode_many(self, pairs: Sequence[PreferencePair], roots: Sequence[Root]) -> list[EncodedPair | RowError]:
        """Encode pairs, each with the folder of its image paths; one that can't be trained on comes out as RowError."""
        drafts: list[_Draft | RowError] = []
        groups: dict[tuple[tuple[int, int], ...], list[tuple[int, int]]] = defaultdict(list)
        for index, (pair, root) in enumerate(zip(pairs, roots, strict=True)):
            try:
                draft = self._draft(pair, root)
            except RowError as bad:
                drafts.append(bad)
                continue
            drafts.append(draft)
            for side, images in enumerate(draft.image_lists):
                groups[tuple(image.size for image in images)].append((index, side))
        prompts: dict[tuple[int, int], EncodedPrompt | RowError] = {}
        for places in groups.values():
            # Images of one size come out of the processor in one shape, so a batch can be taken apart again.
            asked = [(drafts[index].prompt, drafts[index].image_lists[side]) for index, side in places]  # type: ignore[union-attr]
            prompts |= dict(zip(places, self._prompts_or_bad(asked), strict=True))
        return [
            draft if isinstance(draft, RowError) else self._finish(draft, prompts[index, 0], prompts.get((index, 1)))
            for index, draft in enumerate(drafts)
        ]

    def dummy_pair(self, with_image: bool) -> EncodedPair:
        """A pair that stands in with weight 0 where a worker must run a forward and has nothing of its own."""
        images = [Image.new("RGB", (64, 64), "gray")] if with_image else []
        content = [{"type": "image"}] * len(images) + [{"type": "text", "text": "?"}]
        pair = PreferencePair("dummy_pair", [], [{"role": "user", "content": content}], "a", "b")
        draft = _Draft(pair, images, None, *self._texts(pair))
        encoded = self._finish(draft, self.prompts.encode([(draft.prompt, images)])[0], None)
        if isinstance(encoded, RowError):
            raise UserError(f"even the shortest pair is a bad row: {encoded}", field="data.max_length")
        return encoded

    def _draft(self, pair: PreferencePair, root: Root) -> _Draft:
        self._refuse_placeholders(pair)
        images = [load_image(image, root, self.allow_http) for image in pair.images]
        others = pair.rejected_images
        rejected_images = None if others is None else [load_image(image, root, self.allow_http) for image in others]
        return _Draft(pair, images, rejected_images, *self._texts(pair))

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

    def _prompts_or_bad(self, asked: list[tuple[str, list[Image.Image]]]) -> Sequence[EncodedPrompt | RowError]:
        """Encoded prompts, with a RowError where the processor does not take the images, alone or together."""
        try:
            return self.prompts.encode(asked)
        # What processors raise on sizes that they were not made for.
        except (ValueError, TypeError, ArithmeticError, LookupError, RuntimeError) as error:
            if len(asked) > 1:
                return [found for one in asked for found in self._prompts_or_bad([one])]
            sizes = ", ".join(f"{image.width} x {image.height}" for image in asked[0][1])
            problem = f"the processor refuses images of {sizes}: {type(error).__name__}: {error}"
            return [RowError("refused_by_processor", problem[:300])]

    def _finish(
        self, draft: _Draft, prompt: EncodedPrompt | RowError, other: EncodedPrompt | RowError | None
    ) -> EncodedPair | RowError:
        if isinstance(prompt, RowError):
            return prompt
        if isinstance(other, RowError):
            return other
        # Tokenised apart from the prompt, so that no answer changes the prompt's tokens.
        chosen_ids, rejected_ids = self.prompts.tokenize([draft.chosen, draft.rejected])
        if not len(prompt.ids):
            return RowError("empty_prompt", "the prompt has no tokens: nothing predicts the answers' first ones")
        if not len(chosen_ids) or not len(rejected_ids):
            return RowError("empty_response", f"{'rejected' if len(chosen_ids) else 'chosen'} has no tokens")
        encoded = EncodedPair(
            draft.pair.id, prompt.ids, chosen_ids, rejected_ids, prompt.is_text, prompt.images, rejected_prompt=other
        )
        return encoded if encoded.row_length <= self.max_length else self._too_long(encoded)

    def _too_long(self, pair: EncodedPair) -> EncodedPair | RowError:
        """The pair with shorter answers, if that is wanted and can be; prompts, with their images, are never cut."""
        prompt, second = pair.prompt, pair.rejected_prompt or pair.prompt
        room = self.max_length - max(len(prompt.ids), len(second.ids))
        if self.truncate and room > 0:
            chosen, rejected = pair.chosen_ids[:room], pair.rejected_ids[:room]
            if pair.rejected_prompt is None and np.array_equal(chosen, rejected):
                return RowError(
                    "identical_responses", f"within data.max_length ({self.max_length}) the answers are the same"
                )
            cut = len(pair.chosen_ids) + len(pair.rejected_ids) - len(chosen) - len(rejected)
            return replace(pair, chosen_ids=chosen, rejected_ids=rejected, truncated=cut)
        return RowError(
            "too_long",
            f"prompt of {len(prompt.ids)} tokens ({int((~prompt.is_text).sum())} for images), answers of "
            f"{len(pair.chosen_ids)} and {len(pair.rejected_ids)}; data.max_length is {self.max_length}",
        )

    def _render(self, messages: list[Message], add_generation_prompt: bool) -> str:
        try:
            return self.processor.apply_chat_template(
                messages, add_generation_prompt=add_generation_prompt, tokenize=False
            )
        except TemplateError as error:  # templates refuse role orders that they do not know
            raise RowError("refused_by_chat_template", str(error)) from None

    def _refuse_placeholders(self, pair: PreferencePair) -> None:
        """An image token in plain text would be taken for an image."""
        ids = self.prompts.image_token_ids
        tokens = {self.prompts.image_token, *self.tokenizer.convert_ids_to_tokens(ids)}
        texts = [part["text"] for message in pair.prompt for part in message["content"] if part["type"] == "text"]
        for text in (*texts, pair.chosen, pair.rejected):
            if found := sorted(token for token in tokens if token in text):
                raise RowError("placeholder_in_text", f"the text holds {found[0]!r}: {json.dumps(text[:80])}")


def _views(data: Any) -> dict[str, np.ndarray]:
    """The tensors of a safetensors buffer where they lie: its own reader copies every one twice."""
    buffer = memoryview(data)
    start = 8 + int.from_bytes(buffer[:8], "little")
    header = json.loads(bytes(buffer[8:start]))
    header.pop("__metadata__", None)
    views = {}
    for name, facts in header.items():
        first, last = (start + offset for offset in facts["data_offsets"])
        kind = facts["dtype"]  # "U8", "I32", "BOOL", ...
        dtype = np.dtype(bool) if kind == "BOOL" else np.dtype(f"{kind[0].lower()}{int(kind[1:]) // 8}")
        views[name] = np.frombuffer(buffer[first:last], dtype).reshape(facts["shape"])
    return views


def _taken(tensors: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """Take the tensors with this prefix out, under names without it."""
    return {name.removeprefix(prefix): tensors.pop(name) for name in list(tensors) if name.startswith(prefix)}
