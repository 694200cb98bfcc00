"""The stream on a real Ray: every pair once, in the same steps for any number of workers, from any position."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import write_pairs

from orpo_ray.data.containers import file_segments
from orpo_ray.data.encoding import EncoderSpec
from orpo_ray.data.order import Order
from orpo_ray.data.reading import ReadSpec
from orpo_ray.data.stream import StepShare, iter_steps
from orpo_ray.model.loading import load_processor

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]

ENCODER = EncoderSpec(load_processor, "orpo-ray/tiny-smolvlm", None, 128)
PER_STEP = 8


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> ReadSpec:
    """50 rows in windows of 16, three of them broken, for two epochs."""
    folder = tmp_path_factory.mktemp("stream")
    path = write_pairs(folder, 50)
    lines = path.read_text().splitlines()
    lines[7] = "{broken"
    lines[20] = json.dumps(json.loads(lines[20]) | {"images": ["images/none.png"]})
    lines[33] = json.dumps(json.loads(lines[33]) | {"rejected": ""})
    path.write_text("\n".join(lines))
    (segment,) = file_segments(str(path), "data.train")
    return ReadSpec((segment,), ("trl",), Order((50,), 3, 16), PER_STEP, 0, 100)


def steps_of(spec: ReadSpec, first: int = 0) -> list[StepShare]:
    return list(iter_steps(replace(spec, first_slot=first * PER_STEP), ENCODER, first, 13, max_encoders=1))


def ids(share: StepShare) -> list[str]:
    return [pair.id for pair in share.pairs]


def test_each_epoch_has_every_good_pair_once_and_every_bad_row_once(spec: ReadSpec) -> None:
    slots: dict[int, str] = {}
    for share in steps_of(spec):
        for pair in share.pairs:
            assert pair.slot // PER_STEP == share.step
            slots[pair.slot] = pair.id
        for record in share.bad:
            assert record.slot // PER_STEP == share.step
            slots[record.slot] = record.reason
    assert sorted(slots) == list(range(100))
    bad = ["malformed_row", "missing_image", "empty_response"]
    for epoch in (0, 1):
        names = [name for slot, name in slots.items() if slot // 50 == epoch]
        assert sorted(name for name in names if name in bad) == sorted(bad)
        assert len(set(names)) == 50
    assert [slots[slot] for slot in range(50)] != [slots[slot + 50] for slot in range(50)]


def test_two_workers_share_the_same_steps(spec: ReadSpec) -> None:
    whole = steps_of(spec)
    shares = [steps_of(replace(spec, rank=rank, num_workers=2)) for rank in (0, 1)]
    for step, one, two in zip(whole, *shares, strict=True):
        assert ids(step) == ids(one) + ids(two)


@pytest.mark.parametrize("first", [1, 6, 12])
def test_a_resumed_stream_is_the_tail_of_the_whole_one(spec: ReadSpec, first: int) -> None:
    whole, tail = steps_of(spec), steps_of(spec, first)
    assert [ids(share) for share in tail] == [ids(share) for share in whole[first:]]


def test_a_processor_that_cannot_be_loaded_is_said_as_itself(spec: ReadSpec, tmp_path: Path) -> None:
    broken = replace(ENCODER, model_id=str(tmp_path))
    with pytest.raises(Exception, match="the processor cannot be loaded"):
        next(iter(iter_steps(spec, broken, 0, 13, max_encoders=1)))
