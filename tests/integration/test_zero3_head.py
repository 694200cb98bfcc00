"""The chunked output head under ZeRO-3: workers have different numbers of chunks, and each chunk gathers the weight."""

from __future__ import annotations

import pytest

from support.worker_group import worker_group
from support.zero3_head import STEPS, train


@pytest.mark.parametrize("family", ["llava", "smolvlm"], ids=["untied", "tied"])
def test_gives_the_losses_of_one_worker(family: str) -> None:
    lines = {workers: worker_group(workers).run(train, family, stage)[0] for workers, stage in ((1, 0), (2, 3))}
    assert [chunks for _, _, chunks in lines[2]] == [4] * STEPS
    for one, two in zip(lines[1], lines[2], strict=True):
        assert two[0] == pytest.approx(one[0], abs=1e-4)
        assert two[1] == pytest.approx(one[1], rel=1e-3)
