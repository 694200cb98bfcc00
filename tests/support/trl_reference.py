"""TRL's trainers as the reference for losses, on the same text-only tokens and weights."""

from __future__ import annotations

from collections.abc import Set
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from orpo_ray.config.schema import ModelConfig
from orpo_ray.data.balance import PairSize, StepTotals
from orpo_ray.data.encoding import EncodedPair
from orpo_ray.data.packing import build_batch
from orpo_ray.model.loading import load_model
from orpo_ray.objective.base import Normaliser, Objective
from orpo_ray.objective.pair_model import PairModel
from orpo_ray.processing.pixel_norm import PixelNorm
from orpo_ray.tiny_models.build import resolve

TINY = "orpo-ray/tiny-smolvlm"
# Answers have different lengths, so that sums, means per pair and means per token all differ.
ROWS = [
    {"prompt": "what is the color of the shape?", "chosen": " a red circle", "rejected": " teal"},
    {"prompt": "how many are there in the image?", "chosen": " two", "rejected": " there are three of them"},
    {"prompt": "hi", "chosen": " yes, there is.", "rejected": " no, there is not."},
]


def concatenated_model() -> PairModel:
    """Load a tiny model with concatenated attention, as in TRL."""
    section = ModelConfig(id=TINY, attention="concatenated")
    return PairModel(load_model(section, torch.device("cpu"), seed=0), PixelNorm(1.0, (0.0,), (1.0,)))


def trl_trainer(trainer: type, config: type, model: PairModel, folder: Path, **options: Any) -> Any:
    """Make one of TRL's trainers with the same weights, on text-only rows, since it takes no images."""
    from datasets import Dataset
    from transformers import AutoTokenizer

    arguments = config(
        output_dir=str(folder), max_length=512, per_device_train_batch_size=len(ROWS), report_to=[], use_cpu=True,
        bf16=False, gradient_checkpointing=False, disable_tqdm=True, remove_unused_columns=False, **options,
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(resolve(TINY))
    return trainer(model=model.model, args=arguments, train_dataset=Dataset.from_list(ROWS), processing_class=tokenizer)


def assert_equals_trl(
    objective: Objective, trainer: Any, model: PairModel, row_indices: list[int], absent: Set[str] = frozenset()
) -> None:
    """Loss, metrics and the gradient of every parameter equal TRL's, in both layouts, except metrics in `absent`."""
    rows = [trainer.train_dataset[index] for index in row_indices]
    pairs = [_encoded(row) for row in rows]
    model.zero_grad()
    theirs, their_metrics = trainer.get_batch_loss_metrics(trainer.model, trainer.data_collator(rows))
    theirs.backward()
    their_gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert len(their_gradients) > 20
    for own in (model, _packed(model)):
        own.zero_grad()
        loss, metrics = _run(objective, own, pairs)
        loss.backward()
        torch.testing.assert_close(loss, theirs, rtol=0, atol=1e-5)
        assert metrics["loss"] == pytest.approx(theirs.item(), abs=1e-5)
        assert not absent & metrics.keys()
        for name, value in their_metrics.items():
            if not name.startswith("logits/") and name not in absent:
                assert metrics[name] == pytest.approx(value, abs=1e-5), (own.layout, name)
        for name, parameter in own.named_parameters():
            if name in their_gradients:
                torch.testing.assert_close(
                    parameter.grad, their_gradients[name], rtol=1e-5, atol=1e-5, msg=f"{own.layout} {name}"
                )
            else:
                assert parameter.grad is None, name


def _encoded(row: dict[str, Any]) -> EncodedPair:
    """Return the tokens of a row that TRL trains on, including bos and eos."""
    prompt = np.asarray(row["prompt_input_ids"], np.int32)
    chosen, rejected = (
        np.asarray(row[f"{name}_input_ids"][len(prompt) :], np.int32) for name in ("chosen", "rejected")
    )
    assert row["chosen_labels"][len(prompt) :] == chosen.tolist()
    return EncodedPair("x", prompt, chosen, rejected, np.ones(len(prompt), bool), {})


def _packed(model: PairModel) -> PairModel:
    """The same weights in the shared-prefix layout."""
    packed = load_model(ModelConfig(id=TINY), torch.device("cpu"), seed=0)
    packed.load_state_dict(model.model.state_dict())
    return PairModel(packed, PixelNorm(1.0, (0.0,), (1.0,)))


def _run(objective: Objective, model: PairModel, pairs: list[EncodedPair]) -> tuple[torch.Tensor, dict[str, float]]:
    tokens = StepTotals.of([PairSize.of(pair) for pair in pairs]).nll_tokens(objective.nll_span)
    batch = build_batch(pairs, objective.nll_span, model.layout)
    normaliser = Normaliser(len(pairs), tokens if objective.nll_average == "token" else None)
    loss, sums = objective.loss(model(batch), batch.weights, normaliser)
    return loss, objective.metrics({name: float(value) for name, value in sums.items()})
