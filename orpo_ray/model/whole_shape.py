"""The shape of a weight, whether or not ZeRO-3 has divided it among the workers."""

from __future__ import annotations

import torch


def whole_shape(weight: torch.Tensor) -> torch.Size:
    """Return the shape of the whole weight. Of a divided one, the tensor itself is empty between uses."""
    shape: torch.Size = getattr(weight, "ds_shape", weight.shape)
    return shape
