"""Cached features of a frozen vision encoder: equal values, computed once, and never those of other weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from orpo_ray.data.packing import build_batch
from orpo_ray.errors import UserError
from orpo_ray.objective.pair_model import PairModel
from orpo_ray.tiny_models.families import TINY_FAMILIES
from support.pairs_by_hand import NORM, make_row, tiny_pair_model

MORE = ("idefics", "mllama", "llava_onevision", "qwen3_vl")
ROW = [(2, 5, 7, 3), (0, 3, 2, 2), (1, 4, 3, 3), (3, 2, 2, 2)]


def frozen(family: str, folder: Path | None) -> PairModel:
    model = tiny_pair_model(family).model.requires_grad_(False)
    model.lm_head.requires_grad_(True)
    return PairModel(model, NORM, vision_cache=folder)


def calls_of(model: Any, family: str) -> list[int]:
    seen: list[int] = []
    base = model.model.model
    vision = next(getattr(base, name) for name in ("vision_tower", "vision_model", "visual") if hasattr(base, name))
    vision.register_forward_hook(lambda *_: seen.append(1))
    return seen


@pytest.mark.parametrize("family", [family for family in TINY_FAMILIES if family not in MORE])
def test_the_second_time_nothing_is_encoded_and_all_is_the_same(family: str, tmp_path: Path) -> None:
    model = frozen(family, None)
    batch = build_batch(make_row(family, ROW), "response", "concatenated", collate=model.family.collate)
    plain = model(batch)
    first = frozen(family, tmp_path)
    seen = calls_of(first, family)
    for name in ("chosen", "rejected"):
        torch.testing.assert_close(getattr(first(batch), name), getattr(plain, name), rtol=1e-5, atol=1e-5)
    assert seen == [1]  # the second call read all features from the cache
    second = frozen(family, tmp_path)
    seen = calls_of(second, family)
    again = second(batch)
    assert seen == []
    assert second.vision_cache is not None
    assert second.vision_cache.misses == 0 < second.vision_cache.hits
    torch.testing.assert_close(again.chosen, plain.chosen, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["smolvlm", "llava_next", "qwen2_5_vl"])
def test_files_are_named_while_the_batch_is_built(family: str, tmp_path: Path) -> None:
    """The forward pass then reads no pixels: it finds the features although the pixels are others."""
    model = frozen(family, tmp_path)
    assert model.vision_cache is not None
    named = build_batch(make_row(family, ROW), "response", "concatenated", collate=model.collate)
    expected = model(named).chosen
    named.images["pixel_values"].zero_()
    torch.testing.assert_close(model(named).chosen, expected, rtol=1e-5, atol=1e-5)
    assert model.vision_cache.misses == model.vision_cache.hits > 0


def test_both_ways_of_naming_agree(tmp_path: Path) -> None:
    pairs = make_row("llava", ROW)
    model = frozen("llava", tmp_path)
    assert model.vision_cache is not None
    for collate in (model.collate, model.family.collate):
        model(build_batch(pairs, "response", "concatenated", collate=collate))
    assert model.vision_cache.misses == model.vision_cache.hits > 0


def test_images_still_count_as_used(tmp_path: Path) -> None:
    model = frozen("llava", tmp_path)
    batch = build_batch(make_row("llava", ROW), "response", "concatenated")
    for _ in range(2):
        model.watch_images = True
        model(batch).chosen.sum().backward()
        model.check_images_used()


def test_other_weights_find_nothing(tmp_path: Path) -> None:
    batch = build_batch(make_row("llava", ROW), "response", "concatenated")
    frozen("llava", tmp_path)(batch)
    model = tiny_pair_model("llava").model.requires_grad_(False)
    model.model.multi_modal_projector.linear_1.bias[0] += 1e-3
    other = PairModel(model, NORM, vision_cache=tmp_path)
    other(batch)
    assert other.vision_cache is not None
    assert other.vision_cache.hits == 0


def test_a_file_that_was_cut_off_is_made_again(tmp_path: Path) -> None:
    batch = build_batch(make_row("llava", ROW), "response", "concatenated")
    expected = frozen("llava", tmp_path)(batch).chosen
    (one, *_) = sorted(tmp_path.rglob("*.safetensors"))
    one.write_bytes(one.read_bytes()[:-100])
    model = frozen("llava", tmp_path)
    torch.testing.assert_close(model(batch).chosen, expected, rtol=1e-5, atol=1e-5)
    assert model.vision_cache is not None
    assert model.vision_cache.misses == 1


@pytest.mark.parametrize("family", MORE)
def test_what_cannot_be_kept_is_refused(family: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="more than features of single images"):
        frozen(family, tmp_path)


def test_a_trained_connector_is_refused(tmp_path: Path) -> None:
    model = tiny_pair_model("llava").model
    with pytest.raises(UserError, match=r"multi_modal_projector|vision_tower"):
        PairModel(model, NORM, vision_cache=tmp_path)
