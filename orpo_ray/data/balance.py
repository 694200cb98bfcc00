"""Which worker computes which pairs of a step, in which micro-batches.

A step is a set of pairs: its loss and gradient do not depend on who computes which pair. So pairs are distributed once
their lengths are known. All workers run their k-th micro-batch at the same time and wait for the largest one, and under
ZeRO every forward is a collective, so all workers run equally many.

Legend: W workers, K micro-batches of each worker.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heapreplace
from typing import Literal, NamedTuple

import numpy as np

from orpo_ray.data.bad_rows import BadRow
from orpo_ray.data.encoding import EncodedPair

Layout = Literal["shared_prefix", "concatenated"]
Microbatches = list[list[list[int]]]
"""[worker][micro-batch] -> the indices of its pairs in the step."""

# Effort of evening out: how near the best possible is near enough, limits tried, the most members of a group on average
# and in all for which more than one way is tried, groups divided anew, and the most members of two such groups.
_NEAR_ENOUGH = 1.005
_SEARCHES = 12
_FEW_MEMBERS = 3
_FEW_IN_ALL = 1024
_DIVISIONS = 50
_MOST_MEMBERS = 6


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
        )

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

    def tokens(self, sizes: Sequence[PairSize]) -> int:
        """Count the tokens of a micro-batch, padding included."""
        if self.layout == "shared_prefix":
            return sum(size.packed for size in sizes)
        return sum(size.rows for size in sizes) * max((size.row for size in sizes), default=0)

    def work(self, sizes: Sequence[PairSize]) -> float:
        """Estimate the work of a micro-batch, in tokens."""
        return self.tokens(sizes) + self.tokens_per_image_value * sum(size.image_values for size in sizes)


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
    alone = [[index] for index, size in enumerate(sizes) if size.packed > packing.token_budget]
    rest = [index for index, size in enumerate(sizes) if size.packed <= packing.token_budget]
    tokens = [float(sizes[index].packed) for index in rest]
    fitted = _first_fit(tokens, packing.token_budget, len(rest)) or []
    groups = _split_to(fitted, _rounded_up(len(alone) + len(fitted), num_workers) - len(alone))
    even = _evened_out(tokens, groups, num_workers, packing.token_budget)
    if packing.tokens_per_image_value:
        by_work = _evened_out([packing.work([sizes[index]]) for index in rest], groups, num_workers, math.inf)
        if _heaviest(by_work, tokens) <= packing.token_budget:
            even = by_work
    return alone + [[rest[place] for place in group] for group in even]


def _padded(sizes: Sequence[PairSize], num_workers: int, packing: Packing) -> list[list[int]]:
    """Cut the pairs, sorted by length, into consecutive groups."""
    groups: list[list[int]] = []
    rows = 0  # of the last group
    for index in _heaviest_first([size.row for size in sizes]):
        # Sorted, so the first pair of a group is its longest.
        if groups and (rows + sizes[index].rows) * sizes[groups[-1][0]].row <= packing.token_budget:
            groups[-1].append(index)
        else:
            groups.append([index])
            rows = 0
        rows += sizes[index].rows
    return _split_to(groups, _rounded_up(len(groups), num_workers))


def _evened_out(weights: Sequence[float], groups: list[list[int]], num_workers: int, most: float) -> list[list[int]]:
    """Divide the members of groups anew, into as many groups that take less time, none of them heavier than `most`.

    Always adding to the lightest group is near the best if groups have many members. If they have two or three, it
    leaves the heaviest group 17 % above the mean, and multifit finds better ones: two ways of filling groups up to a
    limit, and a binary search for the lowest limit.
    """
    heaviest, mean = max(weights, default=0.0), sum(weights) / max(1, len(groups))
    least = max(heaviest, sum(weights) / num_workers)
    best, time = groups, _time(groups, weights, num_workers)

    def improve(found: list[list[int]]) -> bool:
        nonlocal best, time
        needed = _time(found, weights, num_workers)
        if needed > time or _heaviest(found, weights) > most:
            return False
        best, time = found, needed
        return True

    few_members = len(weights) <= _FEW_MEMBERS * len(groups)
    if improve(_greedy(weights, len(groups))) and not few_members:
        return best
    for fill in (_first_fit, _best_fill) if few_members and len(weights) <= _FEW_IN_ALL else (_first_fit,):
        low, high = max(heaviest, mean), _heaviest(best, weights)
        for _ in range(_SEARCHES):
            if time <= _NEAR_ENOUGH * least:
                return best
            limit = (low + high) / 2
            found = fill(weights, limit, len(groups))
            if found is None:
                low = limit
                continue
            high = limit
            improve(found + [[] for _ in range(len(groups) - len(found))])
    improve(_divided_anew(weights, best, _NEAR_ENOUGH * mean))
    return best


def _time(groups: list[list[int]], weights: Sequence[float], num_workers: int) -> float:
    """Add up what all workers wait for: they run the heaviest W groups together, then the next W, and so on."""
    totals = sorted((sum(weights[index] for index in group) for group in groups), reverse=True)
    return sum(totals[::num_workers])


def _greedy(weights: Sequence[float], count: int) -> list[list[int]]:
    """Add each member, the heaviest first, to the lightest group so far."""
    groups: list[list[int]] = [[] for _ in range(count)]
    lightest = [(0.0, number) for number in range(count)]
    for index in _heaviest_first(weights):
        total, number = lightest[0]
        groups[number].append(index)
        heapreplace(lightest, (total + weights[index], number))
    return groups


def _first_fit(weights: Sequence[float], limit: float, count: int) -> list[list[int]] | None:
    """Add each member, the heaviest first, to the first group with room; None if `count` groups do not suffice."""
    groups: list[list[int]] = []
    free: list[float] = []
    for index in _heaviest_first(weights):
        number = next((number for number, left in enumerate(free) if weights[index] <= left), len(free))
        if number == count:
            return None
        if number == len(free):
            groups.append([])
            free.append(limit)
        groups[number].append(index)
        free[number] -= weights[index]
    return groups


def _best_fill(weights: Sequence[float], limit: float, count: int) -> list[list[int]] | None:
    """Fill one group after another as full as one or two more members can; None if `count` groups do not suffice."""
    left = [(weights[index], -index) for index in reversed(_heaviest_first(weights))]  # the lightest first
    groups: list[list[int]] = []
    while left:
        if len(groups) == count:
            return None
        weight, index = left.pop()
        group, room = [-index], limit - weight
        while left and left[0][0] <= room:
            heaviest = bisect_right(left, (room, 1)) - 1
            two = _heaviest_two(left, heaviest, room)
            many_fit = room > 3 * left[heaviest][0] or two is None
            for place in [heaviest] if many_fit or two is None else two:
                weight, index = left.pop(place)
                group.append(-index)
                room -= weight
        groups.append(group)
    return groups


def _heaviest_two(left: list[tuple[float, int]], last: int, room: float) -> tuple[int, int] | None:
    """Find the two places up to `last` with the most weight that fits, the later first; None if one alone is more."""
    best, found, first = left[last][0], None, 0
    while first < last:
        weight = left[first][0] + left[last][0]
        if weight > room:
            last -= 1
            continue
        if weight > best:
            best, found = weight, (last, first)
        first += 1
    return found


def _divided_anew(weights: Sequence[float], groups: list[list[int]], near_enough: float) -> list[list[int]]:
    """Divide the heaviest group and a lighter one anew, as evenly as possible, for as long as that helps."""
    groups = list(groups)
    totals = [sum(weights[index] for index in group) for group in groups]
    for _ in range(_DIVISIONS):
        heaviest = max(range(len(groups)), key=totals.__getitem__)
        if totals[heaviest] <= near_enough:
            break
        for other in sorted(range(len(groups)), key=totals.__getitem__):
            members = groups[heaviest] + groups[other]
            if other == heaviest or len(members) > _MOST_MEMBERS:
                continue
            sums = [0.0]  # of every subset: bit i of its place says whether it has member i
            for index in members:
                sums += [each + weights[index] for each in sums]
            both = totals[heaviest] + totals[other]
            subset = min(range(len(sums)), key=lambda place, half=both / 2: abs(sums[place] - half))  # type: ignore[misc]
            if max(sums[subset], both - sums[subset]) < totals[heaviest] * (1 - 1e-9):
                parts = [[m for i, m in enumerate(members) if subset >> i & 1 == side] for side in (1, 0)]
                groups[heaviest], groups[other] = parts
                totals[heaviest], totals[other] = sums[subset], both - sums[subset]
                break
        else:
            break
    return groups


def _split_to(groups: list[list[int]], count: int) -> list[list[int]]:
    """Halve the group with the most members until there are `count`; some stay empty without enough members."""
    groups = list(groups)
    while len(groups) < count:
        most = max(range(len(groups)), key=lambda number: len(groups[number]), default=-1)
        if most < 0 or len(groups[most]) < 2:
            return groups + [[] for _ in range(count - len(groups))]
        group = groups[most]
        middle = (len(group) + 1) // 2
        groups[most : most + 1] = [group[:middle], group[middle:]]
    return groups


def _heaviest_first(weights: Sequence[float]) -> list[int]:
    return sorted(range(len(weights)), key=lambda index: (-weights[index], index))


def _heaviest(groups: list[list[int]], weights: Sequence[float]) -> float:
    return max((sum(weights[index] for index in group) for group in groups), default=0.0)


def _rounded_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
