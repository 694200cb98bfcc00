"""Bounds on what an encoder takes on, so that one row cannot cost minutes or gigabytes. Checking costs a few `len`s.

A pair that fits `data.max_length` has at most that many tokens, and no token has more characters than the tokenizer's
longest one. A longer text is refused before it is tokenized, since a text of 10 MB costs 20 seconds and 2 GB. White
space counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from orpo_ray.data.pairs import PreferencePair
from orpo_ray.errors import RowError

# Of vocabularies whose longest token is shorter: Unicode normalization joins up to 4 characters to one, and runs of
# characters without a token may become one token. Qwen2.5's longest token has 128 characters, all spaces.
SHORTEST_LONGEST_TOKEN = 64
# Of all images that one answer is given to, decoded at the same time: 1.5 GB.
MAX_PIXELS_OF_ANSWER = 512_000_000


@dataclass(frozen=True)
class InputBounds:
    """Sizes that no pair of at most max_length tokens exceeds."""

    max_length: int
    """Tokens of prompt + answer. Each message of a prompt and each image has at least one token."""
    characters_per_token: int
    """Characters of the longest token."""

    @classmethod
    def of(cls, tokenizer: Any, max_length: int) -> InputBounds:
        """Return the bounds of a tokenizer."""
        longest = max(map(len, tokenizer.get_vocab()), default=0)
        return cls(max_length, max(longest, SHORTEST_LONGEST_TOKEN))

    @property
    def max_characters(self) -> int:
        """Characters of a prompt or an answer."""
        return self.max_length * self.characters_per_token

    def check(self, pair: PreferencePair) -> None:
        """Raise RowError if a pair exceeds a bound."""
        parts = [part for message in pair.prompt for part in message["content"]]
        counts = {
            "messages": len(pair.prompt),
            "texts and images in its prompt": len(parts),
            "images": len(pair.images),
        }
        for name, count in counts.items():
            if count > self.max_length:
                raise RowError("too_long", f"{count} {name} cannot fit data.max_length ({self.max_length})")
        prompt = sum(len(part["text"]) for part in parts if part["type"] == "text")
        prompt += sum(len(message["role"]) for message in pair.prompt)
        for name, size in (("prompt", prompt), ("chosen", len(pair.chosen)), ("rejected", len(pair.rejected))):
            if size > self.max_characters:
                raise RowError(
                    "too_long",
                    f"{name} has {size} characters, which cannot fit data.max_length ({self.max_length} tokens): it is "
                    f"not tokenized, since no token has more than {self.characters_per_token} characters",
                )
