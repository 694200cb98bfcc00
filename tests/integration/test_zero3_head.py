"""The chunked head under ZeRO-3: workers with unlike numbers of answers, every chunk gathering the head's weight."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
import torch.multiprocessing as mp

from support.zero3_head import STEPS, train


@pytest.mark.timeout(300)
@pytest.mark.parametrize("family", ["llava", "smolvlm"], ids=["untied", "tied"])
def test_gives_the_losses_of_one_worker(family: str, tmp_path: Path) -> None:
    lines = {}
    for num_workers, stage in ((1, 0), (2, 3)):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        out = tmp_path / f"{num_workers}.json"
        mp.spawn(train, (num_workers, port, family, stage, str(out)), num_workers)
        lines[num_workers] = json.loads(out.read_text())
    assert [chunks for _, _, chunks in lines[2]] == [4] * STEPS
    for one, two in zip(lines[1], lines[2], strict=True):
        assert two[0] == pytest.approx(one[0], abs=1e-4)
        assert two[1] == pytest.approx(one[1], rel=1e-3)
