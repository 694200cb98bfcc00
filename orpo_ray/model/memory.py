"""Free what models that are no longer used leave in memory."""

from __future__ import annotations

import gc

import torch


def free_memory() -> None:
    """Free models that refer to themselves, as those with replaced forward passes or stacked adapters do."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
