"""Run folders as training writes them, made without training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from orpo_ray.config.recipe import Recipe
from orpo_ray.config.schema import ModelConfig
from orpo_ray.model.adapter_folder import save_adapter
from orpo_ray.model.loading import is_adapted, load_model
from orpo_ray.processing.processor import load_processor
from orpo_ray.training.checkpoint import POSITION_FILE
from orpo_ray.training.manifest import write_manifest

CPU = torch.device("cpu")


METRICS = {
    "step": 10, "eval/rewards/accuracies": 0.875, "eval/rewards/accuracies_exchanged": 0.5, "eval/grounding_gap": 0.375,
    "eval/rewards/margins": 0.25, "eval/nll_loss": 0.125, "eval/pairs": 48,
}  # fmt: skip


def called_directly(model_config: ModelConfig) -> ModelConfig:
    """Select concatenated attention, so that the model can be called without the layout of a packed row."""
    return model_config.model_copy(update={"attention": "concatenated"})


def trained(recipe: Recipe) -> Any:
    """Load the recipe's model and train it for a few steps on random tokens."""
    model: Any = load_model(called_directly(recipe.model), CPU, 0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        ids = torch.randint(20, 250, (2, 24), generator=generator)
        ids[:, 4:20] = model.config.image_token_id
        pixels = torch.rand(2, 1, 3, 64, 64, generator=generator).to(model.dtype)
        model(input_ids=ids, pixel_values=pixels, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def finished_run(recipe: Recipe, model: Any) -> Path:
    """Write a run folder as training would."""
    run = Path(recipe.run_uri)
    final = run / "final"
    if is_adapted(model):
        save_adapter(model, model.state_dict(), recipe.model, final)
    else:
        model.save_pretrained(final)
    load_processor(recipe.model.id, None).save_pretrained(final)
    (run / "recipe.yaml").write_text(recipe.with_absolute_paths().to_yaml())
    (run / "metrics.jsonl").write_text(json.dumps({"step": 10, "train/loss": 1.0}) + "\n" + json.dumps(METRICS) + "\n")
    bad = {"id": "7", "source": "/secret/mine.jsonl:7", "reason": "too_long", "detail": "900 tokens"}
    (run / "bad_rows.jsonl").write_text(json.dumps(bad) + "\n")
    checkpoint_of(run, "checkpoint_1", num_rows=1234)
    return run


def checkpoint_of(run: Path, name: str, num_rows: int) -> Path:
    """Write a checkpoint without a state, as one worker would."""
    folder = run / name
    folder.mkdir()
    (folder / POSITION_FILE).write_text(json.dumps({"num_rows": num_rows}))
    write_manifest(folder, step=10, rank=0, num_workers=1)
    return folder
