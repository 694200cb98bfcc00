"""When an update counts as skipped, and when a run ends because it diverges."""

from __future__ import annotations

import math
import pickle

import pytest
import torch

from orpo_ray.training.divergence import (
    MAX_HIGH,
    MAX_SKIPPED,
    DivergenceGuard,
    TrainingDiverged,
    all_finite,
    skipped_message,
)


def test_skipped_updates_are_counted_and_forgiven_after_a_good_step() -> None:
    guard = DivergenceGuard()
    assert not guard.observe(1, 2.0, 1.0)
    for step in range(2, 2 + 3 * MAX_SKIPPED):
        is_bad = step % MAX_SKIPPED != 0
        assert guard.observe(step, math.nan if is_bad else 2.0, math.inf if is_bad else 1.0) == is_bad
        assert guard.is_healthy != is_bad
    assert guard.skipped == 3 * (MAX_SKIPPED - 1)
    assert guard.first_loss == 2.0


@pytest.mark.parametrize("norm", [math.nan, math.inf])
def test_too_many_skipped_updates_in_a_row_end_the_run(norm: float) -> None:
    guard = DivergenceGuard()
    for step in range(1, MAX_SKIPPED):
        guard.observe(step, math.nan, norm)
    with pytest.raises(TrainingDiverged, match=f"{MAX_SKIPPED} steps in a row, the last one step {MAX_SKIPPED}") as end:
        guard.observe(MAX_SKIPPED, math.nan, norm)
    assert "fix: lower optim.learning_rate" in str(pickle.loads(pickle.dumps(end.value)))


@pytest.mark.parametrize(("first", "limit"), [(8.0, 40.0), (0.1, 5.0)])  # below 1, the loss counts as 1
def test_a_loss_that_stays_high_ends_the_run(first: float, limit: float) -> None:
    guard = DivergenceGuard(first_loss=first)
    for step in range(2, 2 + 2 * MAX_HIGH):
        guard.observe(step, limit, 1.0)
    for step in range(MAX_HIGH - 1):
        guard.observe(step, limit * 1.01, 1.0)
        assert not guard.is_healthy
    with pytest.raises(TrainingDiverged, match="far above that for 20 steps"):
        guard.observe(99, limit * 1.01, 1.0)


def test_the_warning_names_some_pairs() -> None:
    text = skipped_message(1234, ["a", "b", "c", "d", "e"])
    assert text == "step 1,234: the gradient is not finite, so the update was skipped; pairs: a, b, c and 2 more"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_element_that_is_not_finite_is_found(value: float) -> None:
    weights = [torch.ones(3), torch.zeros(0), torch.ones(2, 2, dtype=torch.bfloat16)]
    assert all_finite(weights)
    weights[2][1, 0] = value
    assert not all_finite(weights)
