"""Forward and backward pass read nothing back from the device, and copy nothing to it but the batch."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from orpo_ray.data.collate_images import TokenRows
from orpo_ray.data.packing import Layout, build_batch
from orpo_ray.errors import OrpoRayError
from orpo_ray.model import shared_prefix
from orpo_ray.model.attention_kernel import PLANNED_GPU
from orpo_ray.model.families.base import IMAGE_POSITIONS
from orpo_ray.model.prefix_layout import PrefixLayout
from orpo_ray.model.rope_positions import rope_positions
from orpo_ray.model.sequence_group import SequenceGroup
from orpo_ray.objective.base import Normaliser
from orpo_ray.objective.orpo import ORPO
from support.counting import Counter
from support.device_waits import META, copies_to_device
from support.pairs_by_hand import assert_equal, make_row, run, run_as, tiny_pair_model

ROW = [(2, 6, 5, 4), (1, 5, 3, 6), (0, 4, 2, 3)]
SHARED = ["smolvlm", "idefics3", "llava", "llava_next", "internvl", "gemma3", "paligemma", "qwen2_5_vl"]
# transformers looks for packed rows in the positions of the others.
CONCATENATED = ["gemma3", "qwen2_5_vl"]
AS_ON_CUDA = "shared_prefix_as_on_cuda"


def step_on_meta(family: str, layout: Layout, on_cuda: bool = False, group: SequenceGroup | None = None) -> list[str]:
    """Return what a step copies to the device."""
    model = tiny_pair_model(family, checkpointing="full")
    run_as(model, layout)
    if on_cuda:
        from transformers import AttentionInterface

        AttentionInterface.register(AS_ON_CUDA, partial(shared_prefix.shared_prefix_attention, hardware=PLANNED_GPU))
        model.model.set_attn_implementation({"text_config": AS_ON_CUDA})
        model.to(torch.bfloat16)
    model.to(META)
    model.group = group
    with copies_to_device() as found:
        batch = build_batch(make_row(family, ROW), "response", layout, collate=model.family.collate)
        batch = (batch if group is None else group.with_own_targets(batch)).to(META)
        loss, _ = ORPO(0.1).loss(model(batch), batch.weights, Normaliser(float(len(ROW))))
        loss.backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "language_model.layers" in n)
    return found


@pytest.mark.parametrize("family", SHARED)
def test_a_packed_row_makes_nobody_wait(family: str) -> None:
    assert step_on_meta(family, "shared_prefix") == []


@pytest.mark.parametrize("family", ["smolvlm", "qwen2_5_vl"])
def test_variable_length_attention_makes_nobody_wait(family: str) -> None:
    assert step_on_meta(family, "shared_prefix", on_cuda=True) == []


@pytest.fixture
def group_on_meta() -> Iterator[SequenceGroup]:
    """The second of two workers, whose collectives exchange nothing, but take tensors on `meta`."""
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    yield SequenceGroup.join(2, 60.0)
    dist.destroy_process_group()


@pytest.mark.parametrize(("family", "on_cuda"), [("smolvlm", True), ("gemma3", False), ("qwen2_5_vl", True)])
def test_a_group_makes_nobody_wait(family: str, on_cuda: bool, group_on_meta: SequenceGroup) -> None:
    assert step_on_meta(family, "shared_prefix", on_cuda, group_on_meta) == []


@pytest.mark.parametrize("backward", [True, False])
def test_a_group_compares_image_gradients_on_the_device(backward: bool, group_on_meta: SequenceGroup) -> None:
    """Also where there is none, and as float32 whatever the model's type; then the result is read."""
    model = tiny_pair_model("smolvlm")
    run_as(model, "shared_prefix")
    model.to(torch.bfloat16).to(META)
    model.group, model.watch_images = group_on_meta, True
    batch = build_batch(make_row("smolvlm", ROW), "response", "shared_prefix", collate=model.family.collate)
    logps = model(group_on_meta.with_own_targets(batch).to(META))
    if backward:
        logps.chosen.sum().backward()
    with copies_to_device() as found, Counter() as counter, pytest.raises(RuntimeError, match="meta tensors"):
        model.check_images_used()
    assert found == []
    assert [(each.name, each.dtype) for each in counter.collectives] == [("allreduce_", torch.float32)]


def test_the_indices_of_sequences_travel_with_the_batch() -> None:
    batch = build_batch(make_row("smolvlm", ROW), "response", "shared_prefix").to(META)
    assert batch.varlen is not None
    assert batch.varlen.keys.is_meta
    assert PrefixLayout.of(batch, None).varlen_index is batch.varlen


@pytest.mark.parametrize("family", CONCATENATED)
def test_padded_rows_make_nobody_wait(family: str) -> None:
    assert step_on_meta(family, "concatenated") == []


@pytest.mark.parametrize("family", [*SHARED, "idefics2", "pixtral", "mistral3"])
def test_features_take_the_places_that_the_model_itself_finds(family: str) -> None:
    """Without positions in the batch, the model looks for image tokens, and reads what it needs of the images."""
    model = tiny_pair_model(family)
    pairs = make_row(family, ROW)
    got = run(model, pairs, "shared_prefix")
    batch = build_batch(pairs, "response", "shared_prefix", collate=model.family.collate)
    assert IMAGE_POSITIONS in batch.images
    object.__setattr__(model.family, "image_token", None)
    assert_equal(got, run(model, pairs, "shared_prefix"), 1e-6)


def test_missing_features_are_an_error() -> None:
    model = tiny_pair_model("smolvlm")
    run_as(model, "shared_prefix")
    batch = build_batch(make_row("smolvlm", ROW), "response", "shared_prefix", collate=model.family.collate)
    batch.images["pixel_values"] = batch.images["pixel_values"][1:]
    with pytest.raises(OrpoRayError, match="do not match: 32 and 48"):
        model(batch)


@pytest.mark.parametrize("sides", [(64, 64), (64, 48)], ids=["whole", "padded"])
@pytest.mark.parametrize("family", ["smolvlm", "idefics3"])
def test_the_vision_encoder_of_idefics3_equals_the_models_own(family: str, sides: tuple[int, int]) -> None:
    model = tiny_pair_model(family)
    base, generator = model.model, torch.Generator().manual_seed(0)
    inputs = {"pixel_values": torch.randn(3, 3, 64, 64, generator=generator)}
    if sides[1] < 64:
        mask = torch.ones(3, 64, 64, dtype=torch.int64)
        mask[1, :, sides[1] :] = 0
        inputs["pixel_attention_mask"] = mask
    got = model.family.encode_images(base, inputs).pooler_output
    rows = {name: value.unsqueeze(0) for name, value in inputs.items()}
    expected = base.get_image_features(**rows, return_dict=True).pooler_output
    assert len(got) == len(expected) == 1
    torch.testing.assert_close(got[0], expected[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_positions_with_three_axes_equal_the_models_own(family: str) -> None:
    """In padded rows, whose padding continues the answer."""
    base: Any = tiny_pair_model(family).model
    grids = np.asarray([[1, 4, 6], [1, 2, 2], [1, 8, 2]])
    is_image = np.zeros((4, 20), bool)
    is_image[0, 2:8] = is_image[0, 10:11] = is_image[1, 1:5] = True
    is_image[2:] = is_image[:2]  # the rejected answers have the images of the chosen ones
    ids = np.where(is_image, base.config.image_token_id, 5)
    expected, _ = base.model.get_rope_index(
        torch.from_numpy(ids),
        mm_token_type_ids=torch.from_numpy(is_image).int(),
        image_grid_thw=torch.from_numpy(np.concatenate([grids, grids])),
    )
    assert rope_positions(TokenRows(ids, is_image), grids, 2).tolist() == expected.tolist()
