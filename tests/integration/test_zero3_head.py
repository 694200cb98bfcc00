"""The chunked output head under ZeRO-3: workers and steps have different numbers of chunks, and few gathers."""

from __future__ import annotations

import pytest

from support.worker_group import worker_group
from support.zero3_head import LENGTHS, train

# Untied, tied and adapted heads, and how often a step gathers the weight: for forward and backward. A tied weight is
# gathered as often for the embedding. ZeRO-3 keeps nothing between uses here.
CASES = [("llava", False, 2), ("smolvlm", False, 4), ("llava", True, 2)]


@pytest.mark.parametrize(
    ("family", "lora", "gathers"),
    [CASES[1], *(pytest.param(*case, marks=pytest.mark.nightly) for case in (CASES[0], CASES[2]))],
    ids=["tied", "untied", "adapted"],
)
def test_gives_the_losses_of_one_worker(family: str, lora: bool, gathers: int) -> None:
    one = worker_group(1).run(train, family, lora, 0)[0]
    for two in worker_group(2).run(train, family, lora, 3):
        assert [line[2:4] for line in two] == [[gathers, 0]] * len(LENGTHS)
        assert [line[4] for line in two] == [False] + [True] * (len(LENGTHS) - 1)  # the first step records the trace
        for (loss, norm), line in zip(one, two, strict=True):
            assert line[0] == pytest.approx(loss, abs=1e-4)
            assert line[1] == pytest.approx(norm, rel=1e-3)
