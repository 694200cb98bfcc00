"""Let a model's layers run in fewer passes over memory: norms, gated MLPs, rotary embeddings and LoRA.

Each replaces the forward pass of transformers' or peft's own module, and only where a comparison with the original on
random numbers finds the two equal. Whatever does not pass, such as a family's own kind of norm, stays as it is. Weights
and modules keep their names.

Legend: T tokens, H heads, D head size, I inner size of an MLP.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import MethodType, SimpleNamespace
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional

from orpo_ray.model.fused_ops import add_product, rms_norm, rotate, silu_mul

# Names under which transformers' modeling files hold their rotary embedding: of a text, and of an image's patches.
_TEXT_ROTARY, _VISION_ROTARY = "apply_rotary_pos_emb", "apply_rotary_pos_emb_vision"
# Rows and columns of a matrix whose byte length is not a multiple of 16 put cuBLAS on kernels at half the speed.
_ALIGNED = 8


def fuse_layers(model: nn.Module) -> None:
    """Replace the forward passes of norms and gated MLPs in a model for a GPU, and its families' rotary embedding."""
    for module in model.modules():
        kind: Any = type(module)  # Any: mypy finds that modules, which compare by identity, have no hash
        if kind.__name__.endswith("RMSNorm") and _norm_is_plain(kind):
            module.forward = MethodType(_norm, module)
        elif _is_gated(module) and _mlp_is_gated_silu(kind, cast(Any, type(module.act_fn))):
            module.forward = MethodType(_gated_mlp, module)
        modeling = sys.modules[kind.__module__]
        for name, replace in ((_TEXT_ROTARY, _text_rotary), (_VISION_ROTARY, _vision_rotary)):
            original = vars(modeling).get(name)
            if original is not None and not hasattr(original, "fused_from"):
                setattr(modeling, name, replace(original))


def fuse_adapters(model: nn.Module) -> None:
    """Let plain LoRA layers add their product to the output of the frozen layer in place.

    peft computes the product, scales it, and adds it to a new tensor; the backward pass scales its gradient again.
    """
    from peft.tuners.lora import LoraLayer

    for layer in model.modules():
        if not isinstance(layer, LoraLayer) or layer.lora_variant or len(layer.lora_A) != 1:
            continue
        (name,) = layer.lora_A
        second = layer.lora_B[name]
        if isinstance(second, nn.Linear) and second.bias is None:
            second.forward = MethodType(_second_matrix, second)
            layer.forward = MethodType(_adapted, layer)


def _norm(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    if hidden_states.dtype != self.weight.dtype:
        return type(self).forward(self, hidden_states)
    return rms_norm(hidden_states, self.weight, self.variance_epsilon)


def _gated_mlp(self: Any, x: torch.Tensor) -> torch.Tensor:
    gate, up, down = linears = (self.gate_proj, self.up_proj, self.down_proj)
    missing = -gate.out_features % _ALIGNED if all(map(_can_be_padded, linears)) else 0
    if not missing:
        return down(silu_mul(gate(x), up(x)))
    # Qwen2.5-VL's vision encoder has an inner size of 3,420. The rows that are missing are zeros, and so is their part.
    inner = silu_mul(_with_rows(gate, x, missing), _with_rows(up, x, missing))
    return functional.linear(inner, functional.pad(down.weight, (0, missing)), down.bias)


def _can_be_padded(linear: Any) -> bool:
    """Whether the weight is a whole matrix: not in 4 bits, not adapted, and not divided by ZeRO-3."""
    return type(linear) is nn.Linear and not hasattr(linear.weight, "ds_id")


def _with_rows(linear: nn.Linear, x: torch.Tensor, missing: int) -> torch.Tensor:
    """Call a linear layer with rows of zeros appended to its weight and bias."""
    bias = None if linear.bias is None else functional.pad(linear.bias, (0, missing))
    return functional.linear(x, functional.pad(linear.weight, (0, 0, 0, missing)), bias)


def _adapted(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """peft's forward pass of a LoRA layer with one adapter."""
    (name,) = self.lora_A
    first = self.lora_A[name]
    plain = not (args or kwargs or self.disable_adapters or self.merged) and self.active_adapters == [name]
    if not plain or x.dtype != first.weight.dtype:
        return type(self).forward(self, x, *args, **kwargs)
    # In two dimensions, because what a linear layer returns in three may be a view, and autograd copies views that
    # are written to.
    rows = x.reshape(-1, x.shape[-1])
    result = self.base_layer(rows)
    out = self.lora_B[name](first(self.lora_dropout[name](rows)), result, self.scaling[name])
    return out.view(*x.shape[:-1], out.shape[-1])


def _second_matrix(
    self: nn.Linear, states: torch.Tensor, result: torch.Tensor | None = None, factor: float = 1.0
) -> torch.Tensor:
    """LoRA's second matrix. ZeRO-3 gathers its weight in the module's hooks, so that the product is in its forward."""
    if result is None:
        return functional.linear(states, self.weight)
    if result.dtype != states.dtype:
        return result + (functional.linear(states, self.weight) * factor).to(result.dtype)
    return add_product(result, states, self.weight, factor)


def _text_rotary(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return transformers' function for queries [1, H, T, D] and angles [1, T, D]; others go to the original."""

    def turn(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        return rotate(states[0].transpose(0, 1), cos[0], sin[0]).transpose(0, 1).unsqueeze(0)

    def fits(q: torch.Tensor, cos: torch.Tensor) -> bool:
        return q.ndim == 4 and len(q) == 1 and cos.shape == (1, *q.shape[2:])

    return _if_equal(original, _where(fits, turn, original), (1, 3, 5, 8), (1, 5, 8))


def _vision_rotary(original: Callable[..., Any]) -> Callable[..., Any]:
    """The same for patches [N, H, D] and angles [N, D]."""

    def fits(q: torch.Tensor, cos: torch.Tensor) -> bool:
        return q.ndim == 3 and cos.shape == (q.shape[0], q.shape[2])

    return _if_equal(original, _where(fits, rotate, original), (5, 3, 8), (5, 8))


def _where(fits: Callable[..., bool], turn: Callable[..., torch.Tensor], original: Callable[..., Any]) -> Any:
    """A rotary embedding that turns queries and keys where the shapes fit, and calls the original elsewhere."""

    def apply(q: Any, k: Any, cos: Any, sin: Any, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        if args or kwargs or q.device.type not in _rotary_devices or not fits(q, cos):
            return original(q, k, cos, sin, *args, **kwargs)
        return turn(q, cos, sin), turn(k, cos, sin)

    return apply


_rotary_devices = frozenset({"cuda", "meta"})


@contextmanager
def rotary_on(*device_types: str) -> Iterator[None]:
    """Limit the fused rotary embeddings to these types of device; elsewhere transformers' own run.

    By default they run on GPUs alone. Models that were fused and models that were not share these functions.
    """
    global _rotary_devices
    before, _rotary_devices = _rotary_devices, frozenset(device_types)
    try:
        yield
    finally:
        _rotary_devices = before


def _if_equal(
    original: Callable[..., Any], replacement: Callable[..., Any], shape: tuple[int, ...], angles: tuple[int, ...]
) -> Callable[..., Any]:
    """Return the replacement of a rotary embedding if it computes the same, else the original."""
    random = torch.Generator().manual_seed(0)
    q, k = (torch.randn(shape, generator=random, device="cpu") for _ in range(2))
    cos, sin = (torch.randn(angles, generator=random, device="cpu") for _ in range(2))
    with rotary_on("cpu"):
        equal = all(map(_close, replacement(q, k, cos, sin), original(q, k, cos, sin)))
    if not equal:
        return original
    replacement.fused_from = original  # type: ignore[attr-defined]
    return replacement


@cache
def _norm_is_plain(kind: type[nn.Module]) -> bool:
    """Whether norms of a class multiply the normalized states by their weight, and do nothing else."""
    random = torch.Generator().manual_seed(0)
    try:
        with torch.device("cpu"):
            norm: Any = kind(8)
        weight, states = (torch.randn(shape, generator=random, device="cpu") for shape in ((8,), (3, 8)))
        norm.weight = nn.Parameter(weight)
        return _close(_norm(norm, states), norm(states))
    except (TypeError, AttributeError, RuntimeError):
        return False  # made in another way, or of other parts


def _is_gated(module: nn.Module) -> bool:
    return all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj", "act_fn"))


@cache
def _mlp_is_gated_silu(kind: type[nn.Module], activation: type[nn.Module]) -> bool:
    """Whether MLPs of a class compute down(silu(gate(x)) * up(x)), and do nothing else."""
    random = torch.Generator().manual_seed(0)
    matrices = {
        name: torch.randn(shape, generator=random, device="cpu")
        for name, shape in (("gate_proj", (6, 4)), ("up_proj", (6, 4)), ("down_proj", (4, 6)))
    }
    x = torch.randn(3, 4, generator=random, device="cpu")
    linears = {name: lambda x, matrix=matrix: functional.linear(x, matrix) for name, matrix in matrices.items()}
    try:
        parts = SimpleNamespace(act_fn=activation(), **linears)
        return _close(_gated_mlp(parts, x), kind.forward(parts, x))
    except (TypeError, AttributeError):
        return False


def _close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-5, atol=1e-5)
