"""The stream on a real Ray cluster: every pair once, in the same steps for any number of workers, from any position."""

from __future__ import annotations

import json
import weakref
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from ray.data._internal.cluster_autoscaler import get_or_create_autoscaling_coordinator

from orpo_ray.data.balance import Packing, PairSize, StepShare, StepTotals
from orpo_ray.data.encoding import EncoderSpec
from orpo_ray.data.order import Order
from orpo_ray.data.reading import ReadSpec
from orpo_ray.data.shards import list_file_shards
from orpo_ray.errors import UserError
from orpo_ray.streaming.steps import feed_actor, iter_shares, open_feed, take_from
from support.counted_reads import bytes_read, counted
from support.tiny_runs import write_pairs, write_ranked

pytestmark = pytest.mark.usefixtures("ray_cluster")

ENCODER = EncoderSpec("orpo-ray/tiny-smolvlm", None, 128)
PER_STEP, STEPS = 8, 13
PACKING = Packing(4096, "shared_prefix")


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> ReadSpec:
    """50 rows in windows of 16, three of them bad, for two epochs, each with the image of another pair."""
    folder = tmp_path_factory.mktemp("stream")
    path = write_pairs(folder, 50)
    lines = path.read_text().splitlines()
    lines[7] = "{broken"
    lines[20] = json.dumps(json.loads(lines[20]) | {"images": ["images/none.png"]})
    lines[33] = json.dumps(json.loads(lines[33]) | {"rejected": ""})
    path.write_text("\n".join(lines))
    (shard,) = list_file_shards(str(path), "data.train")
    return ReadSpec((shard,), ("trl",), Order((50,), 3, 16), PER_STEP, 0, 100, other_image="exchange")


def steps_of(spec: ReadSpec, first: int = 0) -> list[StepShare]:
    feed = open_feed(replace(spec, first_sample=first * PER_STEP), ENCODER, max_encoders=1)
    return list(iter_shares(feed, PACKING, first, STEPS))


def ids(share: StepShare) -> list[str]:
    return [pair.id for pair in sorted(share.pairs, key=lambda pair: pair.sample_index)]


def other_pixels(*shares: StepShare) -> dict[str, bytes | None]:
    """The other image of each pair. A pair whose partner cannot be loaded has none."""
    pairs = sorted((pair for share in shares for pair in share.pairs), key=lambda pair: pair.id)
    prompts = {pair.id: pair.other_prompt for pair in pairs}
    return {name: prompt.images["pixel_values"].tobytes() if prompt else None for name, prompt in prompts.items()}


def test_each_epoch_has_every_good_pair_once_and_every_bad_row_once(spec: ReadSpec) -> None:
    sample_indices: dict[int, str] = {}
    for share in steps_of(spec):
        for pair in share.pairs:
            assert pair.sample_index // PER_STEP == share.step
            sample_indices[pair.sample_index] = pair.id
        for record in share.bad:
            assert record.sample_index // PER_STEP == share.step
            sample_indices[record.sample_index] = record.reason
    assert sorted(sample_indices) == list(range(100))
    bad = ["malformed_row", "missing_image", "empty_response"]
    for epoch in (0, 1):
        names = [name for sample_index, name in sample_indices.items() if sample_index // 50 == epoch]
        assert sorted(name for name in names if name in bad) == sorted(bad)
        assert len(set(names)) == 50
    assert [sample_indices[sample_index] for sample_index in range(50)] != [
        sample_indices[sample_index + 50] for sample_index in range(50)
    ]


def test_two_workers_divide_the_same_steps(spec: ReadSpec) -> None:
    """Both take from one feed, and the second worker is two steps behind the first."""
    feed = feed_actor(spec, ENCODER, num_workers=2, max_encoders=1)
    iterators = [iter_shares(partial(take_from, feed, rank), PACKING, 0, STEPS) for rank in (0, 1)]
    first = [next(iterators[0]), next(iterators[0])]
    shares = list(zip([*first, *iterators[0]], iterators[1], strict=True))
    for step, (one, two) in zip(steps_of(spec), shares, strict=True):
        assert sorted(ids(one) + ids(two)) == sorted(ids(step))
        assert other_pixels(one, two) == other_pixels(step)
        assert sum(pixels is None for pixels in other_pixels(step).values()) <= 1
        assert len(one.microbatches) == len(two.microbatches)
        sizes = [PairSize.of(pair) for pair in step.pairs]
        for share in (one, two):
            assert (share.step, share.totals, share.bad) == (step.step, StepTotals.of(sizes), step.bad)
        tokens = [sum(PairSize.of(pair).packed for pair in share.pairs) for share in (one, two)]
        assert max(tokens) - min(tokens) <= max(size.packed for size in sizes)


def test_workers_that_compute_together_take_the_same_pairs(spec: ReadSpec) -> None:
    """Four workers in groups of two: the first two have what the first of two workers would have."""
    feed = feed_actor(spec, ENCODER, num_workers=4, max_encoders=1, together=2)
    shares = [next(iter_shares(partial(take_from, feed, rank), PACKING, 0, 1)) for rank in range(4)]
    assert ids(shares[0]) == ids(shares[1])
    assert ids(shares[2]) == ids(shares[3])
    assert sorted(ids(shares[0]) + ids(shares[2])) == sorted(ids(steps_of(spec)[0]))


@pytest.mark.parametrize("first", [6, *(pytest.param(step, marks=pytest.mark.nightly) for step in (1, 12))])
def test_a_resumed_stream_is_the_tail_of_the_whole_one(spec: ReadSpec, first: int) -> None:
    whole, tail = steps_of(spec), steps_of(spec, first)
    assert [ids(share) for share in tail] == [ids(share) for share in whole[first:]]
    assert [other_pixels(share) for share in tail] == [other_pixels(share) for share in whole[first:]]


@pytest.mark.parametrize("workers", [1, pytest.param(4, marks=pytest.mark.nightly), 16])
def test_each_byte_is_read_once_for_any_number_of_workers(workers: int, tmp_path: Path) -> None:
    """320 rows of two kilobytes in row groups of 40, in windows of 64; all workers take all steps."""
    folder = tmp_path / "data"
    folder.mkdir()
    random = np.random.default_rng(0)
    row = {"prompt": "what is there?", "chosen": "a red circle", "rejected": "a blue square", "images": []}
    rows = [row | {"id": f"{number}-{random.bytes(1000).hex()}"} for number in range(320)]
    pq.write_table(pa.Table.from_pylist(rows), folder / "a.parquet", row_group_size=40, compression="none")
    shards = tuple(list_file_shards(str(folder / "a.parquet"), "data.train"))
    order = Order(tuple(shard.num_rows for shard in shards), 3, 64)
    spec = counted(ReadSpec(shards, ("trl",) * len(shards), order, 32, 0, 320), folder)
    bytes_read(folder)
    feed = feed_actor(spec, ENCODER, num_workers=workers, max_encoders=1)
    portions = [take_from(feed, rank, step, PACKING) for step in range(10) for rank in range(workers)]
    assert sum(len(each) for portion in portions for each in portion.places) == 320
    assert 0.9 <= bytes_read(folder) / (folder / "a.parquet").stat().st_size <= 1.1


@pytest.fixture(scope="module")
def ranked(tmp_path_factory: pytest.TempPathFactory) -> ReadSpec:
    """24 rows about eight images, of four rated answers each, in windows of 16; a row and an answer are bad."""
    path = write_ranked(tmp_path_factory.mktemp("ranked"), 24, images=8)
    lines = path.read_text().splitlines()
    lines[5] = lines[5].replace("answer 5 1", " ")
    lines[11] = "{broken"
    path.write_text("\n".join(lines))
    (shard,) = list_file_shards(str(path), "data.train")
    order = Order((24,), 3, 16)
    return ReadSpec((shard,), ("vlfeedback",), order, PER_STEP, 0, 48, group=True, pairs_from_ranking="all")


def test_pairs_of_ranked_rows_reach_every_worker_as_trees(ranked: ReadSpec) -> None:
    """Two epochs, for one worker and for two, and from the middle of a window."""
    packing = replace(PACKING, shares="images")
    feeds = {workers: feed_actor(ranked, ENCODER, num_workers=workers, max_encoders=1) for workers in (1, 2)}
    alone = list(iter_shares(partial(take_from, feeds[1], 0), packing, 0, 6))
    both = [list(iter_shares(partial(take_from, feeds[2], rank), packing, 0, 6)) for rank in (0, 1)]
    resumed = feed_actor(replace(ranked, first_sample=PER_STEP), ENCODER, num_workers=1, max_encoders=1)
    tail = list(iter_shares(partial(take_from, resumed, 0), packing, 1, 6))
    for step, (share, one, two) in enumerate(zip(alone, *both, strict=True)):
        names = sorted(pair.id for pair in share.pairs)
        assert sorted(pair.id for each in (one, two) for pair in each.pairs) == names
        assert {pair.sample_index // PER_STEP for pair in share.pairs} == {step}
        assert share.totals.pairs == len(names)
        assert share.bad == one.bad == two.bad
        if step:
            assert sorted(pair.id for pair in tail[step - 1].pairs) == names
        # Rows about one image follow each other, and are computed together.
        batches = [*one.microbatches, *two.microbatches]
        images = [{pair.images["pixel_values"].tobytes() for pair in each} for each in batches]
        assert sum(map(len, images)) == len(set().union(*images))
    names = sorted(pair.id for share in alone for pair in share.pairs)
    assert len(names) == 2 * (22 * 6 + 3)
    assert len(set(names)) == 22 * 6 + 3
    assert sorted(bad.reason for share in alone for bad in share.bad) == ["empty_response"] * 6 + ["malformed_row"] * 2
    assert len({pair.images["pixel_values"].tobytes() for share in alone[:2] for pair in share.pairs}) <= 8


def test_a_processor_that_cannot_be_loaded_is_said_as_itself(spec: ReadSpec, tmp_path: Path) -> None:
    broken = replace(ENCODER, model_id=str(tmp_path))
    feed = feed_actor(spec, broken, num_workers=2, max_encoders=1)
    for rank in (0, 1):  # the second worker too, although the pipeline has ended with the error
        with pytest.raises(UserError, match="the processor cannot be loaded") as caught:
            take_from(feed, rank, 0, PACKING)
        assert type(caught.value) is UserError  # not Ray's subclass of it, whose text is a traceback


def test_a_lost_feed_is_an_error_of_every_worker_and_not_of_the_user(spec: ReadSpec) -> None:
    feed = feed_actor(spec, ENCODER, num_workers=2, max_encoders=1)
    take_from(feed, 0, 0, PACKING)
    ray.kill(feed)
    for rank in (0, 1):
        with pytest.raises(ray.exceptions.RayActorError):
            take_from(feed, rank, 1, PACKING)


def test_a_restarted_feed_has_the_room_of_the_killed_one(spec: ReadSpec) -> None:
    """Ray keeps the room of a killed pipeline for minutes; others have what is left, at last too little to encode."""
    rows = replace(spec, end_sample=50_000).of_run("restarted")
    coordinator: Any = get_or_create_autoscaling_coordinator()

    def rooms() -> set[str]:
        kept: set[str] = ray.get(coordinator.__ray_call__.remote(lambda actor: set(actor._ongoing_reqs)))
        return kept

    before = rooms()
    for _ in range(3):
        feed = feed_actor(rows, ENCODER, num_workers=2, max_encoders=1)
        take_from(feed, 0, 0, PACKING)
        ray.kill(feed)
    assert rooms() - before == {f"data-dataset_{rows.pipeline}_0"}


def test_a_step_leaves_nothing_in_memory(spec: ReadSpec) -> None:
    shares = iter_shares(open_feed(spec, ENCODER, max_encoders=1), PACKING, 0, STEPS)
    share = next(shares)
    pairs = [weakref.ref(pair) for pair in share.pairs]
    assert pairs
    del share
    assert not any(pair() for pair in pairs)
