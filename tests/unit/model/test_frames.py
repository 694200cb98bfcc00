"""Frames of a video train as several images of a prompt, in the families that are trained on videos and in others."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from orpo_ray.data.encoding import EncodedPair, PairEncoder
from orpo_ray.data.from_recipe import all_data
from orpo_ray.data.packing import build_batch
from orpo_ray.model import shared_prefix
from orpo_ray.objective.base import Normaliser
from orpo_ray.objective.orpo import ORPO
from orpo_ray.objective.pair_model import PairModel
from orpo_ray.processing.pixel_norm import PixelNorm
from orpo_ray.processing.processor import load_processor
from orpo_ray.streaming.pipeline import encode_rows
from orpo_ray.tiny_models.families import TINY_FAMILIES
from support.families import with_processor
from support.pairs_by_hand import layouts_of, run_as
from support.row_images import write_frames
from support.sources import read_all, write_jsonl
from support.tiny_runs import tiny_recipe


@pytest.mark.parametrize("family", with_processor(["smolvlm", "llava_onevision", "qwen2_5_vl", "gemma3", "internvl"]))
def test_frames_train_and_their_order_matters(family: str, tmp_path: Path) -> None:
    """Two clips are the same frames, forwards and backwards; only their order tells which answer is better."""
    write_frames(tmp_path / "clip", 6)
    forwards = [f"clip/frame{number}.png" for number in range(1, 7)]
    answers = ({"chosen": "it grows", "rejected": "it fades"}, {"chosen": "it fades", "rejected": "it grows"})
    rows = [
        {"prompt": "what happens?", "videos": videos} | each
        for videos, each in zip((["clip"], [forwards[::-1]]), answers, strict=True)
    ]
    data = {"train": str(write_jsonl(tmp_path / "a.jsonl", rows)), "max_frames": 3, "max_length": 2048}
    read, _ = all_data(tiny_recipe(tmp_path, "run", model={"id": f"orpo-ray/tiny-{family}"}, data=data))
    processor = load_processor(f"orpo-ray/tiny-{family}", None)
    encoded = encode_rows(read_all(read), PairEncoder(processor, max_length=2048))
    pairs = [item for item in encoded if isinstance(item, EncodedPair)]
    assert len(pairs) == 2, encoded
    first, second = pairs
    assert first.prompt_ids.tolist() == second.prompt_ids.tolist()  # as many tokens, in the same places
    assert (first.images["pixel_values"] != second.images["pixel_values"]).any()

    torch.manual_seed(0)
    shared_prefix.register()
    model = PairModel(TINY_FAMILIES[family]().model().train(), PixelNorm.of(processor))
    layout = layouts_of(family)[0]
    run_as(model, layout)
    batch = build_batch(pairs, "response", layout, collate=model.family.collate)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        logps = model(batch)
        loss, _ = ORPO(1.0).loss(logps, batch.weights, Normaliser(len(pairs)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        logps = model(batch)
    assert (logps.chosen > logps.rejected).all()
