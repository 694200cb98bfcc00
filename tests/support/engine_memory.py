"""Measure the memory that a real engine holds after training steps, by unique storage."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from orpo_ray.config.load import parse_recipe
from orpo_ray.data.packing import build_batch
from orpo_ray.objective.base import Normaliser
from orpo_ray.objective.orpo import ORPO
from orpo_ray.objective.pair_model import PairModel
from orpo_ray.training.engine import make_engine
from orpo_ray.training.sharded_loading import load_for_training
from support.pairs_by_hand import NORM, make_pair

FAMILY = "smolvlm"


def optimizer_of(engine: Any) -> torch.optim.Optimizer:
    """AdamW of an engine of either class."""
    found: torch.optim.Optimizer = (
        engine.deepspeed.basic_optimizer if hasattr(engine, "deepspeed") else engine.optimizer
    )
    return found


def end_engine(engine: Any) -> None:
    """Remove DeepSpeed's hooks and buffers, so that the process can make another engine."""
    if hasattr(engine, "deepspeed"):
        engine.deepspeed.destroy()


def measure(raw: dict[str, Any], world: int) -> dict[str, int]:
    """Return the bytes on this worker: parameters, gradients after two micro-batches, optimizer states after a step."""
    recipe = parse_recipe(raw)
    model = PairModel(load_for_training(recipe, torch.device("cpu")), NORM)
    engine = make_engine(model, recipe, 10, world)
    rng = np.random.default_rng(0)
    for step in range(2):
        for _ in range(2):
            batch = build_batch([make_pair(FAMILY, rng, 1, 12, 9, 7)], "response", model.layout)
            loss, _ = ORPO(0.1).loss(engine.forward(batch), batch.weights, Normaliser(2.0))
            engine.backward(loss)
        gradients = _bytes(_gradients(model, engine)) if step == 1 else 0
        engine.step()
    parameters = list(_parameters(model))
    held = {tensor.untyped_storage().data_ptr() for tensor in parameters}
    states = [t for t in _states(engine) if t.untyped_storage().data_ptr() not in held]
    found = {"parameters": _bytes(parameters), "gradients": gradients, "optimizer": _bytes(states)}
    end_engine(engine)
    return found


def _parameters(model: torch.nn.Module) -> Iterable[torch.Tensor]:
    for parameter in model.parameters():
        yield parameter.data
        if hasattr(parameter, "ds_tensor"):  # ZeRO-3: this worker's shard
            yield parameter.ds_tensor
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            yield from (state.absmax, state.code)
            if state.state2 is not None:
                yield from (state.offset, state.state2.absmax, state.state2.code)


def _gradients(model: torch.nn.Module, engine: Any) -> Iterable[torch.Tensor]:
    for parameter in model.parameters():
        yield from (g for g in (parameter.grad, getattr(parameter, "grad_accum", None)) if g is not None)
    for group in optimizer_of(engine).param_groups:
        yield from (master.grad for master in group["params"] if master.grad is not None)
    zero = getattr(getattr(engine, "deepspeed", None), "optimizer", None)
    for name in ("averaged_gradients", "all_grad_tensors"):
        for group in (getattr(zero, name, None) or {}).values():
            yield from (tensor for tensor in group or [])
    yield from getattr(zero, "fp32_groups_gradients_flat", [])  # stage 1 in bfloat16
    if getattr(zero, "grad_partitions_flat_buffer", None) is not None:
        yield zero.grad_partitions_flat_buffer


def _states(engine: Any) -> Iterable[torch.Tensor]:
    optimizer = optimizer_of(engine)
    for group in optimizer.param_groups:
        yield from group["params"]
    for state in optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, torch.Tensor))
    if hasattr(engine, "deepspeed"):
        yield from getattr(engine.deepspeed.optimizer, "fp32_partitioned_groups_flat", [])


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def measure_all(_rank: int, world: int, cases: list[dict[str, Any]]) -> list[dict[str, int]]:
    """Run `measure` for each case on one of `world` workers."""
    return [measure(raw, world) for raw in cases]
