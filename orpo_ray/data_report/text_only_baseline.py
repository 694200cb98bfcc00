"""How far the better answer of a pair can be told from the text alone: 0.5 means that the text gives nothing away.

A linear classifier over words, and over words of the prompt with words of the answer, is cheap and finds what a model
that ignores the image would find first: favourite words, answers that agree with the question's wording.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from orpo_ray.extras import require

MOST_PAIRS = 10_000
FEWEST_PAIRS = 100
FOLDS = 5
PROMPT_WORDS = 24  # of each text these many, so that long ones cost no more than short ones
ANSWER_WORDS = 120
CROSSED_WORDS = 12
FEATURES = 2**18


@dataclass(frozen=True)
class TextOnlyPair:
    """What a reader without the image has. group: pairs of one group are never split over training and test."""

    group: str
    prompt: str
    chosen: str
    rejected: str


def text_only_accuracy(texts: Sequence[TextOnlyPair]) -> dict[str, float] | None:
    """`accuracy` of telling the chosen answer, cross-validated, with its 95 % interval `low`, `high`, and `pairs`.

    None where there are too few pairs to say.
    """
    require("sklearn", "the text-only baseline")
    from sklearn.feature_extraction import FeatureHasher
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GroupKFold

    texts = texts[:MOST_PAIRS]
    groups = [text.group for text in texts]
    if len(texts) < FEWEST_PAIRS or len(set(groups)) < FOLDS:
        return None
    hasher = FeatureHasher(FEATURES, input_type="string")
    chosen = hasher.transform(_features(text.prompt, text.chosen) for text in texts)
    rejected = hasher.transform(_features(text.prompt, text.rejected) for text in texts)
    difference = (chosen - rejected).tocsr()
    right = np.zeros(len(texts))
    for train, test in GroupKFold(FOLDS).split(difference, groups=groups):
        # Half of the differences turned round: the classifier must learn which is better, not that the first one is.
        sign = np.where(np.arange(len(train)) % 2 == 0, 1, -1)
        model = LogisticRegression(C=0.1, fit_intercept=False, max_iter=200, solver="liblinear")
        model.fit(difference[train].multiply(sign[:, None]).tocsr(), sign)
        score = model.decision_function(difference[test])
        right[test] = np.where(score == 0, 0.5, score > 0)
    accuracy = float(right.mean())
    margin = 1.96 * math.sqrt(accuracy * (1 - accuracy) / len(texts))
    return {
        "accuracy": accuracy,
        "low": max(0.0, accuracy - margin),
        "high": min(1.0, accuracy + margin),
        "pairs": float(len(texts)),
    }


def _features(prompt: str, answer: str) -> Iterator[str]:
    words = _words(answer)[:ANSWER_WORDS]
    yield from words
    yield from (f"{one} {two}" for one, two in pairwise(words))
    # In powers of two: how long an answer is often says more than what it says.
    yield f"length:{int(math.log2(len(answer) + 1) * 2)}"
    # Unordered, and each once: whether the prompt's words and the answer's go together.
    for one in sorted(set(_words(prompt)[:PROMPT_WORDS])):
        for two in sorted(set(words[:CROSSED_WORDS])):
            yield f"{one}|{two}"


def _words(text: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", text.lower())
