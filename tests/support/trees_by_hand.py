"""Pairs that share images and prompts, with random tokens and pixels, for the tiny model of any family."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations

import numpy as np

from orpo_ray.data.encoding import EncodedPair
from support.pairs_by_hand import make_pair


def ranked(pair: EncodedPair, rng: np.random.Generator, lengths: Sequence[int]) -> list[EncodedPair]:
    """Return all pairs of several answers of these lengths to the prompt of a pair, the best answer first."""
    answers = [_tokens(rng, length) for length in lengths]
    return [
        replace(pair, chosen_ids=better, rejected_ids=worse, sample_index=pair.sample_index + number)
        for number, (better, worse) in enumerate(combinations(answers, 2))
    ]


def asked(pair: EncodedPair, rng: np.random.Generator, tokens: int) -> EncodedPair:
    """Return the pair with another question: new tokens behind the last image of its prompt."""
    keep = int(np.flatnonzero(~pair.prompt_is_text)[-1]) + 1
    ids = np.concatenate([pair.prompt_ids[:keep], _tokens(rng, tokens)])
    is_text = np.concatenate([pair.prompt_is_text[:keep], np.ones(tokens, bool)])
    return replace(pair, prompt_ids=ids, prompt_is_text=is_text, sample_index=pair.sample_index + 1)


def four_answers(family: str) -> list[EncodedPair]:
    """Return the six pairs of four answers to one prompt."""
    rng = np.random.default_rng(4)
    return ranked(make_pair(family, rng, 1, 7, 1, 1), rng, [5, 9, 2, 6])


def several_questions(family: str) -> list[EncodedPair]:
    """Return pairs of three prompts about the same two images: of three answers, of two, and of two."""
    rng = np.random.default_rng(5)
    first = make_pair(family, rng, 2, 6, 4, 3)
    second, third = asked(first, rng, 5), asked(first, rng, 1)
    return [*ranked(first, rng, [4, 3, 7]), second, third]


def all_kinds(family: str) -> list[EncodedPair]:
    """Return pairs without relatives, two pairs of the same text, and pairs that have an image in common in any of the
    ways that pairs have images: as their own, as that of the rejected answer, and as the one to contrast with."""
    rng = np.random.default_rng(6)
    lone, first, other = (make_pair(family, rng, 1, text, 4, 6) for text in (5, 8, 3))
    text = make_pair(family, rng, 0, 6, 3, 5)
    question = asked(first, rng, 4)
    better, worse, _ = ranked(first, rng, [3, 5, 4])
    pairs = [
        replace(first, other_prompt=other.prompt),
        lone,
        replace(better, other_prompt=other.prompt),
        text,
        replace(question, other_prompt=asked(other, rng, 4).prompt),
        replace(worse, rejected_prompt=other.prompt),
        replace(other, other_prompt=first.prompt),
        replace(text, rejected_ids=text.chosen_ids[:1]),
    ]
    return [replace(pair, id=str(index), sample_index=index) for index, pair in enumerate(pairs)]


def _tokens(rng: np.random.Generator, count: int) -> np.ndarray:
    return rng.integers(12, 250, count).astype(np.int32)
