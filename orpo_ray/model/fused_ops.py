"""Operations that eager PyTorch computes in several passes over memory, each in one pass.

On a GPU they run as Triton kernels and compute in float32. Elsewhere they run the same formulas in PyTorch: on a CPU
for tests, and on the `meta` device for plans.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any, cast

import torch
from torch.autograd import Function
from torch.nn import functional


class _SiluMul(Function):
    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        if gate.is_cuda:
            return _kernels().silu_mul(gate, up)
        return functional.silu(gate) * up

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = ctx.saved_tensors
        if gate.is_cuda:
            return _kernels().silu_mul_backward(grad.contiguous(), gate, up)
        sigmoid = gate.sigmoid()
        return grad * up * sigmoid * (1 + gate * (1 - sigmoid)), grad * gate * sigmoid


class _Rotate(Function):
    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(states, cos, sin, backward=False)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(grad, cos, sin, backward=True), None, None


class _RmsNorm(Function):
    """For a CPU and for plans: torch's own runs as one kernel on CUDA alone, elsewhere it keeps several tensors."""

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        wide = _wide(states)
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(states, weight, scale)
        return (wide * scale * weight).to(states.dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        states, weight, scale = ctx.saved_tensors
        normed = _wide(states) * scale
        weighted = _wide(grad) * weight
        d_states = (weighted - normed * (weighted * normed).mean(-1, keepdim=True)) * scale
        d_weight = (grad * normed).flatten(0, -2).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        return d_states.to(states.dtype), d_weight, None


class _AddProduct(Function):
    @staticmethod
    def forward(
        ctx: Any, result: torch.Tensor, states: torch.Tensor, weight: torch.Tensor, factor: float
    ) -> torch.Tensor:
        ctx.save_for_backward(states, weight)
        ctx.factor = factor
        ctx.mark_dirty(result)
        return result.addmm_(states, weight.t(), alpha=factor)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        states, weight = ctx.saved_tensors
        _, needs_states, needs_weight, _ = ctx.needs_input_grad
        d_states = (grad @ weight).mul_(ctx.factor) if needs_states else None
        d_weight = (grad.t() @ states).mul_(ctx.factor) if needs_weight else None
        return grad, d_states, d_weight, None


def silu_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, elementwise; both of one shape. The inner part of SwiGLU (https://arxiv.org/abs/2002.05202)."""
    return cast(torch.Tensor, _SiluMul.apply(gate, up))


def rms_norm(states: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm (https://arxiv.org/abs/1910.07467) of states [..., D], multiplied by weight [D] before rounding."""
    if states.is_cuda:
        return functional.rms_norm(states, weight.shape, weight, eps)
    return cast(torch.Tensor, _RmsNorm.apply(states, weight, eps))


def rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Apply rotary position embedding (https://arxiv.org/abs/2104.09864) to halves, as transformers does.

    Args:
        states: [T, H, D], queries or keys.
        cos: [T, D], of the angles; no gradient flows into these.
        sin: [T, D].

    Returns:
        states * cos + [-second half, first half] * sin, contiguous [T, H, D].
    """
    return cast(torch.Tensor, _Rotate.apply(states, cos, sin))


def add_product(result: torch.Tensor, states: torch.Tensor, weight: torch.Tensor, factor: float) -> torch.Tensor:
    """Add factor * states @ weight.T to `result` [N, out], in place.

    Args:
        result: [N, out], not needed by the backward pass of whatever computed it, and not a view.
        states: [N, r].
        weight: [out, r].
        factor: of the product.
    """
    return cast(torch.Tensor, _AddProduct.apply(result, states, weight, factor))


@cache
def has_kernels(device_type: str) -> bool:
    """Whether the operations run in one pass on this type of device.

    Triton also needs a C compiler on the machine, so that the answer comes from a try.
    """
    if device_type != "cuda":
        return False
    one = torch.ones(1, device="cuda")
    try:
        _kernels().silu_mul(one, one)
    except Exception as error:  # noqa: BLE001 - whatever keeps Triton from working, training can go on without it
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        warnings.warn(f"model.fused_layers is off, because Triton does not work here: {reason}", stacklevel=2)
        return False
    return True


def _rotated(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, backward: bool) -> torch.Tensor:
    if states.stride(-1) != 1:
        states = states.contiguous()
    if states.is_cuda:
        return cast(torch.Tensor, _kernels().rotate(states, cos.contiguous(), sin.contiguous(), backward))
    (first, second), (cos_1, cos_2), (sin_1, sin_2) = (
        _wide(each).chunk(2, dim=-1) for each in (states, cos.unsqueeze(1), sin.unsqueeze(1))
    )
    if backward:
        out = (first * cos_1 + second * sin_2, second * cos_2 - first * sin_1)
    else:
        out = (first * cos_1 - second * sin_1, second * cos_2 + first * sin_2)
    return torch.cat(out, dim=-1).to(states.dtype)


def _wide(states: torch.Tensor) -> torch.Tensor:
    return states.to(torch.promote_types(states.dtype, torch.float32))


def _kernels() -> Any:
    # Imported here, since only torch's CUDA builds bring Triton.
    from orpo_ray.model import triton_kernels

    return triton_kernels
