"""What vLLM's stage of `ray.data.llm` is given, and what is made of its answers. vLLM itself is not installed here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing

from orpo_ray.config.recipe import Recipe
from orpo_ray.config.schema import QuantizationConfig
from orpo_ray.errors import RowError, UserError
from orpo_ray.evaluation.draws import Draw, Drawn
from orpo_ray.storage.run_folder import RunFolder
from orpo_ray.synthesis.engines.drafts import DraftEngine, DraftsIncomplete, draft_key, write_drafts
from orpo_ray.synthesis.engines.vllm_engine import OWN, check_vllm, vllm_answer, vllm_config, vllm_request
from orpo_ray.synthesis.local_model import LocalModel
from orpo_ray.synthesis.part import Job, PartMaker
from orpo_ray.synthesis.source import source_rows
from orpo_ray.tiny_models.build import resolve
from support.synthesis import picture, row_of, write_questions
from support.tiny_runs import tiny_recipe


def recipe(tmp_path: Path, **fields: Any) -> Recipe:
    return tiny_recipe(tmp_path, "x", synthesize={"engine": "vllm", "max_new_tokens": 9, **fields})


def test_the_config_is_one_of_ray_data_llm(tmp_path: Path) -> None:
    """Its class refuses unknown fields and wrong types."""
    from ray.data.llm import vLLMEngineProcessorConfig

    own = recipe(tmp_path, num_workers=3)
    config = vllm_config(own, LocalModel(own))
    assert isinstance(config, vLLMEngineProcessorConfig)
    assert (config.model_source, config.concurrency) == (resolve("orpo-ray/tiny-smolvlm"), 3)
    assert config.engine_kwargs["max_model_len"] == 128 + 9
    stages = ("chat_template_stage", "tokenize_stage", "detokenize_stage", "prepare_multimodal_stage")
    assert not any(getattr(config, name) for name in stages)


def test_requests_have_the_keys_that_the_stage_knows() -> None:
    from ray.llm._internal.batch.stages.vllm_engine_stage import vLLMEngineStage

    own = {"part": 1, "of": 2, "key": "k"}
    row = own | {"prompt": "<image>?", "tokens": [5, 6], "images": [picture("red")], "temperature": 0.5, "seed": 7}
    request = vllm_request(9, row)
    stage = vLLMEngineStage(fn_constructor_kwargs={}, map_batches_kwargs={})
    known = {*stage.get_required_input_keys(), *stage.get_optional_input_keys()}
    assert set(stage.get_required_input_keys()) <= set(request)
    assert set(request) - known == {*OWN, "max_tokens"}
    assert request["tokenized_prompt"] == [5, 6]
    assert "prompt" not in request, "vLLM would add special tokens to a text"
    assert request["sampling_params"] == {"temperature": 0.5, "seed": 7, "max_tokens": 9, "top_p": 1.0}
    assert request["multimodal_data"]["image"][0].size == (32, 32)
    assert "multimodal_data" not in vllm_request(9, row | {"images": []})
    answered = request | {"generated_text": " red ", "num_generated_tokens": 3}
    assert vllm_answer(answered) == own | {"text": "red", "finished": True}
    assert not vllm_answer(answered | {"num_generated_tokens": 9})["finished"]


def test_tokens_are_those_that_the_other_engines_give_the_model(tmp_path: Path) -> None:
    """Also of a tokenizer that puts a special token before each text."""
    own = recipe(tmp_path, source=str(write_questions(tmp_path / "rows", 3)), candidates=2)
    maker = PartMaker(Job(own.model_dump(mode="json"), source_rows(own), frozenset()))
    tokenizer = maker._model.encoder.tokenizer
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", tokenizer.convert_tokens_to_ids("<|im_start|>"))]
    )
    requests = maker.requests(0)
    assert len(requests) == 6
    for each in requests:
        assert tokenizer(each["prompt"])["input_ids"] != each["tokens"]
        assert tokenizer(each["prompt"], add_special_tokens=False)["input_ids"] == each["tokens"]
        assert vllm_request(3, each)["tokenized_prompt"] == each["tokens"]


def test_what_vllm_cannot_do_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = recipe(tmp_path)
    with pytest.raises(UserError, match=r"synthesize\.engine: vLLM is not installed"):
        check_vllm(own, LocalModel(own))
    monkeypatch.setattr("orpo_ray.synthesis.engines.vllm_engine.find_spec", lambda name: object())
    check_vllm(own, LocalModel(own))
    quantized = recipe(tmp_path)
    config = quantized.model.model_copy(update={"quantization": QuantizationConfig()})
    quantized = quantized.model_copy(update={"model": config})
    with pytest.raises(UserError, match=r"model\.quantization: vLLM loads whole weights"):
        check_vllm(quantized, LocalModel(quantized))
    degraded = recipe(tmp_path, label="corruption", corruptions=["noise"])
    with pytest.raises(UserError, match="degraded images cannot be drawn ahead"):
        check_vllm(degraded, LocalModel(degraded))


def test_answers_are_found_by_prompt_images_and_draw(tmp_path: Path) -> None:
    own = recipe(tmp_path)
    folder, draws = RunFolder(str(tmp_path)), [Draw(0.5, 1), Draw(0.5, 2)]
    rows = [row_of(0), row_of(1), row_of(0, question="Another?")]
    answers = {draft_key(row, draw): Drawn(f"{row.id} {draw.seed}", True) for row in rows[:2] for draw in draws}
    assert len(answers) == 4
    write_drafts(folder, 3, answers)
    engine = DraftEngine(folder, LocalModel(own))
    engine.prepare(3)
    found = engine.answers(rows[:2], [draws, draws[:1]])
    assert found == [[Drawn("r0 1", True), Drawn("r0 2", True)], [Drawn("r1 1", True)]]
    with pytest.raises(DraftsIncomplete, match="an answer is missing"):
        engine.answers(rows[2:], [draws])
    long = row_of(5, question="word " * 200)
    (refused,) = engine.answers([long], [draws])
    assert isinstance(refused, RowError)
    assert refused.reason == "too_long"
