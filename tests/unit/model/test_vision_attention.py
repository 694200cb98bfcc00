"""Attention over the packed rows of patches of Qwen2.5-VL, Qwen3-VL and Pixtral, against the encoders' own."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from orpo_ray.config.field_types import Checkpointing
from orpo_ray.data.packing import PairBatch, build_batch
from orpo_ray.errors import OrpoRayError
from orpo_ray.model import vision_attention
from orpo_ray.model.families.registry import FAMILIES
from orpo_ray.model.loading import without_adapters
from orpo_ray.model.patch_layout import PatchFacts, patch_layout
from orpo_ray.model.vision_attention import PatchSequences
from orpo_ray.objective.pair_model import PairModel
from orpo_ray.planning.activations import VISION_AS_ON_CUDA, _register_as_on_cuda
from support.pairs_by_hand import NORM, assert_equal, make_row, run, run_as, text_rows, tiny_pair_model

PACKED = ("qwen2_5_vl", "qwen3_vl", "pixtral", "mistral3")
ROW = [(2, 6, 5, 4), (1, 5, 3, 6), (0, 4, 2, 3), (3, 7, 4, 4)]
QWEN2_5_VL = PatchFacts(merge=2, patch=14, window=112, position_grid=None)
META = torch.device("meta")


def as_the_library(model: PairModel, monkeypatch: pytest.MonkeyPatch) -> PairModel:
    """Give the vision encoder its own attention, and leave all indices to it."""
    monkeypatch.setattr(vision_attention, "use_in", lambda *_: None)
    model.family = FAMILIES[without_adapters(model.model).config.model_type]
    return model


def batch_of(model: PairModel, family: str) -> PairBatch:
    return build_batch(make_row(family, ROW), "response", "shared_prefix", collate=model.family.collate)


@pytest.mark.parametrize("family", PACKED)
@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_equals_the_encoders_own_attention(
    family: str, checkpointing: Checkpointing, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Log-probs, loss and all gradients, with several images of different sizes in the row."""
    model = tiny_pair_model(family, checkpointing=checkpointing)
    pairs = make_row(family, ROW)
    got = run(model, pairs, "shared_prefix")
    assert model.model.config.vision_config._attn_implementation == vision_attention.NAME
    expected = run(as_the_library(model, monkeypatch), pairs, "shared_prefix")
    assert model.model.config.vision_config._attn_implementation == "sdpa"
    assert_equal(got, expected)


class _Calls(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func._opname] += 1
        return func(*args, **(kwargs or {}))

    def attention(self) -> tuple[int, int]:
        """Forward and backward calls."""
        name = "_scaled_dot_product_flash_attention_for_cpu"
        return self.counts[name], self.counts[f"{name}_backward"]


def test_a_layer_calls_the_kernel_once_per_length_of_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """An image of 7 x 5 tokens has twelve windows of at most 2 x 2 tokens: of four, two and one."""
    model = tiny_pair_model("qwen2_5_vl")
    grid = np.asarray([[1, 14, 10]])
    images = {"pixel_values": np.zeros((140, 3 * 2 * 8 * 8), np.uint8), "image_grid_thw": grid}

    def calls() -> tuple[int, int]:
        run_as(model, "shared_prefix")
        collated = model.family.collate([images], text_rows(1, 4))
        tensors = {name: torch.from_numpy(value) for name, value in collated.items()}
        inputs = model.family.vision_inputs(tensors, NORM, torch.float32)
        with _Calls() as counted:
            model.family.encode_images(model.model, inputs).pooler_output[0].sum().backward()
        return counted.attention()

    assert calls() == (3 + 1, 3 + 1)  # a layer with windows, and one without
    as_the_library(model, monkeypatch)
    assert calls() == (12 + 1, 12 + 1)


@pytest.mark.parametrize(
    ("family", "of_the_library"),
    [("qwen2_5_vl", "Cannot copy out of meta tensor"), ("qwen3_vl", "cannot repeat_interleave a meta tensor")],
)
def test_nothing_is_read_back_from_the_device(family: str, of_the_library: str) -> None:
    """Tensors on `meta` have no values, so whatever reads one raises. The kernel is the one for a GPU."""
    _register_as_on_cuda()
    model = tiny_pair_model(family, checkpointing="full")
    base = model.model
    base.model.visual.to(META)
    batch = batch_of(model, family).to(META)
    inputs = model.family.vision_inputs(batch.images, NORM, torch.bfloat16)
    base.model.visual.to(torch.bfloat16)
    vision_attention.use_in(base, VISION_AS_ON_CUDA)
    with _Calls() as counted:
        features = model.family.encode_images(base, inputs).pooler_output
        torch.cat(features).sum().backward()
    assert len(features) == len(batch.images["image_grid_thw"]) == 6
    layers = base.config.vision_config.depth
    assert counted.counts["_varlen_attn"] == 2 * layers  # once more in backward, which recomputes
    assert counted.counts["_varlen_attn_backward"] == layers
    assert not {"_local_scalar_dense", "nonzero", "unique_consecutive"} & set(counted.counts)
    with pytest.raises(RuntimeError, match=of_the_library):  # without our layout, the library reads the images' sizes
        model.family.encode_images(base, {name: inputs[name] for name in model.family.image_inputs})


@pytest.mark.parametrize("sizes", [[(92, 92)], [(8, 8), (16, 24)], [(2, 2), (10, 6), (34, 18)]], ids=str)
def test_windows_of_equal_length_are_neighbors(sizes: list[tuple[int, int]]) -> None:
    """Every token is in one window, no window has tokens of two images, and each image has at most four lengths."""
    grids = np.asarray([(1, *size) for size in sizes])
    layout = patch_layout(QWEN2_5_VL, grids)
    order, lengths = layout["patch_layout.window_index"], layout["on_host.window_patches"]
    assert sorted(order) == list(range(len(order)))
    images = np.repeat(np.arange(len(sizes)), grids.prod(-1) // 4)
    windows = np.repeat(np.arange(len(lengths)), lengths // 4)
    assert (images[order] == images).all()
    of_image = [lengths[np.unique(windows[images == image])] for image in range(len(sizes))]
    assert sum(map(len, of_image)) == len(lengths)
    for own, (height, width) in zip(of_image, sizes, strict=True):
        assert (np.diff(own) <= 0).all()
        assert len(own) == -(-height // 8) * -(-width // 8)
        assert len(set(own)) <= 4
        assert own.sum() == height * width


def test_lengths_that_nobody_knows_are_read_back() -> None:
    torch.manual_seed(0)
    states = torch.randn(3, 1, 2, 9, 4)
    starts = torch.tensor([0, 4, 8, 9], dtype=torch.int32)
    layer = torch.nn.Identity()
    known = PatchSequences(starts, (4, 4, 1))
    got, _ = vision_attention.vision_attention(layer, *states, None, cu_seq_lens_q=starts, patch_sequences=(known,))
    read, _ = vision_attention.vision_attention(layer, *states, None, cu_seq_lens_q=starts.clone())
    sequences = [each.split([4, 4, 1], dim=2) for each in states]
    expected = [torch.nn.functional.scaled_dot_product_attention(*each) for each in zip(*sequences, strict=True)]
    torch.testing.assert_close(got, torch.cat(expected, dim=2).transpose(1, 2))
    torch.testing.assert_close(read, got)


@pytest.mark.parametrize(
    ("options", "named"),
    [({"attention_mask": torch.zeros(1)}, "a mask"), ({}, "no sequences"), ({"sinks": 1}, "sinks")],
    ids=["mask", "no sequences", "sinks"],
)
def test_what_it_cannot_do_is_an_error(options: dict[str, Any], named: str) -> None:
    starts = {"cu_seq_lens_q": torch.tensor([0, 9])} if named != "no sequences" else {}
    with pytest.raises(OrpoRayError, match=f"Identity, which passes {named}"):
        vision_attention.vision_attention(
            torch.nn.Identity(), *torch.randn(3, 1, 2, 9, 4), **({"attention_mask": None} | starts | options)
        )
