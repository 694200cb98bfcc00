"""Gradient checkpointing: every mode computes the same, and keeps and recomputes what its name says."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from orpo_ray.config.field_types import Checkpointing
from orpo_ray.config.schema import LoraConfig, ModelConfig
from orpo_ray.data.packing import build_batch
from orpo_ray.model.loading import load_model, without_adapters
from orpo_ray.objective.pair_model import PairModel
from orpo_ray.planning import activations
from orpo_ray.planning.activations import Activations
from orpo_ray.planning.dry_run import Live, dry_run
from orpo_ray.tiny_models.families import TINY_FAMILIES
from support.cover import cover
from support.pairs_by_hand import NORM, assert_equal, layouts_of, make_row, run, run_as, tiny_pair_model

ROW = [(2, 6, 5, 4), (1, 5, 3, 6), (0, 4, 2, 3)]
MODES: list[Checkpointing] = ["none", "selective", "full"]
# The adapters of `tiny_pair_model` are named after modules that Idefics does not have.
FAMILIES = [family for family in TINY_FAMILIES if family != "idefics"]
CASES = [("idefics", False), *cover(FAMILIES, [False, True])]


@pytest.mark.parametrize(("family", "lora"), CASES)
def test_every_mode_has_the_same_gradients(family: str, lora: bool) -> None:
    pairs, layout = make_row(family, ROW), layouts_of(family)[0]
    expected = run(tiny_pair_model(family, lora), pairs, layout)
    for mode in MODES[1:]:
        assert_equal(run(tiny_pair_model(family, lora, mode), pairs, layout), expected)


@pytest.mark.parametrize(("family", "mode"), cover(["smolvlm", "llava_next", "qwen2_5_vl"], list(MODES)))
def test_backward_does_not_reach_a_frozen_vision_encoder(
    folders: dict[str, str], family: str, mode: Checkpointing
) -> None:
    config = ModelConfig(id=folders[family], lora=LoraConfig(), gradient_checkpointing=mode)
    model = PairModel(load_model(config, torch.device("cpu"), seed=0), NORM)
    batch = build_batch(make_row(family, ROW), "response", model.layout, collate=model.family.collate)
    features = model._encode_images(without_adapters(model.model), batch)
    assert not features.features.requires_grad
    assert model(batch).chosen.requires_grad


def test_so_has_a_quantized_model() -> None:
    pairs = make_row("smolvlm", ROW)

    def results(mode: str) -> Any:
        raw = {"id": "orpo-ray/tiny-smolvlm", "lora": {"r": 4}, "quantization": {}, "gradient_checkpointing": mode}
        return run(PairModel(load_model(ModelConfig(**raw), torch.device("cpu"), seed=0), NORM), pairs, "shared_prefix")

    expected = results("none")
    for mode in MODES[1:]:
        assert_equal(results(mode), expected)


def measured(family: str, mode: Checkpointing) -> tuple[Activations, Activations]:
    """What a real step keeps and needs, and what a dry run counts."""
    batch = build_batch(make_row(family, [(1, 60, 50, 40)] * 4), "response", "shared_prefix")

    def model() -> PairModel:
        prepared = tiny_pair_model(family, checkpointing=mode)
        run_as(prepared, "shared_prefix")
        return prepared

    real, dry_model = model(), model()
    with Live() as live:
        for parameter in real.parameters():
            live.add(parameter)
        kept = activations.step(real, batch, live)
    with dry_run() as dry:
        activations.move_from_meta(dry_model)
        return kept, activations.step(dry_model, batch, dry)


@pytest.mark.parametrize("family", ["smolvlm", "llava"])
def test_each_mode_keeps_less_and_only_full_repeats_matrix_products(family: str) -> None:
    real, planned = zip(*(measured(family, mode) for mode in MODES), strict=True)
    none, selective, full = (each.saved for each in real)
    assert full < 0.5 * selective
    assert selective < 0.75 * none
    assert real[2].peak < real[1].peak < real[0].peak
    flops = [each.work.flops for each in planned]
    assert flops[0] == flops[1] < 0.85 * flops[2]


@pytest.mark.parametrize(("given", "mode"), [(True, "full"), (False, "none"), ("selective", "selective")], ids=str)
def test_the_recipe_still_takes_true_and_false(given: bool | str, mode: str) -> None:
    assert ModelConfig(id="x", gradient_checkpointing=given).gradient_checkpointing == mode


def test_the_model_that_nobody_decided_for_is_recomputed_in_full() -> None:
    """Whoever loads a model without knowing the device's memory gets the mode that needs the least."""
    auto, full = (
        load_model(ModelConfig(id="orpo-ray/tiny-llava", gradient_checkpointing=mode), torch.device("cpu"), seed=0)
        for mode in ("auto", "full")
    )
    pairs = make_row("llava", ROW)
    batch = build_batch(pairs, "response", "shared_prefix")
    saved = []
    for model in (auto, full):
        with Live() as live:
            saved.append(activations.step(PairModel(model, NORM), batch, live).saved)
    assert saved[0] == saved[1]
