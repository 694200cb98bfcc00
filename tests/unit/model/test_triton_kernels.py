"""Triton kernels against PyTorch, in Triton's interpreter on the CPU. tests/gpu runs them compiled."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="Triton comes with torch's CUDA builds")
pytestmark = pytest.mark.torchvision  # the environment of these tests has such a build

# In a process of its own: Triton reads TRITON_INTERPRET when it is imported.
PROGRAM = """
import torch
from orpo_ray.model import fused_ops, triton_kernels as kernels
from torch.testing import assert_close

random = torch.Generator().manual_seed(0)
def randn(*shape): return torch.randn(shape, generator=random)

gate, up, grad = (randn(7, 301) for _ in range(3))
assert_close(kernels.silu_mul(gate, up), fused_ops.silu_mul(gate, up))
gate.requires_grad_(), up.requires_grad_()
fused_ops.silu_mul(gate, up).backward(grad)
assert_close(kernels.silu_mul_backward(grad, gate.detach(), up.detach()), (gate.grad, up.grad))

for heads, size in ((3, 16), (4, 80)):
    states = randn(heads, 9, size).transpose(0, 1)  # not contiguous, as queries are
    cos, sin = randn(9, size), randn(9, size)
    for backward in (False, True):
        assert_close(kernels.rotate(states, cos, sin, backward), fused_ops._rotated(states, cos, sin, backward))
print("equal")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Triton runs on Linux")
def test_kernels_in_the_interpreter() -> None:
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.stdout.strip() == "equal", result.stderr
