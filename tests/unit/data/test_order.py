"""Order of the rows, tested by its properties."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from orpo_ray.data.order import Order, step_samples, total_samples

shards = st.lists(st.integers(0, 30), min_size=1, max_size=8).filter(lambda sizes: sum(sizes) > 0)
seeds = st.none() | st.integers(0, 5)


def epoch_rows(order: Order, epoch: int) -> list[tuple[int, int]]:
    rows = []
    for number in range(order.windows_per_epoch):
        window = order.window(epoch, number)
        assert window.first_sample == epoch * order.num_rows + len(rows)
        rows += [(int(shard), int(row)) for shard, row in window.rows]
    return rows


@given(shards, seeds, st.integers(1, 40), st.integers(0, 3))
def test_an_epoch_holds_every_row_once(sizes: list[int], seed: int | None, window: int, epoch: int) -> None:
    order = Order(tuple(sizes), seed, window)
    everything = [(shard, row) for shard, size in enumerate(sizes) for row in range(size)]
    rows = epoch_rows(order, epoch)
    assert sorted(rows) == everything
    if seed is None:
        assert rows == everything


mixes = st.lists(
    st.tuples(st.lists(st.integers(0, 12), min_size=1, max_size=4), st.sampled_from([0.2, 0.5, 1.0, 1.3, 2.0, 3.0])),
    min_size=1,
    max_size=3,
).filter(lambda mix: all(sum(sizes) for sizes, _ in mix))


@given(mixes, seeds, st.integers(1, 20))
def test_weighted_sources_repeat_no_row_before_all_were_used(
    mix: list[tuple[list[int], float]], seed: int | None, window: int
) -> None:
    sizes = [size for sizes, _ in mix for size in sizes]
    source_of = [source for source, (sizes, _) in enumerate(mix) for _ in sizes]
    order = Order(tuple(sizes), seed, window, tuple(source_of), tuple(weight for _, weight in mix))
    seen: dict[tuple[int, int], int] = {(shard, row): 0 for shard, size in enumerate(sizes) for row in range(size)}
    for epoch in range(4):
        rows = epoch_rows(order, epoch)
        assert len(rows) == order.num_rows
        for row in rows:
            seen[row] += 1
        for source, (own, weight) in enumerate(mix):
            counts = [count for (shard, _), count in seen.items() if source_of[shard] == source]
            assert sum(counts) == (epoch + 1) * max(1, round(sum(own) * weight))
            assert max(counts) - min(counts) <= 1


def test_a_fractional_weight_selects_random_rows() -> None:
    order = Order((1000,), 0, 1000, (0,), (0.1,))
    rows = [row for _, row in epoch_rows(order, 0)]
    assert max(rows) > 900
    assert min(rows) < 100
    ordered = Order((1000,), None, 1000, (0,), (0.1,))
    assert [row for _, row in epoch_rows(ordered, 1)] == list(range(100, 200))


def test_epochs_and_seeds_differ_and_repeat() -> None:
    order = Order((50, 50), 0, 40)
    assert epoch_rows(order, 0) == epoch_rows(Order((50, 50), 0, 40), 0)
    assert epoch_rows(order, 0) != epoch_rows(order, 1)
    assert epoch_rows(order, 0) != epoch_rows(Order((50, 50), 1, 40), 0)


@given(shards, st.integers(1, 20), st.data())
def test_windows_cover_any_range_of_samples(sizes: list[int], window: int, data: st.DataObject) -> None:
    order = Order(tuple(sizes), 0, window)
    first = data.draw(st.integers(0, 3 * order.num_rows))
    last = data.draw(st.integers(first, 4 * order.num_rows))
    sample_indices: list[int] = []
    for epoch, number in order.windows(first, last):
        found = order.window(epoch, number)
        sample_indices += range(found.first_sample, found.first_sample + len(found.rows))
    assert (
        sample_indices == list(range(sample_indices[0], sample_indices[0] + len(sample_indices)))
        if sample_indices
        else first == last
    )
    assert set(range(first, last)) <= set(sample_indices)


def test_steps_cross_epochs_and_the_last_step_can_be_smaller() -> None:
    sample_indices = total_samples(num_rows=10, epochs=2.5, pairs_per_step=8, max_steps=None)
    assert sample_indices == 25
    assert [step_samples(step, 8, sample_indices) for step in range(5)] == [
        (0, 8),
        (8, 16),
        (16, 24),
        (24, 25),
        (25, 25),
    ]
    assert total_samples(10, 2.5, 8, max_steps=2) == 16
