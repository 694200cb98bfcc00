"""What a plan leaves out to answer in seconds: whole models, operations seen before, imports, a hub that is away."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from orpo_ray.config.schema import LoraConfig, ModelConfig
from orpo_ray.planning.activations import PairShape, _measure, batch_of, unloaded_model
from orpo_ray.planning.depth import with_depth
from orpo_ray.planning.dry_run import dry_run
from orpo_ray.planning.images import image_shape
from orpo_ray.planning.known_shapes import KNOWN_SHAPES
from orpo_ray.planning.second_process import in_second_process
from orpo_ray.planning.states import Weights

SMOLVLM, QWEN = "HuggingFaceTB/SmolVLM-256M-Instruct", "Qwen/Qwen2.5-VL-7B-Instruct"
LORA = ModelConfig(id=QWEN, lora=LoraConfig(), gradient_checkpointing="none")
FULL = ModelConfig(id=SMOLVLM, gradient_checkpointing="full")


@pytest.mark.parametrize("section", [LORA, pytest.param(FULL, marks=pytest.mark.nightly)], ids=["lora", "full"])
def test_layers_of_both_parts_are_told_apart_exactly(section: ModelConfig) -> None:
    config = KNOWN_SHAPES[section.id].config()
    image = image_shape(config)
    batch = batch_of(PairShape(30, 20, 10, 1, image.tokens, image.vision), 1, config, "response", "shared_prefix")

    def measured(language: int, vision: int) -> object:
        shallow = with_depth(config, language, vision)
        return _measure(section, shallow, torch.bfloat16, "shared_prefix", batch, True, "cuda")

    few, deeper = measured(2, 2), measured(3, 3)
    assert few.deepened(deeper, 2, 0) == measured(4, 2)
    assert few.deepened(deeper, 0, 2) == measured(2, 4)


@pytest.mark.parametrize("section", [LORA, FULL], ids=["lora", "full"])
def test_weights_of_few_layers_are_those_of_the_whole_model(section: ModelConfig) -> None:
    config = KNOWN_SHAPES[section.id].config()

    def build(shallow: object) -> torch.nn.Module:
        return unloaded_model(section, shallow, torch.bfloat16, "shared_prefix")

    whole = Weights.of(build(config), section, torch.bfloat16, config.get_text_config().hidden_size)
    assert Weights.of_deep(build, section, config, torch.bfloat16) == whole


def test_operations_seen_before_give_the_same_tensors() -> None:
    with dry_run():
        for repeated in range(2):
            x = torch.empty(4, 6, requires_grad=False)
            first, second = x.view(2, 2, 6).transpose(0, 1).unbind(0)
            values, places = x.max(dim=1)
            added = x.add_(1.0)
            assert added is x, repeated
            assert first.untyped_storage() is x.untyped_storage(), repeated
            assert (second.shape, second.stride(), second.storage_offset()) == ((2, 6), (12, 1), 6), repeated
            assert (values.shape, places.dtype) == ((4,), torch.int64), repeated
            assert (x * 2).dtype == torch.float32, repeated
            assert (x > 2).dtype == torch.bool, repeated
            assert [part.shape[0] for part in x.split([1, 3])] == [1, 3], repeated


@pytest.mark.parametrize("dies", [False, True])
def test_what_a_second_process_does_not_finish_is_done_here(dies: bool) -> None:
    here = os.getpid()

    def compute() -> int:
        if dies and os.getpid() != here:
            os._exit(3)
        return os.getpid()

    assert (in_second_process(compute)() == here) == (dies or len(os.sched_getaffinity(0)) < 2)


def test_a_plan_without_a_hub_prints_nothing_else_and_imports_no_compiler(tmp_path: Path) -> None:
    recipe = {
        "name": "planned",
        "model": {"id": SMOLVLM, "lora": {}},
        "data": {"train": "x.jsonl"},
        "checkpoint": {"storage": str(tmp_path)},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    program = (
        "import sys, json\nfrom orpo_ray.cli import _guarded, app\n"
        f"sys.argv = ['orpo-ray', 'plan', {str(tmp_path / 'recipe.yaml')!r}, '--json']\n"
        "try:\n    _guarded(app)\nexcept SystemExit:\n    pass\n"
        "heavy = ('torch._inductor.compile_fx', 'deepspeed', 'ray')\n"
        "print(json.dumps([name for name in heavy if name in sys.modules]))"
    )
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9", "HOME": str(tmp_path), "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=nowhere)
    assert done.stderr == ""
    report, imported = done.stdout.splitlines()
    assert json.loads(report)["model"]["config"] == "known shape"
    assert json.loads(imported) == []


def test_a_second_process_computes_after_this_one_used_several_threads() -> None:
    """Threads of OpenMP do not survive a fork: an operation large enough to use them would never end."""
    code = """
import torch
from orpo_ray.planning.second_process import in_second_process
size = 20_000_000
torch.set_num_threads(2)
torch.zeros(size).add_(1)
print(in_second_process(lambda: float(torch.ones(size).sum()))())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert float(done.stdout) == 20_000_000
