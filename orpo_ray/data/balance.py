"""Which worker computes which pairs of a step, in which micro-batches.

A step is a set of pairs: its loss and gradient do not depend on who computes which pair. So pairs are distributed once
their lengths are known. All workers run their k-th micro-batch at the same time and wait for the largest one, and under
ZeRO every forward is a collective, so all workers run equally many. Pairs that share a prompt or an image are computed
as a tree, so they stay together.

Legend: W workers, K micro-batches of each worker.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from orpo_ray.data.bad_rows import BadRow
from orpo_ray.data.encoding import EncodedPair
from orpo_ray.data.even_groups import evened_out, first_fit, heaviest_first, heaviest_total, rounded_up, split_to
from orpo_ray.data.sharing import Part, Shares, Use, prompts_with_answers

Layout = Literal["shared_prefix", "concatenated"]
Microbatches = list[list[list[int]]]
"""[worker][micro-batch] -> the indices of its pairs in the step."""


class PairSize(NamedTuple):
    """What distributing a step needs to know of a pair."""

    prompt: int
    """Tokens of the prompt."""
    prompt_targets: int
    """Text tokens of the prompt without the first token, which nothing predicts."""
    chosen: int
    rejected: int
    second_prompt: int
    """Tokens of the rejected answer's own prompt; 0 if it has none."""
    image_values: int
    """Values in the image tensors; 0 without images."""
    other_prompt: int = 0
    """Tokens of the prompt with other images, which the chosen answer follows again; 0 if there is none."""
    uses: tuple[Use, ...] = ()
    """Of the chosen answer, the rejected one and, with other images, the chosen one again; not needed where pairs share
    nothing."""

    @classmethod
    def of(cls, pair: EncodedPair) -> PairSize:
        """Measure a pair."""
        second, other = pair.rejected_prompt, pair.other_prompt
        images = [pair.images, *(prompt.images for prompt in (second, other) if prompt is not None)]
        return cls(
            prompt=len(pair.prompt_ids),
            prompt_targets=int(pair.prompt_is_text[1:].sum()),
            chosen=len(pair.chosen_ids),
            rejected=len(pair.rejected_ids),
            second_prompt=0 if second is None else len(second.ids),
            image_values=sum(value.size for each in images for value in each.values()),
            other_prompt=0 if other is None else len(other.ids),
            uses=tuple(
                use
                for prompt, answers in prompts_with_answers(pair)
                for use in Use.of(prompt, [ids for _, ids in answers])
            ),
        )

    def parts(self, shares: Shares) -> Iterator[Part]:
        """Yield the parts of its trees in a packed row, the root of the pair's own images first."""
        return (part for use in self.uses for part in use.parts(shares))

    @classmethod
    def from_numbers(cls, numbers: Sequence[int]) -> PairSize:
        """Make a size of `numbers`."""
        own = len(cls._fields) - 1
        uses = (numbers[first : first + len(Use._fields)] for first in range(own, len(numbers), len(Use._fields)))
        return cls._make([*numbers[:own], tuple(Use._make(each) for each in uses)])

    @property
    def numbers(self) -> list[int]:
        """All of it as one list, to be sent."""
        return [*self[:-1], *(number for use in self.uses for number in use)]

    @property
    def packed(self) -> int:
        """Tokens of `[prompt | chosen | rejected]`, or of `[prompt | chosen]` and `[prompt | rejected]`; with other
        images, and of `[prompt | chosen]` again."""
        again = self.other_prompt + self.chosen if self.other_prompt else 0
        return self.prompt + self.chosen + self.second_prompt + self.rejected + again

    @property
    def rows(self) -> int:
        """Rows in the concatenated layout."""
        return 3 if self.other_prompt else 2

    @property
    def row(self) -> int:
        """Tokens of the longest row in the concatenated layout."""
        prompt = max(self.prompt, self.other_prompt)
        return max(prompt + self.chosen, (self.second_prompt or self.prompt) + self.rejected)


class StepTotals(NamedTuple):
    """What a worker needs to know of a whole step. All pairs' sizes would be too much to send to 1,000 workers."""

    pairs: int
    with_images: int
    """Pairs with images."""
    prompt_targets: int
    chosen: int

    @classmethod
    def of(cls, sizes: Sequence[PairSize]) -> StepTotals:
        """Add up the sizes of the step's pairs."""
        return cls(
            pairs=len(sizes),
            with_images=sum(size.image_values > 0 for size in sizes),
            prompt_targets=sum(size.prompt_targets for size in sizes),
            chosen=sum(size.chosen for size in sizes),
        )

    def nll_tokens(self, span: str) -> int:
        """Count the tokens that the NLL term covers."""
        return self.chosen + (self.prompt_targets if span == "prompt+response" else 0)


@dataclass(frozen=True)
class Packing:
    """How pairs are grouped into micro-batches."""

    token_budget: int
    """Most tokens of a micro-batch. A pair that is larger gets its own micro-batch."""
    layout: Layout
    """In `shared_prefix`, a micro-batch has as many tokens as its pairs. In `concatenated` it has 2 * B * T, or
    3 * B * T with other images, so that pairs of similar length are put together."""
    tokens_per_image_value: float = 0.0
    """The vision encoder's work for a value of an image tensor, in tokens of the language model with the same work."""
    shares: Shares = "nothing"
    """What the pairs of a micro-batch share in `shared_prefix`. What several of them share counts once."""

    @property
    def makes_trees(self) -> bool:
        """Whether pairs of a micro-batch share anything."""
        return self.layout == "shared_prefix" and self.shares != "nothing"

    def tokens(self, sizes: Sequence[PairSize]) -> int:
        """Count the tokens of a micro-batch, padding included."""
        if self.makes_trees and len(sizes) > 1:
            return sum(part.tokens for part in self._parts(sizes))
        if self.layout == "shared_prefix":
            return sum(size.packed for size in sizes)
        return sum(size.rows for size in sizes) * max((size.row for size in sizes), default=0)

    def work(self, sizes: Sequence[PairSize]) -> float:
        """Estimate the work of a micro-batch, in tokens."""
        if self.makes_trees and len(sizes) > 1:
            values = sum(part.image_values for part in self._parts(sizes))
        else:
            values = sum(size.image_values for size in sizes)
        return self.tokens(sizes) + self.tokens_per_image_value * values

    def _parts(self, sizes: Sequence[PairSize]) -> list[Part]:
        """The parts of the trees of some pairs, each once."""
        return list({part.key: part for size in sizes for part in size.parts(self.shares)}.values())


@dataclass(frozen=True)
class StepShare:
    """One worker's part of a step."""

    step: int
    totals: StepTotals
    """Of the step, over all workers."""
    microbatches: list[list[EncodedPair]]
    """The pairs of each of this worker's micro-batches."""
    bad: list[BadRow]
    """All bad rows of the step, over all workers, in the order of their sample indices."""

    @property
    def pairs(self) -> list[EncodedPair]:
        """This worker's pairs."""
        return [pair for each in self.microbatches for pair in each]


def distribute(sizes: Sequence[PairSize], num_workers: int, packing: Packing) -> Microbatches:
    """Distribute a step's pairs over micro-batches of equal work, and those over the workers.

    The result depends on the arguments only. Every worker gets equally many micro-batches: as few as fit the budget,
    the largest first. With fewer pairs than micro-batches, some stay empty.
    """
    fit = _packed if packing.layout == "shared_prefix" else _padded
    bins = fit(sizes, num_workers, packing)
    works = [packing.work([sizes[index] for index in each]) for each in bins]
    order = sorted(range(len(bins)), key=lambda number: (-works[number], number))
    found: Microbatches = [[] for _ in range(num_workers)]
    totals = np.zeros(num_workers)
    # W micro-batches of similar size run together. The largest of them goes to the worker with the least work so far.
    for first in range(0, len(order), num_workers):
        workers = np.argsort(totals, kind="stable").tolist()
        for worker, number in zip(workers, order[first : first + num_workers], strict=True):
            found[worker].append(sorted(bins[number]))
            totals[worker] += works[number]
    return found


def _packed(sizes: Sequence[PairSize], num_workers: int, packing: Packing) -> list[list[int]]:
    """Count micro-batches by first fit, longest first; then even out their work, unless that breaks the budget."""
    trees = _trees(sizes, num_workers, packing)
    all_tokens = [packing.tokens([sizes[index] for index in tree]) for tree in trees]
    alone = [tree for tree, count in zip(trees, all_tokens, strict=True) if count > packing.token_budget]
    rest = [tree for tree, count in zip(trees, all_tokens, strict=True) if count <= packing.token_budget]
    tokens = [float(count) for count in all_tokens if count <= packing.token_budget]
    fitted = first_fit(tokens, packing.token_budget, len(rest)) or []
    groups = split_to(fitted, rounded_up(len(alone) + len(fitted), num_workers) - len(alone))
    even = evened_out(tokens, groups, num_workers, packing.token_budget)
    if packing.tokens_per_image_value:
        works = [packing.work([sizes[index] for index in tree]) for tree in rest]
        by_work = evened_out(works, groups, num_workers, math.inf)
        if heaviest_total(by_work, tokens) <= packing.token_budget:
            even = by_work
    return alone + [[index for place in group for index in rest[place]] for group in even]


def _trees(sizes: Sequence[PairSize], num_workers: int, packing: Packing) -> list[list[int]]:
    """Divide pairs into those that stay together: pairs with the same root, as far as the budget allows.

    With fewer trees than workers, the largest are halved: a worker with half of a tree is faster than one that waits.
    """
    if not packing.makes_trees:
        return [[index] for index in range(len(sizes))]
    by_root: dict[int, list[int]] = {}
    for index, size in enumerate(sizes):
        by_root.setdefault(next(size.parts(packing.shares)).key, []).append(index)
    trees = [part for tree in by_root.values() for part in _within_budget(tree, sizes, packing)]
    while len(trees) < num_workers:
        weights = [(packing.tokens([sizes[index] for index in tree]), len(tree)) for tree in trees]
        divisible = [number for number, tree in enumerate(trees) if len(tree) > 1]
        if not divisible:
            break
        largest = max(divisible, key=weights.__getitem__)
        tree, middle = trees[largest], (len(trees[largest]) + 1) // 2
        trees[largest : largest + 1] = [tree[:middle], tree[middle:]]
    return trees


def _within_budget(tree: list[int], sizes: Sequence[PairSize], packing: Packing) -> list[list[int]]:
    """Cut a tree that is larger than the budget. Pairs with the same prompt stay neighbors."""
    by_prompt: dict[int, list[int]] = {}
    for index in tree:
        by_prompt.setdefault(sizes[index].uses[0].prompt_key, []).append(index)
    cut: list[list[int]] = []
    held: dict[int, int] = {}  # tokens of each part of the last piece
    for index in (index for same_prompt in by_prompt.values() for index in same_prompt):
        own = {part.key: part.tokens for part in sizes[index].parts(packing.shares)}
        if not cut or sum((held | own).values()) > packing.token_budget:
            cut.append([])
            held = {}
        cut[-1].append(index)
        held |= own
    return cut


def _padded(sizes: Sequence[PairSize], num_workers: int, packing: Packing) -> list[list[int]]:
    """Cut the pairs, sorted by length, into consecutive groups."""
    groups: list[list[int]] = []
    rows = 0  # of the last group
    for index in heaviest_first([size.row for size in sizes]):
        # Sorted, so the first pair of a group is its longest.
        if groups and (rows + sizes[index].rows) * sizes[groups[-1][0]].row <= packing.token_budget:
            groups[-1].append(index)
        else:
            groups.append([index])
            rows = 0
        rows += sizes[index].rows
    return split_to(groups, rounded_up(len(groups), num_workers))
