"""The scheduling loop of Ray Data cannot spin."""

from __future__ import annotations

import time

from orpo_ray.streaming.pacing import SECONDS_PER_TURN, PacedLoop


def test_turns_without_work_take_their_time() -> None:
    loop = PacedLoop()
    begun = time.monotonic()
    for _ in range(5):
        loop.on_execution_step(None)  # type: ignore[arg-type]
    assert time.monotonic() - begun >= 5 * SECONDS_PER_TURN * 0.99
