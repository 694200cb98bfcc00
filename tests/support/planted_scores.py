"""Tables of pair scores with known accuracies."""

from __future__ import annotations

import numpy as np
import pyarrow as pa


def planted(count: int, accuracy: float, exchanged: float | None = None, seed: int = 0) -> pa.Table:
    """Return scores of a model with these accuracies, with its own and with exchanged images."""
    rng = np.random.default_rng(seed)
    correct = rng.random(count) < accuracy
    margins = np.where(correct, 1, -1) * rng.gamma(2, 0.2, count)
    table = {
        "sample_index": np.arange(count),
        "id": [f"pair-{each}" for each in range(count)],
        "prompt_tokens": rng.integers(20, 40, count),
        "chosen_tokens": rng.integers(2, 40, count),
        "rejected_tokens": rng.integers(2, 40, count),
        "correct": correct,
        "rewards/margins": margins,
        "nll_loss": rng.gamma(2, 0.4, count),
        "log_odds_chosen": 3 * margins,
    }
    if exchanged is not None:
        table["exchanged/correct"] = rng.random(count) < exchanged
        table["exchanged/rewards/margins"] = rng.normal(size=count) / 4
    return pa.table(table)
