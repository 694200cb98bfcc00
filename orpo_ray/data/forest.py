"""The prompts and answers of pairs as trees, in which what several pairs share is one node.

Legend: B pairs. The side of a pair that a target token counts for is a number, as in `PairIndex`: i for
the chosen answer of pair i, B + i for the rejected one, 2B + i for the chosen one again, to other images.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count

import numpy as np

from orpo_ray.data.encoding import EncodedPair
from orpo_ray.data.sharing import Shares, Use, prompts_with_answers
from orpo_ray.processing.prompts import EncodedPrompt


@dataclass
class Node:
    """Consecutive tokens of a prompt, or an answer. A node sees its ancestors."""

    ids: np.ndarray
    """int32."""
    is_text: np.ndarray | None
    """bool, like `ids`: False at image placeholders; None for an answer."""
    images: dict[str, np.ndarray]
    """The image tensors of the tree, at its root; empty elsewhere."""
    sum: int
    """The sum that its target tokens count for; see `Forest`."""
    pairs: list[int] = field(default_factory=list)
    """Of a prompt: the pairs whose chosen answer follows it."""
    children: dict[int, Node] = field(default_factory=dict)
    """In the order of the row."""

    @property
    def total_tokens(self) -> int:
        """Tokens of it and of all that follows it."""
        return len(self.ids) + sum(child.total_tokens for child in self.children.values())

    @property
    def is_shared(self) -> bool:
        """Whether several pairs have it in their prompt."""
        return len(self.pairs) > 1


@dataclass(frozen=True)
class Forest:
    """The trees of a packed row.

    There is a sum for each side, of which only those are used whose answer no earlier side has, and behind them one for
    each part of a prompt that several pairs share. The tokens of other prompts count for the sum of the chosen answer.
    """

    roots: list[Node]
    num_sides: int
    """2 * B, or 3 * B if a pair has other images."""
    num_sums: int
    sum_of: dict[int, int]
    """Side -> the sum of its answer: the first side with the same answer to the same prompt."""
    prompts_of: list[list[Node]]
    """The nodes of each pair's prompt, from the root on."""

    @classmethod
    def of(cls, pairs: Sequence[EncodedPair], shares: Shares) -> Forest:
        """Make the trees of pairs, in the order of their first pairs."""
        roots: dict[int, Node] = {}
        sum_of: dict[int, int] = {}
        prompts_of: list[list[Node]] = [[] for _ in pairs]
        numbers = count()
        for index, pair in enumerate(pairs):
            for prompt, answers in prompts_with_answers(pair):
                for (which, ids), use in zip(answers, _uses(prompt, answers, shares, numbers), strict=True):
                    side = which * len(pairs) + index
                    *path, (leaf, answer) = _path(prompt, ids, use, shares, side)
                    level = roots
                    for key, new in path:
                        node = level.setdefault(key, new)
                        level = node.children
                        if which == 0:
                            node.pairs.append(index)
                            prompts_of[index].append(node)
                    sum_of[side] = level.setdefault(leaf, answer).sum
        num_sides = (3 if any(pair.other_prompt for pair in pairs) else 2) * len(pairs)
        num_sums = num_sides
        for index, nodes in enumerate(prompts_of):
            for node in nodes:
                if not node.is_shared:
                    node.sum = sum_of[index]
                elif node.pairs[0] == index:
                    node.sum = num_sums
                    num_sums += 1
        return cls(list(roots.values()), num_sides, num_sums, sum_of, prompts_of)


def _uses(
    prompt: EncodedPrompt, answers: Sequence[tuple[int, np.ndarray]], shares: Shares, numbers: Iterator[int]
) -> list[Use]:
    """Measure answers to a prompt. Where pairs share nothing, numbers take the place of hashes."""
    if shares != "nothing":
        return list(Use.of(prompt, [ids for _, ids in answers]))
    own, tokens = next(numbers), len(prompt.ids)
    return [Use(0, own, tokens, own, len(ids), next(numbers), 0) for _, ids in answers]


def _path(prompt: EncodedPrompt, answer: np.ndarray, use: Use, shares: Shares, side: int) -> list[tuple[int, Node]]:
    """Return the nodes from the root to an answer, with their keys."""
    path: list[tuple[int, Node]] = []
    start = 0
    for part in use.parts(shares):
        end = start + part.tokens
        if start < use.prompt:
            images = {} if path else prompt.images
            path.append((part.key, Node(prompt.ids[start:end], prompt.is_text[start:end], images, side)))
        else:
            path.append((part.key, Node(answer, None, {}, side)))
        start = end
    return path
