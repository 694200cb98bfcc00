"""Which models' rows can be divided among workers, and how a row is divided."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from orpo_ray.config.schema import ModelConfig
from orpo_ray.errors import UserError
from orpo_ray.model.loading import check_divisible
from orpo_ray.model.sequence_group import SequenceGroup
from orpo_ray.tiny_models.families import TINY_FAMILIES


def test_the_tokens_of_all_members_are_the_row() -> None:
    row = torch.arange(1, 8)[None, :, None].expand(2, 7, 3)
    parts = [SequenceGroup(3, member, None).own(row, 1) for member in range(3)]
    assert [part[0, :, 0].tolist() for part in parts] == [[1, 4, 7], [2, 5, 0], [3, 6, 0]]
    assert parts[0].shape == (2, 3, 3)
    owned = [SequenceGroup(3, member, None).owned(torch.tensor([0, 4, 5])).tolist() for member in range(3)]
    assert owned == [[True, False, False], [False, True, False], [False, False, True]]


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
