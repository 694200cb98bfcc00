"""Text-only accuracy: how often a classifier without the images identifies the chosen answer. 0.5 is chance.

The classifier is linear, with words of the answer, and pairs of words of prompt and answer, as features. It is cheap
and finds what a model that ignores the image would learn first: favored words, and answers that repeat the question.
"""

from __future__ import annotations

import math
import re
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from orpo_ray.extras import require

MAX_PAIRS = 10_000
MIN_PAIRS = 100
FOLDS = 5
PROMPT_WORDS = 24  # only the first words of each text are used, to limit the cost of long ones
ANSWER_WORDS = 120
CROSSED_WORDS = 12
FEATURES = 2**18


@dataclass(frozen=True)
class TextOnlyPair:
    """The texts of a pair."""

    group: str
    """Pairs of the same group are never divided between training and test folds. Neither are pairs with the same prompt
    and the same two answers, whichever is chosen."""
    prompt: str
    chosen: str
    rejected: str


def text_only_accuracy(texts: Sequence[TextOnlyPair]) -> dict[str, float] | None:
    """Estimate the text-only accuracy by cross-validation.

    Returns:
        `accuracy`, its 95 % confidence interval `low` and `high`, and the number of `pairs`; None if there are too few
        pairs.
    """
    require("sklearn", "the text-only baseline")
    from sklearn.feature_extraction import FeatureHasher
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GroupKFold

    texts = texts[:MAX_PAIRS]
    groups = _groups(texts)
    if len(texts) < MIN_PAIRS or len(set(groups)) < FOLDS:
        return None
    hasher = FeatureHasher(FEATURES, input_type="string")
    chosen = hasher.transform(_features(text.prompt, text.chosen) for text in texts)
    rejected = hasher.transform(_features(text.prompt, text.rejected) for text in texts)
    difference = (chosen - rejected).tocsr()
    correct = np.zeros(len(texts))
    for train, test in GroupKFold(FOLDS).split(difference, groups=groups):
        # Negate every second difference, so that both classes occur.
        sign = np.where(np.arange(len(train)) % 2 == 0, 1, -1)
        model = LogisticRegression(C=0.1, fit_intercept=False, max_iter=200, solver="liblinear")
        model.fit(difference[train].multiply(sign[:, None]).tocsr(), sign)
        score = model.decision_function(difference[test])
        correct[test] = np.where(score == 0, 0.5, score > 0)
    accuracy = float(correct.mean())
    margin = 1.96 * math.sqrt(accuracy * (1 - accuracy) / len(texts))
    return {
        "accuracy": accuracy,
        "low": max(0.0, accuracy - margin),
        "high": min(1.0, accuracy + margin),
        "pairs": float(len(texts)),
    }


def _groups(texts: Sequence[TextOnlyPair]) -> list[int]:
    """Return the number of each pair's group: pairs that are connected by their groups or by their texts.

    Where a sentence stands once with each answer chosen, a fold that holds one of the two would teach the classifier
    the opposite of the other, and the estimate would fall below chance.
    """
    nodes: dict[Hashable, int] = {}
    links = []
    for text in texts:
        same_texts = (text.prompt, *sorted((text.chosen, text.rejected)))
        links.append([nodes.setdefault(key, len(nodes)) for key in (("group", text.group), same_texts)])
    first, second = np.array(links, np.int64).reshape(-1, 2).T
    graph = coo_array((np.ones(len(links)), (first, second)), shape=(len(nodes), len(nodes)))
    labels = connected_components(graph, directed=False)[1]
    found: list[int] = labels[first].tolist()
    return found


def _features(prompt: str, answer: str) -> Iterator[str]:
    words = _words(answer)[:ANSWER_WORDS]
    yield from words
    yield from (f"{one} {two}" for one, two in pairwise(words))
    # The length of an answer, on a logarithmic scale, can be more predictive than its words.
    yield f"length:{int(math.log2(len(answer) + 1) * 2)}"
    # Combinations of a word of the prompt with a word of the answer.
    for one in sorted(set(_words(prompt)[:PROMPT_WORDS])):
        for two in sorted(set(words[:CROSSED_WORDS])):
            yield f"{one}|{two}"


def _words(text: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", text.lower())
