"""Triton kernels of `fused_ops`. Import this only where there is Triton: it comes with torch's CUDA builds."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

_BLOCK = 1024


@triton.jit
def _silu_mul(gate, up, out, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    g = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, g * tl.sigmoid(g) * u, mask=inside)


@triton.jit
def _silu_mul_backward(grad, gate, up, d_gate, d_up, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    d = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(g)
    tl.store(d_gate + at, d * u * sigmoid * (1.0 + g * (1.0 - sigmoid)), mask=inside)
    tl.store(d_up + at, d * g * sigmoid, mask=inside)


@triton.jit
def _rotate(  # type: ignore[no-untyped-def]
    states, out, cos, sin, x_token, x_head, heads, half,
    BACKWARD: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,  # noqa: N803
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head, column = tl.arange(0, HEADS)[:, None], tl.arange(0, HALF)[None, :]
    inside = (head < heads) & (column < half)
    source = states + token * x_token + head * x_head + column
    first = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + half, mask=inside, other=0.0).to(tl.float32)
    angle = token * 2 * half + column
    cos_1 = tl.load(cos + angle, mask=column < half, other=0.0).to(tl.float32)
    cos_2 = tl.load(cos + angle + half, mask=column < half, other=0.0).to(tl.float32)
    sin_1 = tl.load(sin + angle, mask=column < half, other=0.0).to(tl.float32)
    sin_2 = tl.load(sin + angle + half, mask=column < half, other=0.0).to(tl.float32)
    target = out + (token * heads + head) * 2 * half + column
    if BACKWARD:
        tl.store(target, first * cos_1 + second * sin_2, mask=inside)
        tl.store(target + half, second * cos_2 - first * sin_1, mask=inside)
    else:
        tl.store(target, first * cos_1 - second * sin_1, mask=inside)
        tl.store(target + half, second * cos_2 + first * sin_2, mask=inside)


def silu_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, of contiguous tensors."""
    out = torch.empty_like(gate)
    _launch(gate, _silu_mul, gate, up, out)
    return out


def silu_mul_backward(grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of `gate` and `up`, of contiguous tensors."""
    d_gate, d_up = torch.empty_like(gate), torch.empty_like(up)
    _launch(gate, _silu_mul_backward, grad, gate, up, d_gate, d_up)
    return d_gate, d_up


def rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, backward: bool) -> torch.Tensor:
    """Rotate states [T, H, D], whose last dimension is dense, by angles [T, D], which are contiguous."""
    tokens, heads, size = states.shape
    out = torch.empty((tokens, heads, size), dtype=states.dtype, device=states.device)
    half = size // 2
    blocks = {"HEADS": triton.next_power_of_2(heads), "HALF": triton.next_power_of_2(half)}
    _rotate[(tokens,)](
        states, out, cos, sin, states.stride(0), states.stride(1), heads, half, BACKWARD=backward, **blocks
    )
    return out


def _launch(like: torch.Tensor, kernel: Any, *tensors: torch.Tensor) -> None:
    """Run a kernel that goes over all elements."""
    kernel[(triton.cdiv(like.numel(), _BLOCK),)](*tensors, like.numel(), BLOCK=_BLOCK)
