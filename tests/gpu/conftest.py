"""The device of the tests that need a GPU, and a process group on it.

Without a GPU they are skipped. `ORPO_RAY_GPU_TESTS_ON=cpu` runs their code on the CPU instead, to find errors while
they are written; what only a GPU can show is then not checked.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

DEVICE = os.environ.get("ORPO_RAY_GPU_TESTS_ON", "cuda")
MOST_SECONDS = 60  # of a test on a GPU


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let a test that takes too long on a GPU fail. A CPU is slower."""
    if DEVICE == "cuda":
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(pytest.mark.timeout(MOST_SECONDS))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    # Here and not in a fixture: pytest then sums up all tests in one line.
    if DEVICE == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU on this machine; run `make gpu` on one that has an NVIDIA GPU")


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The first GPU."""
    return torch.device(DEVICE)


@pytest.fixture(scope="session")
def dtype(device: torch.device) -> torch.dtype:
    """The type of weights on the device: bfloat16 on a GPU."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


@pytest.fixture(scope="session")
def process_group(device: torch.device, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A group of this process alone, as DeepSpeed needs it."""
    import torch.distributed as dist

    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}.items():
            patch.setenv(name, value)
        store = dist.FileStore(str(tmp_path_factory.mktemp("group") / "store"), 1)
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
        yield
        dist.destroy_process_group()
