"""Fused layers on the GPU: Triton kernels against float32 PyTorch, and a whole model against transformers' layers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional

from orpo_ray.model.fused_layers import fuse_adapters, fuse_layers
from orpo_ray.model.fused_ops import has_kernels, rotate, silu_mul
from orpo_ray.objective.base import Normaliser
from orpo_ray.objective.orpo import ORPO
from orpo_ray.objective.pair_model import PairModel
from support.gpu_training import ROW, row_on
from support.pairs_by_hand import relative_distance, run_as, tiny_pair_model

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def bound(dtype: torch.dtype) -> float:
    """Relative distance to float32 that rounding explains."""
    return 1e-2 if dtype == torch.bfloat16 else 1e-6


def test_triton_works(device: torch.device) -> None:
    assert has_kernels(device.type) == (device.type == "cuda")


def test_silu_mul(device: torch.device, dtype: torch.dtype, bound: float) -> None:
    generator = torch.Generator(device).manual_seed(0)
    gate, up, grad = (torch.randn(1000, 1731, device=device, dtype=dtype, generator=generator) for _ in range(3))
    inputs, references = ([x.to(kind).detach().requires_grad_() for x in (gate, up)] for kind in (dtype, torch.float32))
    out = silu_mul(*inputs)
    expected = functional.silu(references[0]) * references[1]
    out.backward(grad)
    expected.backward(grad.float())
    pairs = [(out, expected), *((x.grad, y.grad) for x, y in zip(inputs, references, strict=True))]
    assert all(relative_distance(found.float(), reference) < bound for found, reference in pairs)


@pytest.mark.parametrize(("heads", "size"), [(32, 128), (8, 64), (16, 80), (2, 256)])
def test_rotation(heads: int, size: int, device: torch.device, dtype: torch.dtype, bound: float) -> None:
    generator = torch.Generator(device).manual_seed(0)
    states, grad = (torch.randn(heads, 777, size, device=device, dtype=dtype, generator=generator) for _ in range(2))
    angles = torch.randn(777, size, device=device, generator=generator)
    cos, sin = angles.cos(), angles.sin()
    rotated = states.transpose(0, 1).requires_grad_()
    out = rotate(rotated, cos, sin)
    out.backward(grad.transpose(0, 1))
    reference = states.transpose(0, 1).float().requires_grad_()
    turned = torch.cat((-reference[..., size // 2 :], reference[..., : size // 2]), dim=-1)
    expected = reference * cos.unsqueeze(1) + turned * sin.unsqueeze(1)
    expected.backward(grad.transpose(0, 1).float())
    assert relative_distance(out.float(), expected) < bound
    assert relative_distance(rotated.grad.float(), reference.grad) < bound


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("family", ["smolvlm", "llava_next", "qwen2_5_vl"])
def test_a_fused_model_has_the_loss_and_gradient_norm_of_the_plain_one(
    family: str, lora: bool, device: torch.device, dtype: torch.dtype
) -> None:
    plain = tiny_pair_model(family, lora)
    fused = copy.deepcopy(plain)
    fuse_layers(fused.model)
    if lora:
        fuse_adapters(fused.model)

    def loss_and_norm(model: PairModel) -> list[float]:
        run_as(model, "shared_prefix")
        batch = row_on(device, model, family)
        loss, _ = ORPO(0.1).loss(model(batch), batch.weights, Normaliser(float(len(ROW))))
        loss.backward()
        norms = [p.grad.float().norm() for p in model.parameters() if p.grad is not None]
        return [float(loss), float(torch.stack(norms).norm())]

    expected, found = (loss_and_norm(model.to(device, dtype)) for model in (plain, fused))
    assert found == pytest.approx(expected, rel=1e-2 if dtype == torch.bfloat16 else 1e-5)
