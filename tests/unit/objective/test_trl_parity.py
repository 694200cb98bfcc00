"""ORPO equals TRL's ORPOTrainer on the same text-only tokens and weights: loss, metrics and gradients."""

from __future__ import annotations

from typing import Any

import pytest

from orpo_ray.objective.orpo import ORPO
from orpo_ray.objective.pair_model import PairModel
from support.trl_reference import assert_equals_trl, concatenated_model, trl_trainer


@pytest.fixture(scope="module")
def model() -> PairModel:
    return concatenated_model()


@pytest.fixture(scope="module")
def trainer(model: PairModel, tmp_path_factory: pytest.TempPathFactory) -> Any:
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    return trl_trainer(ORPOTrainer, ORPOConfig, model, tmp_path_factory.mktemp("trl"), beta=0.3)


@pytest.mark.parametrize("rows", [[0], [1], [2], [0, 1, 2]], ids=str)
def test_orpo_equals_trl(model: PairModel, trainer: Any, rows: list[int]) -> None:
    assert_equals_trl(ORPO(beta=0.3, nll="prompt+response"), trainer, model, rows)
