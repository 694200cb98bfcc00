"""Which models' rows can be divided among workers, and how a row is divided."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from orpo_ray.config.schema import ModelConfig
from orpo_ray.data.packing import PairBatch, build_batch
from orpo_ray.errors import UserError
from orpo_ray.model.loading import check_divisible
from orpo_ray.model.sequence_group import SequenceGroup
from orpo_ray.tiny_models.families import TINY_FAMILIES
from support.pairs_by_hand import make_row, tiny_pair_model


def test_the_tokens_of_all_members_are_the_row() -> None:
    row = torch.arange(1, 8)[None, :, None].expand(2, 7, 3)
    parts = [SequenceGroup(3, member, None).own(row, 1) for member in range(3)]
    assert [part[0, :, 0].tolist() for part in parts] == [[1, 4, 7], [2, 5, 0], [3, 6, 0]]
    assert parts[0].shape == (2, 3, 3)


def test_the_targets_of_all_members_are_those_of_the_row() -> None:
    """Each with its place among the member's tokens, and with what belongs to it."""
    batch = build_batch(make_row("smolvlm", [(0, 4, 2, 3), (0, 3, 5, 1)]), "prompt+response", "shared_prefix")
    found = []
    for member in range(3):
        own = SequenceGroup(3, member, None).with_own_targets(batch)
        assert own.workers == 3
        found += zip(*(each.tolist() for each in (own.target_position * 3 + member, *targets_of(own))), strict=True)
    expected = zip(*(each.tolist() for each in (batch.target_position, *targets_of(batch))), strict=True)
    assert sorted(found) == sorted(expected)


def targets_of(batch: PairBatch) -> tuple[torch.Tensor, ...]:
    return batch.target_ids, batch.target_sum, batch.target_in_response


def test_a_model_refuses_the_targets_of_a_whole_row_in_a_group() -> None:
    """And a member's targets outside of one."""
    model, group = tiny_pair_model("smolvlm"), SequenceGroup(2, 0, None)
    batch = build_batch(make_row("smolvlm", [(0, 4, 2, 3)]), "response", "shared_prefix")
    with pytest.raises(AssertionError, match="not this worker's targets"):
        model(group.with_own_targets(batch))
    model.group = group
    with pytest.raises(AssertionError, match="not this worker's targets"):
        model(batch)


def test_heads_must_be_divisible() -> None:
    """Four query heads and two key-value heads, on two workers or four, which share key-value heads."""
    model = ModelConfig(id="orpo-ray/tiny-gemma3")
    for size in (2, 4):
        check_divisible(model, size)
    with pytest.raises(UserError, match=r"4 attention heads and 2 key-value heads, .* 3 workers.*\n.*one of 2, 4"):
        check_divisible(model, 3)


@pytest.mark.parametrize(
    ("family", "why"),
    [("qwen3_vl", "the model itself puts image features into the row"), ("mllama", "by cross-attention")],
)
def test_models_whose_rows_stay_whole_are_named(family: str, why: str, tmp_path: Path) -> None:
    TINY_FAMILIES[family]().config().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=why):
        check_divisible(ModelConfig(id=str(tmp_path)), 2)
