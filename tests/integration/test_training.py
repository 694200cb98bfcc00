"""Complete runs on a real Ray cluster: any number of workers, ZeRO stage, kill and resume gives the same losses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from orpo_ray.config.recipe import Recipe
from orpo_ray.errors import UserError
from orpo_ray.tracking.jsonl import read_jsonl
from orpo_ray.training.resources import worker_resources
from support.commands import orpo_ray_here
from support.runs import last_step, run, wait_until
from support.tiny_runs import losses, tiny_recipe, write_pairs

LONG = {"max_steps": 40}  # two seconds, enough to kill a process in between


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def reference(ray_cluster: None, storage: Path) -> dict[int, float]:
    """Losses of an uninterrupted run with one worker and without ZeRO, which every other run must reproduce."""
    return losses(Path(run(tiny_recipe(storage, "reference", optim=LONG)).run_uri))


def same_curve(run_dir: Path, reference: dict[int, float], tolerance: float = 1e-4) -> None:
    assert losses(run_dir) == pytest.approx(reference, abs=tolerance)


# Engines without Ray are compared on every stage in test_tuning_engines.py.
@pytest.mark.parametrize(
    ("workers", "stage"),
    [(2, 0), (2, 3), *(pytest.param(2, stage, marks=pytest.mark.nightly) for stage in (1, 2))],
)
def test_workers_and_zero_stages_give_one_curve(
    reference: dict[int, float], storage: Path, workers: int, stage: int
) -> None:
    recipe = tiny_recipe(
        storage, f"w{workers}z{stage}", optim=LONG, scaling={"num_workers": workers}, deepspeed={"zero_stage": stage}
    )
    summary = run(recipe)
    same_curve(Path(summary.run_uri), reference)
    assert sorted(reference) == list(range(1, 41))
    norms = [line["train/grad_norm"] for line in read_jsonl(Path(summary.run_uri) / "metrics.jsonl")]
    expected = [line["train/grad_norm"] for line in read_jsonl(storage / "reference" / "metrics.jsonl")]
    assert norms == pytest.approx(expected, rel=1e-3)


def test_small_micro_batches_with_text_only_pairs_and_uneven_workers(ray_cluster: None, tmp_path: Path) -> None:
    """Two workers and five pairs per step, most without an image: some micro-batches contain only dummy pairs.

    They score the held-out pairs alike too, between two steps and at the end.
    """
    path = write_pairs(tmp_path, 12)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows[::2] + rows[1:8:2]:
        row["images"] = []
        row["prompt"] = row["prompt"][0]["content"][1]["text"]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    optim = {"pairs_per_step": 5, "max_steps": 5, "tokens_per_microbatch": 80}
    sections: dict[str, Any] = {
        "data": {"train": str(path), "eval": "easy-vqa:test"},
        "eval": {"max_pairs": 9, "every_steps": 3, "grounding": True},
    }
    one = run(tiny_recipe(tmp_path, "one", optim=optim | {"tokens_per_microbatch": 4096}, **sections))
    two = run(
        tiny_recipe(
            tmp_path, "two", optim=optim, scaling={"num_workers": 2}, deepspeed={"zero_stage": 2}, **sections
        )
    )  # fmt: skip
    same_curve(Path(two.run_uri), losses(Path(one.run_uri)))
    first, second = evaluations(Path(one.run_uri)), evaluations(Path(two.run_uri))
    assert [line["step"] for line in first] == [3, 5]
    assert {"eval/loss", "eval/pairs", "eval/rewards/accuracies"} <= first[0].keys()
    assert {"eval/grounding_gap", "eval/grounding_pairs"} <= first[1].keys()
    assert second == [pytest.approx(line, abs=1e-4) for line in first]


def evaluations(run_dir: Path) -> list[dict[str, float]]:
    """Read what evaluations found, without their times."""
    lines = [line for line in read_jsonl(run_dir / "metrics.jsonl") if "eval/loss" in line]
    return [{name: line[name] for name in line if not name.endswith(("runtime", "_per_second"))} for line in lines]


@contextmanager
def one_worker_killed(recipe: Recipe) -> Iterator[None]:
    """Kill a worker of the run after step 8, with SIGKILL."""
    import ray
    from ray.util.state import list_actors

    killed: list[int] = []
    address = (
        ray.get_runtime_context().gcs_address
    )  # by default, it would connect to the last cluster started on this machine

    def workers() -> list[Any]:
        alive = [("class_name", "=", "RayTrainWorker"), ("state", "=", "ALIVE")]
        return list_actors(address, filters=alive, detail=True)

    def kill() -> None:
        # Listed in advance, since listing takes longer than a step.
        wait_until((Path(recipe.run_uri) / "metrics.jsonl").exists, "the run's first file")
        wait_until(lambda: len(workers()) == recipe.scaling.num_workers, "the workers")
        pid = workers()[-1].pid
        wait_until(lambda: last_step(Path(recipe.run_uri)) >= 8, "step 8")
        os.kill(pid, signal.SIGKILL)
        killed.append(pid)

    thread = threading.Thread(target=kill)
    thread.start()
    yield
    thread.join()
    assert killed
    assert (Path(recipe.run_uri) / "final").is_dir()


def test_a_killed_worker_is_replaced_and_the_curve_goes_on(reference: dict[int, float], storage: Path) -> None:
    recipe = tiny_recipe(
        storage, "worker-killed", optim=LONG, checkpoint={"every_steps": 3}, scaling={"num_workers": 2}
    )
    with one_worker_killed(recipe):
        metrics = run(recipe).metrics
    same_curve(Path(recipe.run_uri), reference)
    assert metrics["train/restarts"] == 1
    assert metrics["train/repeated_steps"] <= 3  # those since the last checkpoint


def command(recipe: Recipe, folder: Path) -> list[str]:
    path = folder / f"{recipe.name}.yaml"
    path.write_text(recipe.to_yaml())
    return [sys.executable, "-m", "orpo_ray", "train", str(path)]


@pytest.mark.timeout(400)
def test_a_killed_driver_resumes_with_the_same_command_and_ends_once(
    reference: dict[int, float], tmp_path: Path
) -> None:
    """Killing the driver ends its Ray cluster; the same command in the same folder resumes from a checkpoint."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    recipe = tiny_recipe(tmp_path, "driver-killed", optim=LONG, checkpoint={"every_steps": 3})
    first = subprocess.Popen(command(recipe, tmp_path), env=environment, stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: last_step(Path(recipe.run_uri)) >= 8, "step 8")
    finally:
        first.kill()
        first.wait()
    assert last_step(Path(recipe.run_uri)) < 40
    again = subprocess.run(command(recipe, tmp_path), env=environment, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    same_curve(Path(recipe.run_uri), reference)
    third = orpo_ray_here(*command(recipe, tmp_path)[3:])
    assert third.returncode == 0
    assert "finished already" in third.stderr


def test_final_loads_in_plain_transformers_and_differs_from_the_start(
    reference: dict[int, float], storage: Path
) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from orpo_ray.tiny_models.build import resolve

    final = storage / "reference" / "final"
    model = AutoModelForImageTextToText.from_pretrained(final)
    start = AutoModelForImageTextToText.from_pretrained(resolve("orpo-ray/tiny-smolvlm"))
    assert type(AutoProcessor.from_pretrained(final)).__name__ == "Idefics3Processor"
    before = dict(start.named_parameters())
    changed = [name for name, value in model.named_parameters() if not torch.equal(value, before[name])]
    assert len(changed) > 50
    assert model.dtype == torch.float32


def test_lora_trains_resumes_and_leaves_adapters(ray_cluster: None, tmp_path: Path) -> None:
    from safetensors.torch import load_file
    from transformers import AutoModelForImageTextToText

    from orpo_ray.tiny_models.build import resolve

    section: dict[str, Any] = {"lora": {"r": 4, "dropout": 0.1}, "gradient_checkpointing": True}
    optim = LONG
    held_out: dict[str, Any] = {
        "data": {"eval": "easy-vqa:test"}, "eval": {"max_pairs": 8, "every_steps": 10, "grounding": True}
    }  # fmt: skip
    deepspeed: dict[str, Any] = {"zero_stage": 3, "offload_optimizer": "cpu", "offload_param": "cpu"}
    deepspeed |= {"config": {"zero_optimization": {"sub_group_size": 10_000}}}
    whole = run(tiny_recipe(tmp_path, "whole", model=section, optim=optim, deepspeed=deepspeed, **held_out))
    assert {"eval/grounding_gap", "eval/rewards/margins"} <= set(whole.metrics)
    killed = tiny_recipe(tmp_path, "killed", model=section, optim=optim, checkpoint={"every_steps": 3})
    with one_worker_killed(killed):
        run(killed)
    same_curve(Path(killed.run_uri), losses(Path(whole.run_uri)))
    finals = [Path(uri) / "final" for uri in (whole.run_uri, killed.run_uri)]
    adapters, others = [load_file(final / "adapter_model.safetensors") for final in finals]
    assert adapters.keys() == others.keys()
    for name, value in adapters.items():
        assert "text_model.layers" in name
        assert value.abs().max() > 0, f"{name} was not trained, or not gathered"
        assert torch.allclose(value, others[name], atol=1e-3), name
    start = dict(AutoModelForImageTextToText.from_pretrained(resolve("orpo-ray/tiny-smolvlm")).named_parameters())
    loaded, info = AutoModelForImageTextToText.from_pretrained(finals[0], output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    held = {name.replace(".base_layer", ""): value for name, value in loaded.named_parameters()}
    assert sum("lora_" in name for name in held) == len(adapters)
    assert {name for name in held if "lora_" not in name} == start.keys()
    assert all(torch.equal(held[name], value) for name, value in start.items())
    assert run(killed).was_finished


def test_bfloat16_trains_too(ray_cluster: None, tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText

    summary = run(tiny_recipe(tmp_path, "bf16", model={"dtype": "bfloat16"}))
    curve = losses(Path(summary.run_uri))
    assert curve[10] < curve[1]
    assert AutoModelForImageTextToText.from_pretrained(Path(summary.run_uri) / "final").dtype == torch.bfloat16


@pytest.fixture
def with_bad_rows(tmp_path: Path) -> tuple[Path, set[str]]:
    """Write 40 rows, 6 of them bad in 6 ways. Returns the file and the sources of the bad rows."""
    path = write_pairs(tmp_path, 40)
    rows: list[Any] = [json.loads(line) for line in path.read_text().splitlines()]
    (tmp_path / "images" / "torn.png").write_bytes((tmp_path / rows[0]["images"][0]).read_bytes()[:50])
    rows[3] = "{broken"
    rows[9] |= {"chosen": ""}
    rows[15] |= {"rejected": rows[15]["chosen"]}
    rows[21] |= {"images": ["images/torn.png"]}
    rows[27] |= {"images": ["../../etc/passwd"]}
    rows[39] |= {"chosen": "long " * 200}
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path, {f"{path}:line {number}" for number in (4, 10, 16, 22, 28, 40)}


def test_bad_rows_are_skipped_and_written_down(
    ray_cluster: None, tmp_path: Path, with_bad_rows: tuple[Path, set[str]]
) -> None:
    path, broken = with_bad_rows
    data = {"train": str(path), "max_bad_fraction": 0.2}
    optim = {"epochs": 2, "max_steps": None}
    summary = run(tiny_recipe(tmp_path, "skip", data=data, optim=optim, scaling={"num_workers": 2}))
    written = read_jsonl(Path(summary.run_uri) / "bad_rows.jsonl")
    assert {row["source"] for row in written} == broken
    assert len(written) == len(broken)
    reasons = {"malformed_row", "empty_response", "identical_responses", "unreadable_image", "unsafe_path", "too_long"}
    assert {row["reason"] for row in written} == reasons
    assert len(losses(Path(summary.run_uri))) == 20


@pytest.mark.parametrize(
    ("data", "said"), [({"max_bad_fraction": 0.1}, "6 of 40 rows cannot be used"), ({"on_bad_row": "error"}, "line")]
)
def test_too_many_bad_rows_stop_the_run_with_one_clear_error(
    ray_cluster: None, tmp_path: Path, with_bad_rows: tuple[Path, set[str]], data: dict[str, Any], said: str
) -> None:
    path, _ = with_bad_rows
    recipe = tiny_recipe(
        tmp_path, "stop", data={"train": str(path)} | data, optim={"epochs": 1, "max_steps": None},
    )  # fmt: skip
    started = time.monotonic()
    with pytest.raises(UserError, match=said):
        run(recipe)
    assert time.monotonic() - started < 90, "a user's error must not be retried"


def test_a_run_folder_of_another_recipe_is_refused(reference: dict[int, float], storage: Path) -> None:
    with pytest.raises(UserError, match=r"differ in orpo\.beta"):
        run(tiny_recipe(storage, "reference", orpo={"beta": 0.7}))


def test_resuming_sharded_state_on_other_workers_is_refused(ray_cluster: None, tmp_path: Path) -> None:
    sections: dict[str, Any] = {"deepspeed": {"zero_stage": 2}, "checkpoint": {"every_steps": 5}}
    recipe = tiny_recipe(tmp_path, "sharded", **sections)
    summary = run(recipe)
    (Path(summary.run_uri) / "final").rename(Path(summary.run_uri) / "was-final")
    with pytest.raises(UserError, match=r"sharded over 1 worker"):
        run(tiny_recipe(tmp_path, "sharded", scaling={"num_workers": 2}, **sections))


@pytest.mark.parametrize(
    ("scaling", "cluster", "said"),
    [
        ({"num_workers": 4, "gpus_per_worker": 1}, {"CPU": 8, "GPU": 2}, "the cluster has 2"),
        ({"num_workers": 4, "cpus_per_worker": 2}, {"CPU": 8}, "exceed the cluster's 8"),
        ({"num_workers": 1}, {"CPU": 0.5}, "exceed the cluster's 0.5"),
        ({"num_workers": 2, "gpus_per_worker": 0.5}, {"CPU": 8, "GPU": 1}, "cannot share a GPU"),
    ],
)
def test_what_does_not_fit_the_cluster_is_said_before_it_starts(
    tmp_path: Path, scaling: dict[str, Any], cluster: dict[str, float], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        worker_resources(tiny_recipe(tmp_path, "big", scaling=scaling), cluster)


def test_the_resolved_recipe_is_saved(reference: dict[int, float], storage: Path) -> None:
    saved = yaml.safe_load((storage / "reference" / "recipe.yaml").read_text())
    assert saved["checkpoint"].items() >= {"storage": str(storage), "every_steps": 100, "keep": 2}.items()
