"""A step's pairs are distributed over workers once each, within the budget, and evenly."""

from __future__ import annotations

from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orpo_ray.data.balance import Microbatches, Packing, PairSize, distribute
from orpo_ray.data.sharing import Use


def of_tokens(prompt: int, chosen: int, rejected: int, image_values: int = 0) -> PairSize:
    return PairSize(prompt, prompt - 1, chosen, rejected, 0, image_values)


def tokens_of(found: Microbatches, sizes: list[PairSize], packing: Packing) -> np.ndarray:
    """Return the tokens of each worker's micro-batches, [W, K]."""
    return np.array([[packing.tokens([sizes[index] for index in each]) for each in worker] for worker in found])


tokens = st.integers(1, 50)
steps = st.lists(st.builds(of_tokens, tokens, tokens, tokens, st.integers(0, 300)), max_size=20)
layouts = st.sampled_from(["shared_prefix", "concatenated"])


@given(steps, st.integers(1, 5), st.integers(1, 400), layouts, st.sampled_from([0.0, 0.3]))
def test_every_pair_once_within_the_budget_and_equally_many_micro_batches(
    sizes: list[PairSize], workers: int, budget: int, layout: str, vision: float
) -> None:
    packing = Packing(budget, layout, vision)  # type: ignore[arg-type]
    found = distribute(sizes, workers, packing)
    assert sorted(index for worker in found for each in worker for index in each) == list(range(len(sizes)))
    assert len(found) == workers
    assert len({len(worker) for worker in found}) == 1
    for each in (each for worker in found for each in worker):
        assert len(each) <= 1 or packing.tokens([sizes[index] for index in each]) <= budget
    assert distribute(list(sizes), workers, packing) == found
    works = [[packing.work([sizes[index] for index in each]) for each in worker] for worker in found]
    for before, after in zip(zip(*works, strict=True), list(zip(*works, strict=True))[1:], strict=False):
        assert min(before) >= max(after)  # micro-batches of similar size run together, the largest first


def test_as_few_micro_batches_as_fit() -> None:
    """Ten pairs of 6 tokens in rows of 18: four rows for one worker, two for each of two, one for each of four."""
    sizes = [of_tokens(2, 2, 2)] * 10
    packing = Packing(18, "shared_prefix")
    assert [len(distribute(sizes, workers, packing)[0]) for workers in (1, 2, 4)] == [4, 2, 1]
    assert distribute([], 2, packing) == [[], []]


def test_evening_out_never_breaks_the_budget() -> None:
    """Always adding to the smallest of six rows would take less time, but make one of 21 tokens."""
    lengths = [9] * 6 + [6] * 7 + [3]
    sizes = [of_tokens(length // 3, length // 3, length // 3) for length in lengths]
    packing = Packing(18, "shared_prefix")
    assert tokens_of(distribute(sizes, 2, packing), sizes, packing).max() <= 18


@pytest.mark.parametrize(("workers", "pairs", "most"), [(8, 16, 1.01), (8, 64, 1.005), (64, 2, 1.09)])
def test_no_worker_waits_long_for_the_largest_micro_batch(workers: int, pairs: int, most: float) -> None:
    """Lengths are spread like those of real answers. Always adding to the least work so far would give 1.17 at 64."""
    rng = np.random.default_rng(0)
    percentiles, of_real = [0, 5, 25, 50, 75, 95, 100], [365, 441, 523, 598, 708, 894, 1171]
    lengths = np.interp(100 * rng.random(workers * pairs), percentiles, of_real).astype(int)
    sizes = [of_tokens(320, length - 330, 10) for length in lengths.tolist()]
    packing = Packing(4096, "shared_prefix")
    tokens = tokens_of(distribute(sizes, workers, packing), sizes, packing)
    assert tokens.max(0).sum() * workers / tokens.sum() <= most


def test_the_distribution_into_few_groups_is_the_best_one() -> None:
    """Compared with all distributions of seven pairs over three workers."""
    rng = np.random.default_rng(1)
    packing = Packing(4096, "shared_prefix")
    for _ in range(3):
        sizes = [of_tokens(int(length), 1, 1) for length in rng.integers(50, 200, 7)]
        best = min(
            max(
                sum(size.packed for size, each in zip(sizes, workers, strict=True) if each == worker)
                for worker in range(3)
            )
            for workers in product(range(3), repeat=len(sizes))
        )
        assert tokens_of(distribute(sizes, 3, packing), sizes, packing).max() <= 1.01 * best


def test_vision_work_counts() -> None:
    """One image is worth 100 tokens: the pair with it is alone, although it is the shortest."""
    sizes = [of_tokens(10, 1, 1, image_values=1000), *[of_tokens(30, 5, 5)] * 3]
    found = distribute(sizes, 2, Packing(4096, "shared_prefix", tokens_per_image_value=0.1))
    assert sorted(worker[0] for worker in found) == [[0], [1, 2, 3]]
    by_tokens = distribute(sizes, 2, Packing(4096, "shared_prefix"))
    assert sorted(map(len, (worker[0] for worker in by_tokens))) == [2, 2]


def test_pairs_of_similar_length_are_padded_together() -> None:
    sizes = [of_tokens(length, 1, 1) for length in (10, 40, 11, 41)]
    found = distribute(sizes, 1, Packing(2 * 2 * 42, "concatenated"))
    assert found == [[[1, 3], [0, 2]]]


def in_tree(root: int, prompt: int, chosen: int, rejected: int, tokens: int = 5) -> PairSize:
    """A pair whose image and answers have these numbers; every part has as many tokens."""
    keys = (root, 100 * root + prompt)
    uses = tuple(
        Use(tokens, keys[0], 2 * tokens, keys[1], tokens, 10_000 * keys[1] + answer, tokens)
        for answer in (chosen, rejected)
    )
    return PairSize(2 * tokens, tokens, tokens, tokens, 0, tokens, uses=uses)


pairs_of_trees = st.lists(st.builds(in_tree, *[st.integers(1, 4)] * 4), max_size=20)


@given(
    pairs_of_trees,
    st.integers(1, 5),
    st.integers(1, 200),
    st.sampled_from([0.0, 0.3]),
    st.sampled_from(["prompts", "images"]),
)
def test_trees_stay_within_the_budget(
    sizes: list[PairSize], workers: int, budget: int, vision: float, shares: str
) -> None:
    packing = Packing(budget, "shared_prefix", vision, shares)  # type: ignore[arg-type]
    found = distribute(sizes, workers, packing)
    assert sorted(index for worker in found for each in worker for index in each) == list(range(len(sizes)))
    assert len({len(worker) for worker in found}) == 1
    for each in (each for worker in found for each in worker):
        assert len(each) <= 1 or packing.tokens([sizes[index] for index in each]) <= budget
    # Where there are as many trees as workers, and room for each of them, none is divided.
    roots = [size.uses[0].prefix_key if shares == "images" else size.uses[0].prompt_key for size in sizes]
    whole = [[index for index, each in enumerate(roots) if each == root] for root in dict.fromkeys(roots)]
    if len(whole) >= workers and all(packing.tokens([sizes[index] for index in tree]) <= budget for tree in whole):
        together = [{roots[index] for index in each} for worker in found for each in worker]
        assert sum(map(len, together)) == len(whole)


def test_a_tree_counts_once() -> None:
    """Six pairs of four answers: 10 tokens of prompt and 4 * 5 of answers, instead of 6 * 20."""
    sizes = [in_tree(1, 1, better, worse) for better, worse in combinations(range(4), 2)]
    packing = Packing(30, "shared_prefix", 1.0, "images")
    assert (packing.tokens(sizes), packing.work(sizes)) == (30, 35)
    assert distribute(sizes, 1, packing) == [[list(range(6))]]
    assert Packing(30, "shared_prefix").tokens(sizes) == 120
    small = distribute(sizes, 1, Packing(25, "shared_prefix", shares="images"))
    assert [packing.tokens([sizes[index] for index in each]) for each in small[0]] == [25, 25, 20]


def test_a_worker_has_half_of_a_tree_rather_than_none() -> None:
    sizes = [in_tree(1, 1, better, worse) for better, worse in combinations(range(4), 2)]
    found = distribute(sizes, 4, Packing(100, "shared_prefix", shares="images"))
    assert sorted(len(worker[0]) for worker in found) == [1, 1, 2, 2]


def test_sizes_are_sent_as_numbers() -> None:
    size = in_tree(1, 2, 3, 4)
    assert PairSize.from_numbers(size.numbers) == size
    assert PairSize.from_numbers(of_tokens(1, 2, 3).numbers) == of_tokens(1, 2, 3)
