"""Fused layers compute what the layers of transformers and peft compute: values and every gradient."""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest
import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLMLP

from orpo_ray.config.schema import ModelConfig
from orpo_ray.model.fused_layers import fuse_adapters, fuse_layers, rotary_on
from orpo_ray.model.fused_ops import add_product, rms_norm, rotate, silu_mul
from orpo_ray.model.loading import load_model
from orpo_ray.objective.pair_model import PairModel
from support.pairs_by_hand import NORM, assert_equal, layouts_of, make_row, run, tiny_pair_model

ROW = [(2, 6, 5, 4), (1, 5, 3, 6), (0, 4, 2, 3)]


class CountLinearRows(TorchFunctionMode):
    """Notes the rows of each weight that `linear` multiplies by."""

    def __init__(self, sizes: list[int]) -> None:
        super().__init__()
        self.sizes = sizes

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is functional.linear:
            self.sizes.append(len(args[1]))
        return func(*args, **(kwargs or {}))


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


def test_silu_mul_and_its_gradient() -> None:
    assert torch.autograd.gradcheck(silu_mul, (randn(3, 4), randn(3, 4, seed=1)))
    assert torch.equal(silu_mul(*(x := (randn(3, 4), randn(3, 4, seed=1)))), functional.silu(x[0]) * x[1])


def test_rms_norm_and_its_gradient() -> None:
    states, weight = randn(2, 3, 8), randn(8, seed=1)
    expected = functional.rms_norm(states, (8,), weight, 1e-3)
    assert torch.allclose(rms_norm(states, weight, 1e-3), expected)
    assert torch.autograd.gradcheck(lambda *inputs: rms_norm(*inputs, 1e-3), (states, weight))


def test_rotation_by_hand() -> None:
    """A quarter turn takes (1, 0) to (0, 1) and (0, 1) to (-1, 0), in each pair (i, i + D/2)."""
    states = torch.tensor([[[1.0, 0.0, 0.0, 1.0]]], requires_grad=True)
    out = rotate(states, torch.zeros(1, 4), torch.ones(1, 4))
    assert out.tolist() == [[[0.0, -1.0, 1.0, 0.0]]]
    (out * torch.tensor([1.0, 2.0, 3.0, 4.0])).sum().backward()
    assert states.grad is not None
    assert states.grad.tolist() == [[[3.0, 4.0, -1.0, -2.0]]]  # the transposed rotation of (1, 2, 3, 4)


def test_rotation_s_gradient() -> None:
    cos, sin = randn(5, 8, seed=1).detach(), randn(5, 8, seed=2).detach()
    assert torch.autograd.gradcheck(lambda states: rotate(states, cos, sin), (randn(5, 3, 8),))


def test_add_product_and_its_gradient() -> None:
    def added(result: torch.Tensor, states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return add_product(result * 1, states, weight, 0.5)  # * 1, since a leaf cannot be written to

    inputs = (randn(5, 6), randn(5, 2, seed=1), randn(6, 2, seed=2))
    assert torch.allclose(added(*inputs), inputs[0] + 0.5 * inputs[1] @ inputs[2].T)
    assert torch.autograd.gradcheck(added, inputs)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("family", ["smolvlm", "llava_next", "qwen2_5_vl", "gemma3", "qwen3_vl"])
def test_a_fused_model_has_the_same_loss_and_gradients(family: str, lora: bool) -> None:
    plain = tiny_pair_model(family, lora)
    fused = copy.deepcopy(plain)  # adapters are random
    fuse_layers(fused.model)
    if lora:
        fuse_adapters(fused.model)
    pairs, layout = make_row(family, ROW), layouts_of(family)[0]
    expected = run(plain, pairs, layout)
    with rotary_on("cpu"):
        assert_equal(run(fused, pairs, layout), expected)


def test_an_inner_size_that_suits_no_fast_kernel_is_padded() -> None:
    """20 rows, which become 24. With biases, as in Qwen2.5-VL's vision encoder."""
    config = Qwen2_5_VLVisionConfig(hidden_size=8, intermediate_size=20)
    plain = Qwen2_5_VLMLP(config, bias=True).double()
    fused, x = copy.deepcopy(plain), randn(5, 8).detach()
    fuse_layers(fused)
    sizes: list[int] = []
    with CountLinearRows(sizes):
        found = fused(x)
    assert sizes == [24, 24, 8]
    expected = plain(x)
    assert torch.allclose(found, expected)
    found.square().sum().backward()
    expected.square().sum().backward()
    for (name, got), wanted in zip(fused.named_parameters(), plain.parameters(), strict=True):
        assert torch.allclose(got.grad, wanted.grad), name  # type: ignore[arg-type]


def test_so_has_a_quantized_model() -> None:
    raw = {"id": "orpo-ray/tiny-smolvlm", "lora": {"r": 4}, "quantization": {}}

    def results(fused: bool) -> Any:
        model = load_model(ModelConfig(**raw, fused_layers=fused), torch.device("cpu"), seed=0)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # zeros at first
                parameter.data.fill_(0.1)
        return run(PairModel(model, NORM), make_row("smolvlm", ROW), "shared_prefix")

    assert_equal(results(True), results(False))


@pytest.mark.parametrize(
    ("family", "kinds"),
    [
        ("smolvlm", {"LlamaRMSNorm", "LlamaMLP"}),
        ("llava_next", {"MistralRMSNorm", "MistralMLP"}),
        ("qwen2_5_vl", {"Qwen2_5_VLRMSNorm", "Qwen2MLP", "Qwen2_5_VLMLP"}),
        ("gemma3", set()),  # its norms add 1 to their weights, its MLPs use GELU
    ],
)
def test_what_is_fused(family: str, kinds: set[str]) -> None:
    model = tiny_pair_model(family)
    fuse_layers(model.model)
    assert {type(module).__name__ for module in model.modules() if "forward" in vars(module)} == kinds
    files = {sys.modules[type(module).__module__] for module in model.modules()}
    rotary = {name: hasattr(function, "fused_from") for file in files for name, function in vars(file).items()
              if name.startswith("apply_rotary_pos_emb")}  # fmt: skip
    assert set(rotary.values()) == {True}
