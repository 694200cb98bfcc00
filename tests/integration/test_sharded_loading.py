"""A model that is loaded for ZeRO-3 is divided from the start, and is the model that other stages load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from orpo_ray.tiny_models.families import TINY_FAMILIES
from support.sharded_loading import differences, memory_of_loading, reservations, write_model
from support.worker_group import worker_group

# Large enough that a rounding of each weight's part, rotary frequencies and the like do not count.
SIZES = {
    "hidden_size": 512,
    "intermediate_size": 2816,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 4096,
}
WAYS: dict[str, dict[str, Any]] = {
    "full": {"dtype": "bfloat16"},
    "LoRA": {"lora": {"r": 4}},
    "QLoRA": {"lora": {"r": 4}, "quantization": {}, "dtype": "bfloat16"},
}
# A tied output head, scaled embeddings and two kinds of rotary frequencies; gates that start at zero.
SOME = ("gemma3", "mllama")


@pytest.mark.parametrize("workers", [2, pytest.param(4, marks=pytest.mark.nightly)])
def test_a_worker_holds_its_part_and_at_most_one_weight_more(workers: int, tmp_path: Path) -> None:
    folder = write_model(tmp_path, "llava", **SIZES, num_hidden_layers=2 * workers)  # a part is as large for 4 as for 2
    for name, section in WAYS.items():
        for rank, found in enumerate(worker_group(workers).run(memory_of_loading, folder, section)):
            part = found["whole"] / workers
            assert found["held"] <= 1.02 * part, (name, rank)
            assert found["peak"] <= 1.02 * part + found["largest"] + found["scales"], (name, rank)


def test_no_memory_is_reserved_for_the_whole_of_a_model_that_is_divided(tmp_path: Path) -> None:
    """On a GPU, transformers otherwise reserves the memory of all 4-bit weights before the first one is loaded."""
    folder, workers = write_model(tmp_path, "llava"), worker_group(2)
    assert workers.run(reservations, folder, WAYS["QLoRA"], 3) == [0, 0]
    assert workers.run(reservations, folder, WAYS["QLoRA"], 2) == [1, 1]


@pytest.mark.parametrize(
    "family",
    [pytest.param(family, marks=[] if family in SOME else pytest.mark.nightly) for family in TINY_FAMILIES],
)
def test_its_weights_are_those_of_other_stages(family: str, tmp_path: Path) -> None:
    """To the last bit, buffers and first adapters included."""
    sections = [
        {"dtype": "bfloat16"},
        {"freeze": ["vision"]},
        {"lora": {"r": 4, "use_dora": True, "modules_to_save": ["connector"]}},
        {"lora": {"r": 4}, "quantization": {}},
    ]
    folder = write_model(tmp_path, family)
    for found in worker_group(2).run(differences, folder, sections):
        assert not found
