"""Answers of the model itself to held-out prompts."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from orpo_ray.config.schema import ModelConfig
from orpo_ray.data.encoding import PairEncoder
from orpo_ray.data.from_recipe import held_out_data
from orpo_ray.data.pairs import PreferencePair
from orpo_ray.errors import RowError
from orpo_ray.evaluation.generation import Answerer, generate_held_out
from orpo_ray.model.loading import load_model
from orpo_ray.processing.processor import load_processor
from orpo_ray.tiny_models.build import resolve
from orpo_ray.tiny_models.families import TINY_FAMILIES
from support.families import with_processor
from support.tiny_runs import tiny_recipe, write_pairs

CPU = torch.device("cpu")
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3)).astype(np.uint8))
# A packed row, one with bidirectional images, and cross-attention.
FAMILIES = ("smolvlm", "gemma3", "idefics")


def asked(images: int) -> PreferencePair:
    buffer = io.BytesIO()
    NOISE.save(buffer, "png")
    content: list[dict[str, Any]] = [{"type": "image"}] * images
    prompt = [{"role": "user", "content": [*content, {"type": "text", "text": "What is this?"}]}]
    return PreferencePair("1", [{"bytes": buffer.getvalue(), "path": None}] * images, prompt, "a", "b")


def plain_answer(model_id: str, pair: PreferencePair, images: list[Any], tokens: int) -> list[int]:
    """What plain transformers answers."""
    from transformers import AutoModelForImageTextToText

    processor = load_processor(model_id, None)
    model = AutoModelForImageTextToText.from_pretrained(resolve(model_id), dtype=torch.float32).eval()
    text = processor.apply_chat_template(pair.prompt, add_generation_prompt=True, tokenize=False)
    take, given = (processor, {"images": [images]}) if images else (processor.tokenizer, {})
    inputs = take(text=[text], **given, add_special_tokens=False, return_tensors="pt")
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=tokens, eos_token_id=None, pad_token_id=0)
    return ids[0, inputs["input_ids"].shape[1] :].tolist()


class Kept:
    """A streamer that keeps token ids."""

    def __init__(self) -> None:
        self.calls: list[list[int]] = []

    def put(self, value: torch.Tensor) -> None:
        self.calls.append(value.flatten().tolist())

    def end(self) -> None:
        pass


@pytest.mark.parametrize("family", with_processor(FAMILIES))
def test_greedy_answers_are_those_of_plain_transformers(family: str) -> None:
    answers_are_plain(family)


@pytest.mark.nightly
@pytest.mark.parametrize("family", with_processor(set(TINY_FAMILIES) - set(FAMILIES)))
def test_greedy_answers_of_the_other_families(family: str) -> None:
    answers_are_plain(family)


def answers_are_plain(family: str) -> None:
    model_id = f"orpo-ray/tiny-{family}"
    encoder = PairEncoder(load_processor(model_id, None), 512)
    model = load_model(ModelConfig(id=model_id, dtype="float32"), CPU, 0).eval()
    answerer = Answerer(model, encoder, 5)
    answerer.endings = []
    for count in (1,) if family == "idefics" else (1, 0):
        pair, kept = asked(count), Kept()
        text, images = encoder.prompt_of(pair, None)
        answer = answerer.answer(text, images, streamer=kept)
        own = [token for call in kept.calls[1:] for token in call]
        if family != "idefics":  # its processor takes no prompt with images inside
            assert own == plain_answer(model_id, pair, images, 5), count
        assert len(own) == 5
        assert answer == encoder.tokenizer.decode(own, skip_special_tokens=True).strip()
    assert model.config.get_text_config()._attn_implementation in ("orpo_ray_shared_prefix", "sdpa", "eager")


@pytest.fixture(scope="module")
def answerer() -> Answerer:
    model_id = "orpo-ray/tiny-smolvlm"
    encoder = PairEncoder(load_processor(model_id, None), 512)
    return Answerer(load_model(ModelConfig(id=model_id), CPU, 0), encoder, 8)


def test_sampling_depends_on_the_seed_alone_and_leaves_dropout_alone(answerer: Answerer) -> None:
    text, images = answerer.encoder.prompt_of(asked(1), None)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    answers = [answerer.answer(text, images, seed=seed) for seed in (3, 4, 3)]
    assert answers[0] == answers[2]
    assert answers[0] != answers[1]
    assert torch.equal(torch.get_rng_state(), before)


def test_an_answer_ends_where_the_chat_template_ends_one(answerer: Answerer) -> None:
    tokens = answerer.encoder.tokenizer.convert_ids_to_tokens(answerer.endings)
    assert "<end_of_utterance>" in tokens


def test_workers_divide_the_pairs_and_bad_rows_are_left_out(answerer: Answerer, tmp_path: Path) -> None:
    data = write_pairs(tmp_path, 6)
    lines = data.read_text().splitlines()
    lines[1] = '{"prompt": "?"}'
    data.write_text("\n".join(lines) + "\n")
    recipe = tiny_recipe(tmp_path, "run", data={"train": "easy-vqa:train", "eval": str(data)})
    held_out = held_out_data(recipe)
    assert held_out is not None
    alone = generate_held_out(answerer, held_out, 6)
    assert len(alone) == 5
    assert all(len(each.images) == 1 and each.images[0][:2] == b"\xff\xd8" for each in alone)
    halves = [generate_held_out(answerer, held_out, 6, rank, 2) for rank in (0, 1)]
    assert sorted([*halves[0], *halves[1]], key=lambda each: each.sample_index) == alone
    assert len(generate_held_out(answerer, held_out, 2)) <= 2
    assert answerer.base.training


def test_prompts_that_do_not_fit_are_left_out(answerer: Answerer, tmp_path: Path) -> None:
    data = write_pairs(tmp_path, 3)
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    rows[0]["prompt"] = "word " * 600
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    held_out = held_out_data(tiny_recipe(tmp_path, "run", data={"train": "easy-vqa:train", "eval": str(data)}))
    assert held_out is not None
    assert len(generate_held_out(answerer, held_out, 3)) == 2
    with pytest.raises(RowError, match="refused_by_processor"):
        answerer.answer("two <image> <image>", [NOISE])
