"""A step's pairs are distributed over workers once each, within the budget, and evenly."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orpo_ray.data.balance import Microbatches, Packing, PairSize, distribute


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
