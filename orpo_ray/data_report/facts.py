"""Facts about a pair that a data check collects where the pair is encoded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orpo_ray.data.encoding import EncodedPair
from orpo_ray.data.pairs import PreferencePair

TEXT_CHARACTERS = 600  # of each text, for the text-only accuracy


@dataclass(frozen=True)
class PairFacts:
    """Facts about an encoded pair."""

    sample_index: int
    id: str
    source: str
    """File and line or row."""
    tokens: tuple[int, int, int, int] = (0, 0, 0, 0)
    """Tokens of the prompt, image tokens among them, tokens of chosen and of rejected."""
    images: tuple[str, ...] = ()
    """Fingerprints of the images."""
    question: str = ""
    """Hash of images and prompt."""
    pair: str = ""
    """Hash of the whole pair."""
    exchanged: str = ""
    """Hash of the pair with its answers exchanged."""
    sizes: tuple[tuple[int, int], ...] = ()
    """(width, height) of each image."""
    texts: tuple[str, str, str] = ("", "", "")
    """Beginnings of prompt, chosen and rejected."""
    answers: tuple[int, int] = (0, 0)
    """Characters of both answers, and their tokens without those that the chat template adds."""
    language: str | None = None
    domain: str | None = None

    @property
    def sequence(self) -> int:
        """Tokens of prompt and longer answer, which `data.max_length` limits."""
        return self.tokens[0] + max(self.tokens[2], self.tokens[3])


def facts_of(
    pair: PreferencePair,
    encoded: EncodedPair,
    fingerprints: Sequence[str],
    sizes: Sequence[tuple[int, int]],
    closing_tokens: int = 0,
) -> PairFacts:
    """Collect the facts about an encoded pair.

    Args:
        pair: the pair.
        encoded: the same pair, encoded.
        fingerprints: of its images.
        sizes: (width, height) of its images.
        closing_tokens: what the chat template adds to each answer.
    """
    prompt = json.dumps(pair.prompt)
    question = _hash(*fingerprints, prompt)
    words = " ".join(part["text"] for turn in pair.prompt for part in turn["content"] if part["type"] == "text")
    image_tokens = int((~encoded.prompt_is_text).sum())
    rejected_prompt_ids = encoded.rejected_prompt.ids if encoded.rejected_prompt else encoded.prompt_ids
    return PairFacts(
        sample_index=encoded.sample_index,
        id=pair.id,
        source=pair.source,
        tokens=(
            max(len(encoded.prompt_ids), len(rejected_prompt_ids)),
            image_tokens,
            len(encoded.chosen_ids),
            len(encoded.rejected_ids),
        ),
        images=tuple(fingerprints),
        question=question,
        pair=_hash(question, pair.chosen, pair.rejected),
        exchanged=_hash(question, pair.rejected, pair.chosen),
        sizes=tuple(sizes),
        texts=(words[:TEXT_CHARACTERS], pair.chosen[:TEXT_CHARACTERS], pair.rejected[:TEXT_CHARACTERS]),
        answers=(
            len(pair.chosen) + len(pair.rejected),
            max(0, len(encoded.chosen_ids) + len(encoded.rejected_ids) - 2 * closing_tokens),
        ),
        language=pair.language,
        domain=pair.domain,
    )


def facts_from_json(facts: Mapping[str, Any]) -> PairFacts:
    """Rebuild facts from `dataclasses.asdict` after a round trip through JSON."""
    lists = {name: tuple(value) for name, value in facts.items() if isinstance(value, list)}
    lists["sizes"] = tuple(map(tuple, facts["sizes"]))
    return PairFacts(**{**facts, **lists})


def _hash(*parts: str) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part.encode())
    return digest.hexdigest()[:24]
