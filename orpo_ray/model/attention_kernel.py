"""Choose the kernel that computes attention over a packed row.

There is one choice. Training asks for it in every layer; `orpo-ray plan` asks for the GPU that it plans for.

| kernel | where | what it computes |
|---|---|---|
| `cpu_flash` | CPU | torch's CPU flash kernel, sequence by sequence, written straight into the row |
| `varlen` | CUDA | one flash kernel over all sequences of the row |
| `sdpa_per_sequence` | anywhere | `scaled_dot_product_attention` for each sequence; takes masks, dropout and softcaps |
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch

AttentionKernel = Literal["cpu_flash", "varlen", "sdpa_per_sequence"]

# Flash attention on CUDA: Ampere and later, 16 bits, heads of up to 256 in steps of 8.
_FIRST_CAPABILITY = (8, 0)
_FLASH_DTYPES = (torch.float16, torch.bfloat16)
_LARGEST_HEAD = 256
# Its backward pass refuses heads of 200 to 224 on GPUs with little shared memory, by ranges of capability.
_LITTLE_SHARED_MEMORY = (((8, 6), (8, 9)), ((12, 0), (12, 1)))


@dataclass(frozen=True)
class Hardware:
    """What attention runs on."""

    device_type: str
    """`cpu`, `cuda`, ..., as in `torch.device.type`."""
    capability: tuple[int, int] = (0, 0)
    """CUDA compute capability (major, minor)."""
    has_flash: bool = False
    """Whether this torch was built with flash attention for CUDA."""

    @classmethod
    def of(cls, device: torch.device) -> Hardware:
        """Describe a device of this machine."""
        return _hardware(device.type, device.index)


# What `orpo-ray plan` assumes: every GPU type that it knows has at least this.
PLANNED_GPU = Hardware("cuda", (8, 0), has_flash=True)


def choose_kernel(
    hardware: Hardware,
    dtype: torch.dtype,
    head_dim: int,
    *,
    bidirectional: bool = False,
    softcap: float | None = None,
    dropout: float = 0.0,
) -> AttentionKernel:
    """Choose the fastest kernel that computes this attention exactly.

    A sliding window does not matter: every kernel takes one.

    Args:
        hardware: what the kernel runs on.
        dtype: of queries, keys and values.
        head_dim: size of each head.
        bidirectional: whether some tokens see later ones, which needs a mask.
        softcap: cap on attention scores, if there is one. No flash kernel here applies it.
        dropout: probability of dropping an attention weight.
    """
    if softcap is not None or dropout > 0.0:
        return "sdpa_per_sequence"
    if hardware.device_type == "cpu":
        return "cpu_flash"
    if not bidirectional and _varlen_supports(hardware, dtype, head_dim):
        return "varlen"
    return "sdpa_per_sequence"


def _varlen_supports(hardware: Hardware, dtype: torch.dtype, head_dim: int) -> bool:
    if hardware.device_type != "cuda" or not hardware.has_flash or hardware.capability < _FIRST_CAPABILITY:
        return False
    if 192 < head_dim <= 224 and any(low <= hardware.capability <= high for low, high in _LITTLE_SHARED_MEMORY):
        return False
    return dtype in _FLASH_DTYPES and head_dim % 8 == 0 and head_dim <= _LARGEST_HEAD


@cache
def _hardware(device_type: str, index: int | None) -> Hardware:
    if device_type != "cuda":
        return Hardware(device_type)
    capability = torch.cuda.get_device_capability(index)
    return Hardware(device_type, capability, torch.backends.cuda.is_flash_attention_available())
