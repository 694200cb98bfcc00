"""Weighted members in groups of equal weight: pairs of a step in the micro-batches of its workers.

Legend: W workers.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from heapq import heapreplace

# Effort of evening out: how near the best possible is near enough, limits tried, the most members of a group on average
# and in all for which more than one way is tried, groups divided anew, and the most members of two such groups.
_NEAR_ENOUGH = 1.005
_SEARCHES = 12
_FEW_MEMBERS = 3
_FEW_IN_ALL = 1024
_DIVISIONS = 50
_MOST_MEMBERS = 6


def evened_out(weights: Sequence[float], groups: list[list[int]], num_workers: int, most: float) -> list[list[int]]:
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
        if needed > time or heaviest_total(found, weights) > most:
            return False
        best, time = found, needed
        return True

    few_members = len(weights) <= _FEW_MEMBERS * len(groups)
    if improve(_greedy(weights, len(groups))) and not few_members:
        return best
    for fill in (first_fit, _best_fill) if few_members and len(weights) <= _FEW_IN_ALL else (first_fit,):
        low, high = max(heaviest, mean), heaviest_total(best, weights)
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
    for index in heaviest_first(weights):
        total, number = lightest[0]
        groups[number].append(index)
        heapreplace(lightest, (total + weights[index], number))
    return groups


def first_fit(weights: Sequence[float], limit: float, count: int) -> list[list[int]] | None:
    """Add each member, the heaviest first, to the first group with room; None if `count` groups do not suffice."""
    groups: list[list[int]] = []
    free: list[float] = []
    for index in heaviest_first(weights):
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
    left = [(weights[index], -index) for index in reversed(heaviest_first(weights))]  # the lightest first
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


def split_to(groups: list[list[int]], count: int) -> list[list[int]]:
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


def heaviest_first(weights: Sequence[float]) -> list[int]:
    return sorted(range(len(weights)), key=lambda index: (-weights[index], index))


def heaviest_total(groups: list[list[int]], weights: Sequence[float]) -> float:
    return max((sum(weights[index] for index in group) for group in groups), default=0.0)


def rounded_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
