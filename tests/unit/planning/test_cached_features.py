"""Whether features of `model.vision_cache` are read faster than they are computed."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from orpo_ray.config.load import parse_recipe
from orpo_ray.planning.activations import PairShape
from orpo_ray.planning.cached_features import cached_features, cached_features_of_run
from orpo_ray.planning.gpus import GPUS, gpu_named
from orpo_ray.planning.plan import Options, load_config, plan
from orpo_ray.planning.states import Weights
from orpo_ray.planning.step_time import Rates
from orpo_ray.planning.table import print_plan
from orpo_ray.planning.work import Matmul, Work
from orpo_ray.storage.run_folder import DATA_CHECK_FILE, RunFolder
from orpo_ray.training.vision_cache_check import slow_cache_on

H100, L4 = gpu_named("NVIDIA H100 80GB HBM3"), gpu_named("NVIDIA L4")


def recipe_of(tmp_path: Path, **scaling: Any) -> dict[str, Any]:
    model = {"id": "orpo-ray/tiny-smolvlm", "freeze": ["vision", "connector"], "vision_cache": str(tmp_path / "cache")}
    return {
        "name": "planned",
        "model": model,
        "data": {"train": "pairs.jsonl", "max_length": 2048},
        "checkpoint": {"storage": str(tmp_path)},
        "scaling": scaling,
    }


def test_reading_is_the_bytes_over_a_node_s_disk_that_its_gpus_share() -> None:
    """Two images of 1,000 tokens with 500 numbers of 2 bytes: 2 MB, 1 ms at 2 GB/s, and 4 ms beside three others."""
    assert H100 is not None
    assert L4 is not None
    shape = PairShape(1, 1, 1, 2, 1000, {})
    weights = Weights((), 2, 500)
    vision = Work({Matmul(1, 4096, 4096, 4096, "m"): 40})
    for workers, seconds in ((1, 1e-3), (4, 4e-3), (32, 8e-3)):
        found = cached_features(vision, weights, shape, workers, 1, [H100, L4], Rates())
        assert (found.bytes_per_pair, found.read_seconds) == (2_000_000, pytest.approx(seconds))
    # 40 products of 137 GFLOPs at 0.73 of 989 TFLOP/s are 7.6 ms, and with tiles that do not fill it 7.9; at 0.5 of
    # 121 TFLOP/s, 91 ms and 93.
    assert found.compute_seconds == pytest.approx({"H100-80GB": 7.85e-3, "L4": 92.6e-3}, rel=1e-3)
    assert found.slower_on == ("H100-80GB",)
    # 16 MB for eight GPUs in 7.85 and 92.6 ms.
    assert found.break_even_gb == pytest.approx({"H100-80GB": 2.04, "L4": 0.173}, rel=2e-3)
    assert cached_features(vision, weights, shape, 32, 1, [H100, L4], Rates(disk_gb=2.1)).slower_on == ()


@pytest.mark.parametrize(("disk", "warns"), [(1e-4, True), (1e5, False)])
def test_a_plan_warns_where_reading_is_slower(tmp_path: Path, disk: float, warns: bool) -> None:
    report = plan(parse_recipe(recipe_of(tmp_path)), Options(assume=[f"disk_gb={disk}"]))
    found = report["vision_cache"]
    assert found["slower_on"] == ([gpu.name for gpu in GPUS] if warns else [])
    assert found["compute_seconds"].keys() == {gpu.name for gpu in GPUS}
    console = Console(file=io.StringIO(), width=200)
    print_plan(report, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "model.vision_cache  a pair has 0.1 MB of features" in text
    assert ("slower with the cache on L4" in text) == warns


def test_a_plan_without_a_cache_says_nothing(tmp_path: Path) -> None:
    raw = recipe_of(tmp_path)
    del raw["model"]["vision_cache"]
    assert plan(parse_recipe(raw), Options())["vision_cache"] is None


def test_a_run_on_a_gpu_warns(tmp_path: Path) -> None:
    """19 MB per image of LLaVA-1.6 take 9.6 ms to read. An H100 encodes the image in less, an L4 does not."""
    raw = recipe_of(tmp_path)
    raw["model"] |= {"id": "llava-hf/llava-v1.6-mistral-7b-hf", "lora": {}, "freeze": []}
    recipe = parse_recipe(raw | {"data": {"train": "pairs.jsonl", "max_length": 4096}})
    assert slow_cache_on(recipe, "Radeon", 1, 1) is None
    assert slow_cache_on(recipe, "NVIDIA L4", 1, 1) is None
    text = slow_cache_on(recipe, "NVIDIA H100 80GB HBM3", 1, 1)
    assert text is not None
    found = re.search(r"H100-80GB computes the features of a pair \(19.2 MB\) in (\S+) ms; .* than (\S+) GB/s", text)
    assert found is not None
    assert float(found[1]) < 9.58
    assert float(found[1]) * float(found[2]) == pytest.approx(19.2, rel=0.01)
    assert text.endswith("for a worker, remove the cache")


def test_a_run_has_the_figures_of_its_plan(tmp_path: Path) -> None:
    """Also where a worker's share of a step is smaller than a micro-batch may be."""
    recipe = parse_recipe(recipe_of(tmp_path, num_workers=4) | {"optim": {"pairs_per_step": 4}})
    config, _ = load_config(recipe.model)
    assert H100 is not None
    found = cached_features_of_run(recipe, config, H100, 4, 4)
    planned = plan(recipe, Options())["vision_cache"]
    assert found.bytes_per_pair == planned["bytes_per_pair"]
    assert found.read_seconds == planned["read_seconds"]
    assert found.compute_seconds["H100-80GB"] == planned["compute_seconds"]["H100-80GB"]
    # Alone, a worker has micro-batches of four pairs, which take less time each, and a disk of its own.
    alone = cached_features_of_run(recipe, config, H100, 1, 1)
    assert alone.read_seconds == found.read_seconds / 4
    assert alone.compute_seconds["H100-80GB"] < found.compute_seconds["H100-80GB"]


def test_a_run_goes_on_if_it_cannot_be_estimated(tmp_path: Path) -> None:
    recipe = parse_recipe(recipe_of(tmp_path))
    folder = RunFolder(recipe.run_uri)
    folder.make()
    (folder.path / DATA_CHECK_FILE).write_text('{"train": {"tokens": {"prompt": 3}}}')
    assert slow_cache_on(recipe, "NVIDIA H100 80GB HBM3", 1, 1) is None


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("NVIDIA H100 80GB HBM3", "H100-80GB"),
        ("NVIDIA A100-SXM4-40GB", "A100-40GB"),
        ("NVIDIA A100-SXM4-80GB", "A100-80GB"),
        ("NVIDIA H200", "H200-141GB"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA GeForce RTX 4090", "RTX-4090"),
        ("NVIDIA RTX A6000", None),
        ("Tesla T4", None),
    ],
)
def test_a_device_s_name_tells_its_type(name: str, found: str | None) -> None:
    gpu = gpu_named(name)
    assert (gpu.name if gpu else None) == found
