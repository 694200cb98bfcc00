"""The engine without sharding, on a small model: float32 sums, exact resuming, 8-bit moments, tied weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch import nn

from orpo_ray.config.load import parse_recipe
from orpo_ray.errors import UserError
from orpo_ray.training.replicated_engine import ReplicatedEngine
from support.counting import Counter

STEPS = 6


@pytest.fixture(autouse=True)
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group of this process."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Model(nn.Module):
    """Two linear layers with one weight, a frozen layer, and a layer that some batches do not use."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.last = nn.Linear(80, 80), nn.Linear(80, 80), nn.Linear(80, 1)
        self.second.weight = self.first.weight
        self.unused = nn.Linear(80, 80)
        self.unused.requires_grad_(False)
        self.register_buffer("scale", torch.tensor(0.5))
        self.to(dtype)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.first(batch * self.scale))
        return cast(
            torch.Tensor, self.last(torch.tanh(self.second(hidden + self.unused(batch)))).float().square().mean()
        )


def engine_of(dtype: torch.dtype, **optim: Any) -> ReplicatedEngine:
    raw = {"name": "a", "model": {"id": "m"}, "data": {"train": "t"}}
    options = {"learning_rate": 1e-2, "warmup": 2, "weight_decay": 0.1, "max_grad_norm": 0.1} | optim
    return ReplicatedEngine(Model(dtype), parse_recipe(raw | {"optim": options}), STEPS, 1)


def train(engine: ReplicatedEngine, steps: range, dtype: torch.dtype) -> list[tuple[float, float]]:
    """Make steps of two micro-batches; returns losses and gradient norms."""
    found = []
    for step in steps:
        batches = torch.randn(2, 4, 80, generator=torch.Generator().manual_seed(step)).to(dtype)
        loss = 0.0
        for batch in batches:
            value = engine.forward(cast(Any, batch))
            engine.backward(cast(torch.Tensor, value))
            loss += float(cast(torch.Tensor, value))
        found.append((loss, engine.step()))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit", "paged_adamw_8bit"])
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_a_resumed_run_continues_exactly(dtype: torch.dtype, optimizer: str, tmp_path: Path) -> None:
    engine = engine_of(dtype, optimizer=optimizer)
    head = train(engine, range(3), dtype)
    assert min(norm for _, norm in head) > 0.1, "this test must clip"
    engine.save(tmp_path)
    tail = train(engine, range(3, STEPS), dtype)
    again = engine_of(dtype, optimizer=optimizer)
    again.load(tmp_path)
    assert train(again, range(3, STEPS), dtype) == tail
    for name, weight in engine.consolidated_weights(trained_only=False).items():
        assert torch.equal(again.consolidated_weights(trained_only=False)[name], weight), name


def test_it_trains_as_torch_does() -> None:
    engine, model = engine_of(torch.float32), Model(torch.float32)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    groups = [
        {"params": [w for w in trained if (w.ndim > 1) == matrix], "weight_decay": 0.1 * matrix} for matrix in (1, 0)
    ]
    optimizer = torch.optim.AdamW(groups, foreach=False, fused=False)
    expected = []
    for step in range(STEPS):
        batches = torch.randn(2, 4, 80, generator=torch.Generator().manual_seed(step))
        loss = sum(model(batch) for batch in batches)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(trained, 0.1)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (step / 2 if step < 2 else (STEPS - step) / (STEPS - 2))
        optimizer.step()
        optimizer.zero_grad()
        expected.append((float(loss), float(norm)))
    assert train(engine, range(STEPS), torch.float32) == [pytest.approx(step, rel=1e-5) for step in expected]


def test_bfloat16_gradients_are_added_up_in_float32() -> None:
    """In bfloat16, 64 additions of 1/640 to 1 would leave 1."""
    norms = []
    for repeats in (0, 64):
        engine = engine_of(torch.bfloat16)
        batch = torch.ones(4, 80, dtype=torch.bfloat16)
        for factor in (1.0, *[1 / 640] * repeats):
            engine.backward(cast(torch.Tensor, engine.forward(cast(Any, batch))) * factor)
        norms.append(engine.step())
    assert norms[1] == pytest.approx(1.1 * norms[0], rel=2e-3)


def test_a_step_reads_one_value_from_the_device() -> None:
    """The gradient's norm; reading one value for each parameter would stop a GPU as often."""
    engine = engine_of(torch.bfloat16)
    loss = cast(torch.Tensor, engine.forward(cast(Any, torch.ones(4, 80, dtype=torch.bfloat16))))
    with Counter() as counter:
        engine.backward(loss)
        engine.step()
    assert counter.reads == 1


def test_a_checkpoint_of_an_earlier_version_is_an_error_for_the_user(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="an earlier version of orpo-ray wrote it"):
        engine_of(torch.float32).load(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_save_beside_the_training_is_the_state_between_two_updates(dtype: torch.dtype, tmp_path: Path) -> None:
    engine = engine_of(dtype)
    train(engine, range(3), dtype)
    assert not engine.save_alone(tmp_path / "other", updates=2), "it has made another update"
    assert not (tmp_path / "other").exists()
    assert engine.save_alone(tmp_path / "alone", updates=3)
    engine.save(tmp_path / "together")
    alone, together = [torch.load(path) for path in sorted(tmp_path.glob("*/engine/replicated.pt"))]
    torch.testing.assert_close(alone, together, rtol=0, atol=0)


def test_a_weight_that_is_not_finite_is_not_saved_beside_the_training(tmp_path: Path) -> None:
    engine = engine_of(torch.float32)
    with torch.no_grad():
        next(iter(engine._masters.values()))[0, 0] = torch.nan
    assert not engine.save_alone(tmp_path, updates=0)


def test_half_an_update_is_not_saved(tmp_path: Path) -> None:
    engine = engine_of(torch.float32)
    train(engine, range(1), torch.float32)

    def fail() -> None:
        raise RuntimeError("out of memory")

    engine.optimizer.register_step_post_hook(lambda *_: fail())
    with pytest.raises(RuntimeError, match="out of memory"):
        train(engine, range(1, 2), torch.float32)
    assert not engine.save_alone(tmp_path, updates=1)
