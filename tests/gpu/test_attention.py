"""Attention over a packed row: the kernel that training uses, against float32 attention of each branch by itself."""

from __future__ import annotations

import pytest
import torch

from orpo_ray.data.packing import RESPONSE, TEXT
from orpo_ray.model.attention_kernel import Hardware, choose_kernel
from orpo_ray.model.prefix_layout import PrefixLayout
from orpo_ray.model.shared_prefix import ScoreOptions, attend
from support.gpu_training import CountOps, row_on
from support.pairs_by_hand import relative_distance, run_as, tiny_pair_model
from support.rows_by_hand import Tree, row_of

pytestmark = pytest.mark.gpu
# Two pairs, four answers to a prompt, and two prompts about an image.
TREES: list[Tree] = [
    (37, [(0, [20, 5])]),
    (130, [(0, [1, 64])]),
    (8, [(0, [90, 70, 33, 21])]),
    (50, [(12, [40, 3]), (9, [17, 28, 5])]),
]


def layout_on(device: torch.device) -> PrefixLayout:
    branches, tokens = row_of(TREES)
    kinds = [TEXT if token.in_prompt else RESPONSE for token in tokens]
    return PrefixLayout(branches, torch.tensor([kinds], device=device))


@pytest.mark.parametrize("window", [None, 24])
@pytest.mark.parametrize(("heads", "key_heads"), [(8, 8), (8, 2)])
@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
def test_equals_float32_attention_of_each_branch(
    head_dim: int, heads: int, key_heads: int, window: int | None, device: torch.device, dtype: torch.dtype
) -> None:
    """Values, and the gradients of queries, keys and values."""
    layout, options = layout_on(device), ScoreOptions(window=window)
    kernel = choose_kernel(Hardware.of(device), dtype, head_dim)
    assert kernel == ("varlen" if device.type == "cuda" else "cpu_flash")
    tokens = layout.token_kind.shape[1]
    generator = torch.Generator().manual_seed(head_dim)
    shapes = [(1, each, tokens, head_dim) for each in (heads, key_heads, key_heads)]
    states = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]
    weights = torch.randn(1, tokens, heads, head_dim, generator=generator).to(device)

    def run(name: str, kind: torch.dtype) -> list[torch.Tensor]:
        inputs = [each.to(kind).detach().requires_grad_() for each in states]
        out = attend(name, *inputs, layout, options)  # type: ignore[arg-type]
        (out.float() * weights).sum().backward()
        return [out.float(), *(each.grad.float() for each in inputs if each.grad is not None)]

    found, expected = run(kernel, dtype), run("sdpa_per_sequence", torch.float32)
    assert len(found) == 4
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
    for name, got, reference in zip(("values", "queries", "keys", "values'"), found, expected, strict=True):
        assert relative_distance(got, reference) < tolerance, name


def test_a_vision_layer_calls_one_kernel(device: torch.device, dtype: torch.dtype) -> None:
    """Qwen2.5-VL cuts an image into windows. On a GPU, all windows of a layer must be one call."""
    family = "qwen2_5_vl"
    model = tiny_pair_model(family).to(device, dtype)
    run_as(model, "shared_prefix")
    batch = row_on(device, model, family)
    base = model.model
    inputs = model.family.vision_inputs(batch.images, model.pixel_norm, dtype)
    with torch.no_grad(), CountOps() as counted:
        model.family.encode_images(base, inputs)
    layers = base.config.vision_config.depth
    assert counted.attention >= layers
    if device.type == "cuda":
        assert counted.attention == layers
