"""bitsandbytes' AdamW: how often a step waits for the device, and where its moments are after a load."""

from __future__ import annotations

import copy
import io
from typing import Any

import bitsandbytes.functional as F
import pytest
import torch
from bitsandbytes import utils
from bitsandbytes.optim import adamw as library_adamw
from bitsandbytes.optim import optimizer as library
from torch import nn

from orpo_ray.config.schema import OptimConfig
from orpo_ray.training.optimizer import adamw

LARGE, SMALL = 128 * 1024, 64 * 80  # elements: the library pages moments from 100,000 on
KINDS = {"adamw_8bit": library_adamw.AdamW8bit, "paged_adamw_8bit": library_adamw.PagedAdamW8bit}
# The library has paged memory on GPUs only.
pytestmark = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")


def parameters() -> list[nn.Parameter]:
    """Return a matrix with large moments, one with 8-bit moments, and a bias with moments in 32 bits."""
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape)) for shape in ((128, LARGE // 128), (64, SMALL // 64), (80,))]


def optimizer_of(name: str, trained: list[nn.Parameter]) -> Any:
    return adamw(trained, OptimConfig(optimizer=name, learning_rate=1e-2))  # type: ignore[arg-type]


def make_steps(optimizer: Any, steps: range) -> None:
    for step in steps:
        draw = torch.Generator().manual_seed(step)
        for group in optimizer.param_groups:
            for weight in group["params"]:
                weight.grad = torch.randn(weight.shape, generator=draw)
        optimizer.step()


def saved(optimizer: Any) -> Any:
    """Return the optimizer's state as it comes from a file."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Grows by a tensor for each time that the library would wait for a GPU on which this tensor is."""
    found: list[torch.Tensor] = []
    for module in (utils, library):
        monkeypatch.setattr(module, "sync_gpu", found.append)
    return found


@pytest.fixture
def paged(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Stands for the library's paged memory, which needs a GPU; has the tensors in it."""
    found: list[torch.Tensor] = []

    def buffer(optimizer: Any, weight: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        made: Any = torch.zeros_like(weight, dtype=dtype)
        if optimizer.is_paged and weight.numel() >= 1e5:
            made.is_paged = True
            found.append(made)
        return made

    monkeypatch.setattr(library.Optimizer8bit, "get_state_buffer", buffer)
    monkeypatch.setattr(F, "prefetch_tensor", lambda tensor: None)
    return found


@pytest.mark.parametrize(("name", "most"), [("adamw_8bit", 0), ("paged_adamw_8bit", 1)])
def test_a_step_waits_at_most_once_for_any_number_of_parameters(
    name: str, most: int, waits: list[torch.Tensor]
) -> None:
    optimizer = optimizer_of(name, parameters())
    make_steps(optimizer, range(2))
    assert len(waits) == 2 * most
    library_own = KINDS[name](parameters())
    make_steps(library_own, range(1))
    assert len(waits) > 2 * most + 2, "the library waits elsewhere now"


@pytest.mark.parametrize("name", KINDS)
def test_steps_and_states_are_those_of_the_library(name: str) -> None:
    trained, expected = parameters(), parameters()
    optimizer = optimizer_of(name, trained)
    groups = [{"params": expected[:2], "weight_decay": OptimConfig().weight_decay}, {"params": expected[2:]}]
    options: Any = optimizer.param_groups[1]
    groups[1]["weight_decay"] = 0.0
    original = KINDS[name](groups, lr=options["lr"], betas=options["betas"], eps=options["eps"])
    for each in (optimizer, original):
        make_steps(each, range(3))
    for weight, other in zip(trained, expected, strict=True):
        assert torch.equal(weight, other)
    torch.testing.assert_close(optimizer.state_dict(), original.state_dict(), rtol=0, atol=0)


def test_a_closure_runs_once_with_gradients() -> None:
    (weight, *_) = trained = parameters()
    optimizer = optimizer_of("adamw_8bit", trained)
    calls = []

    def closure() -> torch.Tensor:
        calls.append(torch.is_grad_enabled())
        loss = weight.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).requires_grad
    assert calls == [True]


def test_large_moments_are_paged_after_a_load(paged: list[torch.Tensor]) -> None:
    first = optimizer_of("paged_adamw_8bit", parameters())
    make_steps(first, range(2))
    state, before = saved(first), copy.deepcopy(first.state_dict())
    paged.clear()
    second = optimizer_of("paged_adamw_8bit", parameters())
    second.load_state_dict(state)
    large, small, bias = (second.state[weight] for group in second.param_groups for weight in group["params"])
    assert [id(large["state1"]), id(large["state2"])] == [id(tensor) for tensor in paged]
    for moments in (small, bias):
        assert not any(hasattr(moments[name], "is_paged") for name in ("state1", "state2"))
    torch.testing.assert_close(second.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("name", KINDS)
def test_a_loaded_state_continues_exactly(name: str, paged: list[torch.Tensor]) -> None:
    trained = parameters()
    optimizer = optimizer_of(name, trained)
    make_steps(optimizer, range(2))
    state, weights = saved(optimizer), [weight.detach().clone() for weight in trained]
    make_steps(optimizer, range(2, 4))
    again = optimizer_of(name, [nn.Parameter(weight) for weight in weights])
    again.load_state_dict(state)
    make_steps(again, range(2, 4))
    resumed = [weight for group in again.param_groups for weight in group["params"]]
    for weight, other in zip(trained, resumed, strict=True):
        assert torch.equal(weight, other)
