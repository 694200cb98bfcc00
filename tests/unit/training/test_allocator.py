"""The allocator's settings of a worker."""

from __future__ import annotations

import os

import pytest

from orpo_ray.training.worker_start import prefer_expandable_segments

NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")


@pytest.mark.parametrize("name", [None, *NAMES])
def test_segments_expand_unless_the_user_configured_the_allocator(
    name: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for each in NAMES:
        monkeypatch.delenv(each, raising=False)
    if name is not None:
        monkeypatch.setenv(name, "max_split_size_mb:128")
    before = {each: os.environ.get(each) for each in NAMES}
    prefer_expandable_segments()
    expected = before if name is not None else before | {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    assert {each: os.environ.get(each) for each in NAMES} == expected
