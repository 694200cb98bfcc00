"""Every family memorizes 32 pairs, and is the same model after export and reload.

Here every family does so under one way of tuning, and every way is run with several families; the full product is
nightly.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from orpo_ray.config.schema import ModelConfig
from orpo_ray.data.packing import PairBatch, build_batch
from orpo_ray.exporting.merging import load_merged_model
from orpo_ray.model import shared_prefix
from orpo_ray.model.adapter_folder import save_adapter
from orpo_ray.model.loading import load_model
from orpo_ray.objective.base import Normaliser
from orpo_ray.objective.logps import PairLogps
from orpo_ray.objective.orpo import ORPO
from orpo_ray.objective.pair_model import PairModel
from orpo_ray.tiny_models.families import TINY_FAMILIES
from support.pairs_by_hand import NORM, layouts_of, make_pair, run_as

CPU = torch.device("cpu")
LORA = {"r": 16, "alpha": 32}
# Fields of the recipe's model section, and a learning rate.
MODES: dict[str, tuple[dict[str, Any], float]] = {
    "full": ({}, 3e-3),
    "frozen vision": ({"freeze": ["vision"]}, 3e-3),
    "lora": ({"lora": LORA}, 1e-2),
    "dora, connector in full": ({"lora": LORA | {"use_dora": True, "modules_to_save": ["connector"]}}, 1e-2),
    "qlora": ({"lora": LORA, "quantization": {}}, 1e-2),
}

# Modes in rotation over all families, so that a new family is included; and two modes in the concatenated layout.
COVER = {(family, list(MODES)[number % len(MODES)]) for number, family in enumerate(TINY_FAMILIES)}
COVER |= {("mllama", "full"), ("mllama", "qlora")}


def test_the_cover_has_every_family_and_every_mode() -> None:
    assert {family for family, _ in COVER} == set(TINY_FAMILIES)
    for layout, modes in (("shared_prefix", set(MODES)), ("concatenated", {"full", "qlora"})):
        assert modes <= {mode for family, mode in COVER if layouts_of(family)[0] == layout}


def batch_of(family: str, model: PairModel) -> PairBatch:
    rng = np.random.default_rng(0)
    pairs = [make_pair(family, rng, 1, 3, 3, 3, sample_index) for sample_index in range(32)]
    return build_batch(pairs, "response", model.layout, collate=model.family.collate)


def learn(model: PairModel, batch: PairBatch, learning_rate: float) -> tuple[float, float, int]:
    """Return the NLL of the chosen answers at the start and at the end, and the steps until it fell below a tenth."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, betas=(0.9, 0.98))
    first = last = 0.0
    for step in range(120):
        loss, sums = ORPO(0.1).loss(model(batch), batch.weights, Normaliser(32.0))
        last = float(sums["nll"]) / 32
        first = first or last
        if last < 0.1 * first:
            return first, last, step
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return first, last, 120


@torch.no_grad()
def logps(model: PairModel, batch: PairBatch) -> PairLogps:
    return model.eval()(batch)


@pytest.mark.parametrize(
    ("family", "mode"),
    [
        pytest.param(family, mode, marks=[] if (family, mode) in COVER else pytest.mark.nightly)
        for family, mode in product(TINY_FAMILIES, MODES)
    ],
)
def test_learns_by_heart_and_is_the_same_when_exported(
    folders: dict[str, str], family: str, mode: str, tmp_path: Path
) -> None:
    options, learning_rate = MODES[mode]
    model_config = ModelConfig.model_validate({"id": folders[family], **options})
    model = PairModel(load_model(model_config, CPU, seed=0), NORM)
    assert model.layout == layouts_of(family)[0]
    batch = batch_of(family, model)
    first, last, steps = learn(model, batch, learning_rate)
    assert last < 0.1 * first, f"{first:.3f} -> {last:.3f} in {steps} steps"

    expected = logps(model, batch)
    if model_config.lora is None:
        model.model.save_pretrained(tmp_path / "final")
        again = load_model(ModelConfig(id=str(tmp_path / "final")), CPU, seed=0)
    else:
        save_adapter(model.model, model.model.state_dict(), model_config, tmp_path / "final")
        again = load_merged_model(model_config, tmp_path / "final", seed=0)
    found = PairModel(again, NORM)
    shared_prefix.register()
    run_as(found, model.layout)
    got = logps(found, batch)
    # A weight merged from 4 bits is its dequantized value plus the adapters, as in training.
    for name in ("chosen", "rejected"):
        torch.testing.assert_close(getattr(got, name), getattr(expected, name), rtol=1e-4, atol=1e-4, msg=name)
