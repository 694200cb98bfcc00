"""Against the original: TRL's ORPOTrainer on the same text-only tokens and weights, value and gradient."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from orpo_ray.config.schema import ModelConfig
from orpo_ray.data.encoding import EncodedPair
from orpo_ray.data.packing import build_batch, nll_token_count
from orpo_ray.model.loading import load_model
from orpo_ray.objective.forward import PairModel
from orpo_ray.objective.orpo import Normaliser, metrics_from_sums, orpo_loss
from orpo_ray.processing.pixel_norm import PixelNorm

BETA = 0.3
ROWS = [
    {"prompt": "what is the color of the shape?", "chosen": " a red circle", "rejected": " teal"},
    {"prompt": "how many are there in the image?", "chosen": " two", "rejected": " there are three of them"},
    {"prompt": "hi", "chosen": " yes, there is.", "rejected": " no, there is not."},
]


@pytest.fixture(scope="module")
def model() -> PairModel:
    section = ModelConfig(id="orpo-ray/tiny-smolvlm", attention="concatenated")
    return PairModel(load_model(section, torch.device("cpu"), seed=0), PixelNorm(1.0, (0.0,), (1.0,)))


@pytest.fixture(scope="module")
def trainer(model: PairModel, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """TRL's trainer around the very same weights; it takes no image, so the rows have none."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    from orpo_ray.tiny_models.build import resolve

    folder: Path = tmp_path_factory.mktemp("trl")
    arguments = ORPOConfig(
        output_dir=str(folder), beta=BETA, max_length=512, per_device_train_batch_size=len(ROWS), report_to=[],
        use_cpu=True, bf16=False, gradient_checkpointing=False, disable_tqdm=True, remove_unused_columns=False,
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(resolve("orpo-ray/tiny-smolvlm"))
    return ORPOTrainer(
        model=model.model, args=arguments, train_dataset=Dataset.from_list(ROWS), processing_class=tokenizer
    )


def encoded(row: dict[str, Any]) -> EncodedPair:
    """TRL's own tokens of a row: what it trains on, its added bos and eos included."""
    prompt = np.asarray(row["prompt_input_ids"], np.int32)
    chosen, rejected = (
        np.asarray(row[f"{name}_input_ids"][len(prompt) :], np.int32) for name in ("chosen", "rejected")
    )
    assert row["chosen_labels"][len(prompt) :] == chosen.tolist()
    return EncodedPair("x", prompt, chosen, rejected, np.ones(len(prompt), bool), {})


@pytest.fixture
def packed(model: PairModel) -> PairModel:
    """The very same weights, run in the shared-prefix layout."""
    packed = load_model(ModelConfig(id="orpo-ray/tiny-smolvlm"), torch.device("cpu"), seed=0)
    packed.load_state_dict(model.model.state_dict())
    return PairModel(packed, PixelNorm(1.0, (0.0,), (1.0,)))


def ours(model: PairModel, pairs: list[EncodedPair]) -> tuple[torch.Tensor, dict[str, float]]:
    tokens = sum(nll_token_count(pair, "prompt+response") for pair in pairs)
    batch = build_batch(pairs, "prompt+response", model.layout)
    loss, sums = orpo_loss(model(batch), batch.weights, BETA, Normaliser(len(pairs), tokens))
    return loss, metrics_from_sums({name: float(value) for name, value in sums.items()}, BETA)


@pytest.mark.parametrize("chosen_rows", [[0], [1], [2], [0, 1, 2]], ids=str)
def test_loss_metrics_and_gradient(model: PairModel, packed: PairModel, trainer: Any, chosen_rows: list[int]) -> None:
    rows = [trainer.train_dataset[index] for index in chosen_rows]
    model.zero_grad()
    theirs, their_metrics = trainer.get_batch_loss_metrics(trainer.model, trainer.data_collator(rows))
    theirs.backward()
    their_gradients = {
        name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None
    }
    assert len(their_gradients) > 20
    for own in (model, packed):
        own.zero_grad()
        loss, metrics = ours(own, [encoded(row) for row in rows])
        loss.backward()
        torch.testing.assert_close(loss, theirs, rtol=0, atol=1e-5)
        for name, value in their_metrics.items():
            if not name.startswith("logits/"):
                assert metrics[name] == pytest.approx(value, abs=1e-5), (own.layout, name)
        for name, parameter in own.named_parameters():
            if name in their_gradients:
                torch.testing.assert_close(
                    parameter.grad, their_gradients[name], rtol=1e-5, atol=1e-5, msg=f"{own.layout} {name}"
                )
            else:
                assert parameter.grad is None, name
