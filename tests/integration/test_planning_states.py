"""Bytes of weights, gradients and optimizer states in a plan equal the storages of real engines."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch

from orpo_ray.config.load import parse_recipe
from orpo_ray.model.loading import pick_attention
from orpo_ray.planning.activations import unloaded_model
from orpo_ray.planning.states import Weights, states
from orpo_ray.tiny_models.build import resolve
from support.engine_memory import measure_all
from support.worker_group import worker_group

MODEL = "orpo-ray/tiny-smolvlm"
WAYS: dict[str, dict[str, Any]] = {
    "full": {},
    "frozen vision": {"freeze": ["vision"]},
    "lora": {"lora": {"r": 4}},
    "qlora": {"lora": {"r": 4}, "quantization": {}},
    "qlora, single scales": {"lora": {"r": 4}, "quantization": {"use_double_quant": False, "quant_type": "fp4"}},
}


def recipe(way: str, dtype: str, stage: int, workers: int) -> dict[str, Any]:
    return {
        "name": "planned",
        "model": {"id": MODEL, "dtype": dtype, **WAYS[way]},
        "data": {"train": "easy-vqa:train"},
        "optim": {"pairs_per_step": 4, "learning_rate": 1e-3},
        "deepspeed": {"zero_stage": stage},
        "scaling": {"num_workers": workers},
    }


def predicted(raw: dict[str, Any]) -> dict[str, int]:
    from transformers import AutoConfig

    section = parse_recipe(raw).model
    config = AutoConfig.from_pretrained(resolve(section.id))
    dtype = torch.float32 if section.dtype == "float32" else torch.bfloat16
    model = unloaded_model(section, config, dtype, pick_attention(section, config).layout)
    weights = Weights.of(model, section, dtype, config.get_text_config().hidden_size)
    found = states(weights, raw["deepspeed"]["zero_stage"], raw["scaling"]["num_workers"], "adamw")
    return {"parameters": found.weights, "gradients": found.gradients, "optimizer": found.optimizer}


Case = tuple[str, str, int]
DTYPES = ("float32", "bfloat16")
SHARDED = ("full", "lora", "qlora")


def cases_of(workers: int) -> list[Case]:
    """(way of tuning, dtype, ZeRO stage)."""
    ways, stages = (list(WAYS), [0]) if workers == 1 else (list(SHARDED), [0, 1, 2, 3])
    # This engine does not shard 4-bit weights under ZeRO-3.
    return [case for case in product(ways, DTYPES, stages) if case[::2] != ("qlora", 3)]


SOME = [("full", "bfloat16", 1), ("qlora", "bfloat16", 2), ("full", "float32", 3), ("lora", "bfloat16", 3)]


def test_some_have_every_value() -> None:
    for one in range(3):
        assert {case[one] for case in SOME} == {case[one] for case in cases_of(2) if case[2] > 0}


@pytest.mark.parametrize(
    ("workers", "named"),
    [
        pytest.param(1, cases_of(1), marks=pytest.mark.nightly),
        pytest.param(2, SOME, marks=pytest.mark.nightly),
        pytest.param(2, cases_of(2), marks=pytest.mark.nightly),
    ],
    ids=["1", "2", "2-all"],
)
def test_states_are_what_a_real_engine_holds(workers: int, named: list[Case]) -> None:
    cases = [recipe(*each, workers) for each in named]
    off = {}
    for name, raw, real in zip(named, cases, worker_group(workers).run(measure_all, cases)[0], strict=True):
        for what, size in predicted(raw).items():
            if abs(size / real[what] - 1) > 0.02:
                off[*name, what] = (size, real[what])
    assert not off
