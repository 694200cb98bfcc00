"""Peak memory of training steps on the GPU, against `orpo-ray plan`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from orpo_ray.config.load import parse_recipe
from orpo_ray.config.schema import ModelConfig
from orpo_ray.model.loading import load_base
from orpo_ray.objective.base import Normaliser
from orpo_ray.objective.orpo import ORPO
from orpo_ray.objective.pair_model import PIXELS_AT_ONCE, PairModel
from orpo_ray.planning.activations import batch_of
from orpo_ray.planning.plan import Options, plan
from orpo_ray.planning.workload import estimate_workload
from orpo_ray.training.engine import make_engine
from orpo_ray.training.sharded_loading import load_for_training
from support.engine_memory import end_engine
from support.pairs_by_hand import NORM

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("process_group")]


def random_smolvlm(folder: Path, on_gpu: bool) -> str:
    """Save a model of SmolVLM's kind with random weights: 120 million parameters, on a CPU only a few."""
    from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration

    wide, layers, vocab = (768, 12, 32000) if on_gpu else (64, 2, 512)
    heads = {"num_attention_heads": wide // 64, "hidden_size": wide, "num_hidden_layers": layers}
    text = heads | {
        "model_type": "llama", "intermediate_size": 2 * wide, "num_key_value_heads": wide // 64, "vocab_size": vocab,
        "pad_token_id": 2,
    }  # fmt: skip
    vision = heads | {"intermediate_size": 2 * wide, "image_size": 512 if on_gpu else 64, "patch_size": 16}
    config = SmolVLMConfig(
        text_config=text, vision_config=vision, scale_factor=4, image_token_id=vocab - 2, tie_word_embeddings=False
    )
    SmolVLMForConditionalGeneration(config).to(torch.bfloat16).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("tuning", [{}, {"gradient_checkpointing": "full"}, {"lora": {"r": 16}}], ids=str)
def test_peak_memory_is_the_plan_s(tuning: dict[str, Any], device: torch.device, tmp_path: Path) -> None:
    """Two steps of two micro-batches. The CUDA context and fragmentation, which the plan adds, are not counted."""
    on_gpu = device.type == "cuda"
    model_id = random_smolvlm(tmp_path / "model", on_gpu)
    raw: dict[str, Any] = {
        "name": "planned", "model": {"id": model_id, "dtype": "bfloat16", **tuning}, "data": {"train": "none"},
        "optim": {"pairs_per_step": 4}, "checkpoint": {"storage": str(tmp_path)},
    }  # fmt: skip
    # Micro-batches of three pairs without room for more, since the plan is for full ones.
    tokens = plan(parse_recipe(raw), Options())["step"]["pair"]["tokens"]
    raw["optim"]["tokens_per_microbatch"] = 3 * tokens
    recipe = parse_recipe(raw)
    report = plan(recipe, Options())
    assert report["step"]["pairs_per_microbatch"] == 3
    memory = report["memory"]["0"]
    predicted = memory["total"] - memory["overhead"]
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if on_gpu else 0
    bounded = PIXELS_AT_ONCE[device.type] if recipe.model.gradient_checkpointing != "none" else None
    model = PairModel(load_for_training(recipe, device), NORM, bounded)
    engine: Any = make_engine(model, recipe, 10, 1)
    config: Any = model.model.config
    work = estimate_workload(recipe, config, None)
    batch = batch_of(work.shape, report["step"]["pairs_per_microbatch"], config, "response", model.layout).to(device)
    for _ in range(2):
        for _ in range(2):
            loss, _ = ORPO(0.1).loss(engine.forward(batch), batch.weights, Normaliser(4.0))
            engine.backward(loss)
        engine.step()
    end_engine(engine)
    assert predicted > 0
    if on_gpu:
        assert torch.cuda.max_memory_allocated() - before == pytest.approx(predicted, rel=0.1)


def test_weights_are_read_straight_into_the_gpu(device: torch.device, tmp_path: Path) -> None:
    """Workers of a node would otherwise each have the whole model in main memory."""
    model = load_base(ModelConfig(id=random_smolvlm(tmp_path, device.type == "cuda")), device)
    assert {weight.device.type for weight in model.parameters()} == {device.type}
