"""Peak memory of training steps on the GPU, against `orpo-ray plan`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from orpo_ray.config.load import parse_recipe
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


TOO_HIGH = pytest.mark.xfail(reason="the plan was 13 % above what an H200 needed; the cause is not known")
TUNINGS = [pytest.param({}, marks=TOO_HIGH), {"gradient_checkpointing": "full"}, {"lora": {"r": 16}}]


@pytest.mark.parametrize("tuning", TUNINGS, ids=str)
def test_peak_memory_is_the_plan_s(tuning: dict[str, Any], device: torch.device, tmp_path: Path) -> None:
    """Two steps of two micro-batches. The CUDA context and fragmentation, which the plan adds, are not counted."""
    on_gpu = device.type == "cuda"
    model_id = random_smolvlm(tmp_path / "model", on_gpu)
    recipe = parse_recipe(
        {"name": "planned", "model": {"id": model_id, "dtype": "bfloat16", **tuning}, "data": {"train": "none"},
         "optim": {"pairs_per_step": 4, "tokens_per_microbatch": 4096}, "checkpoint": {"storage": str(tmp_path)}}
    )  # fmt: skip
    report = plan(recipe, Options())
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
