"""A run that many tests compare with."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.runs import run
from support.tiny_runs import LONG, losses, tiny_recipe


@pytest.fixture(scope="session")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the reference and of the runs that are compared with it."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="session")
def reference(ray_cluster: None, storage: Path) -> dict[int, float]:
    """Losses of an uninterrupted run with one worker and without ZeRO, which every other run must reproduce."""
    return losses(Path(run(tiny_recipe(storage, "reference", optim=LONG)).run_uri))
