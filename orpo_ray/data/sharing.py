"""Which prompts, images and answers of several pairs are the same, so that a packed row holds them once.

Contents are compared by hashes, which are made where pairs are encoded: distributing a step needs no tokens or pixels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Literal, NamedTuple

import numpy as np
import xxhash

from orpo_ray.data.encoding import EncodedPair
from orpo_ray.processing.prompts import EncodedPrompt

Shares = Literal["nothing", "prompts", "images"]
"""What different pairs of a packed row share. `prompts`: equal prompts with equal images. `images`: also equal images,
and the text before them, of different prompts."""


class Part(NamedTuple):
    """Consecutive tokens that are shared as a whole."""

    key: int
    """Hash of these tokens, their images, and all that is before them."""
    tokens: int
    image_values: int
    """Values in the tensors of the images; 0 without images."""


class Use(NamedTuple):
    """A prompt and an answer to it. Equal keys mean equal contents."""

    prefix: int
    """Tokens of the prompt through its last image; 0 without images."""
    prefix_key: int
    prompt: int
    """Tokens of the prompt."""
    prompt_key: int
    answer: int
    """Tokens of the answer."""
    answer_key: int
    image_values: int
    """Values in the tensors of the prompt's images."""

    @classmethod
    def of(cls, prompt: EncodedPrompt, answers: Iterable[np.ndarray]) -> Iterator[Use]:
        """Measure answers to a prompt. An answer never has the key of a prompt."""
        prefix = 0 if prompt.is_text.all() else int(np.flatnonzero(~prompt.is_text)[-1]) + 1
        prefix_key = _hash(0, prompt.ids[:prefix], prompt.images)
        prompt_key = _hash(prefix_key, prompt.ids[prefix:]) if prefix < len(prompt.ids) else prefix_key
        values = sum(value.size for value in prompt.images.values())
        for ids in answers:
            yield cls(prefix, prefix_key, len(prompt.ids), prompt_key, len(ids), _hash(~prompt_key, ids), values)

    def parts(self, shares: Shares) -> Iterator[Part]:
        """Yield the parts that a row holds once each, of which the first one is the root of a tree."""
        split = shares == "images" and 0 < self.prefix < self.prompt
        if split:
            yield Part(self.prefix_key, self.prefix, self.image_values)
        yield Part(self.prompt_key, self.prompt - self.prefix * split, self.image_values * (not split))
        yield Part(self.answer_key, self.answer, 0)


def prompts_with_answers(pair: EncodedPair) -> Iterator[tuple[EncodedPrompt, list[tuple[int, np.ndarray]]]]:
    """Yield each prompt of a pair and its answers: 0 for the chosen one, 1 for the rejected one, and 2 for the chosen
    one to other images."""
    chosen, rejected = pair.chosen_ids, pair.rejected_ids
    if pair.rejected_prompt is None:
        yield pair.prompt, [(0, chosen), (1, rejected)]
    else:
        yield pair.prompt, [(0, chosen)]
        yield pair.rejected_prompt, [(1, rejected)]
    if pair.other_prompt is not None:
        yield pair.other_prompt, [(2, chosen)]


def _hash(before: int, ids: np.ndarray, images: Mapping[str, np.ndarray] | None = None) -> int:
    """Hash tokens, and images, behind something with the hash `before`: 63 bits, which fit an int64."""
    digest = xxhash.xxh3_64(f"{before}".encode())
    digest.update(np.ascontiguousarray(ids).data)
    for name, value in sorted((images or {}).items()):
        digest.update(f"{name} {value.dtype} {value.shape}".encode())
        digest.update(np.ascontiguousarray(value).data)
    return digest.intdigest() >> 1
