"""A worker saves its state while its stream waits for something that never comes, such as a lost worker."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from support.gpu_training import Training, recipe_on

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("process_group")]


def test_a_save_does_not_wait_for_what_is_queued_after_the_update(device: torch.device, tmp_path: Path) -> None:
    training = Training(recipe_on(device), device)
    training.losses(2)
    training.engine.save(tmp_path / "before")
    end = None
    if device.type == "cuda":
        torch.cuda._sleep(20_000_000_000)  # cycles: some 10 seconds
        end = torch.cuda.Event()
        end.record()
    assert training.engine.save_alone(tmp_path / "alone", updates=2)
    assert end is None or not end.query(), "it waited"
    before, alone = [torch.load(tmp_path / name / "engine" / "replicated.pt") for name in ("before", "alone")]
    torch.testing.assert_close(alone, before, rtol=0, atol=0, check_device=False)
    training.close()
