"""Several answers in one batch: each drawn with its own seed and temperature."""

from __future__ import annotations

import math

import pytest
import torch
from PIL import Image

from orpo_ray.config.schema import ModelConfig
from orpo_ray.data.encoding import PairEncoder
from orpo_ray.errors import RowError
from orpo_ray.evaluation.draws import Draw, OneTokenEach
from orpo_ray.evaluation.generation import Answerer
from orpo_ray.model.loading import load_model
from orpo_ray.processing.processor import load_processor

CPU = torch.device("cpu")
RED = Image.new("RGB", (32, 32), "red")
MESSAGE = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}


def tokens(draws: list[Draw], logits: torch.Tensor) -> list[int]:
    only = OneTokenEach(draws, CPU)(torch.zeros(len(draws), 1), logits.repeat(len(draws), 1))
    assert torch.equal(only.isfinite().sum(1), torch.ones(len(draws), dtype=torch.int64))
    return only.argmax(1).tolist()


def test_draws_follow_the_softmax_at_their_temperature() -> None:
    """Odds of 1 : 2 : 4 at temperature 1, and of 1 : 4 : 16 at 0.5; always the last one at 0."""
    logits = torch.tensor([0.0, math.log(2), math.log(4)])
    for temperature, odds in ((1.0, [1, 2, 4]), (0.5, [1, 4, 16])):
        drawn = torch.tensor(tokens([Draw(temperature, seed) for seed in range(4000)], logits))
        expected = torch.tensor(odds, dtype=torch.float64) / sum(odds)
        assert torch.allclose(torch.bincount(drawn, minlength=3) / 4000, expected.float(), atol=0.025)
    assert tokens([Draw(0.0, seed) for seed in range(9)], logits) == [2] * 9


def test_a_draw_depends_on_its_own_seed_alone() -> None:
    logits = torch.randn(50, generator=torch.Generator().manual_seed(0))
    draws = [Draw(1.0, seed) for seed in (5, 6, 7, 5)]
    together = tokens(draws, logits)
    assert together == [tokens([draw], logits)[0] for draw in draws]
    assert together[0] == together[3]
    assert len(set(together)) > 1


@pytest.fixture(scope="module")
def answerer() -> Answerer:
    model_id = "orpo-ray/tiny-smolvlm"
    encoder = PairEncoder(load_processor(model_id, None), 128)
    return Answerer(load_model(ModelConfig(id=model_id, dtype="float32"), CPU, 0).eval(), encoder, 4)


def test_a_model_draws_several_answers_and_says_which_it_ended(answerer: Answerer) -> None:
    text = answerer.encoder.render([MESSAGE], add_generation_prompt=True)
    draws = [Draw(0.0, 1), Draw(1.0, 2), Draw(1.0, 3), Draw(1.0, 2)]
    before = torch.get_rng_state()
    found = answerer.draw(text, [RED], draws)
    assert torch.equal(torch.get_rng_state(), before)
    assert found == answerer.draw(text, [RED], draws)
    assert found[0].text == answerer.answer(text, [RED])  # temperature 0: the most likely tokens
    assert found[1] == found[3] != found[2]
    # A model of random weights ends nothing; if any token is an end, it ends everything.
    assert not any(each.finished for each in found)
    answerer.endings, kept = list(range(len(answerer.encoder.tokenizer))), answerer.endings
    try:
        assert [(each.text, each.finished) for each in answerer.draw(text, [RED], draws[:1])] == [("", True)]
    finally:
        answerer.endings = kept


def test_a_prompt_that_fills_the_length_is_refused(answerer: Answerer) -> None:
    long = {"role": "user", "content": [{"type": "text", "text": "word " * 150}]}
    with pytest.raises(RowError, match=r"too_long: .*data\.max_length is 128"):
        answerer.draw(answerer.encoder.render([long], add_generation_prompt=True), [], [Draw(0.0, 0)])
