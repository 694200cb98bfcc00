"""Complete runs on a real Ray cluster: any number of workers, ZeRO stage, kill and resume gives the same losses."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console

from orpo_ray.errors import UserError
from orpo_ray.tracking.jsonl import read_jsonl
from orpo_ray.training.launch import launch_training
from orpo_ray.training.resources import worker_resources
from support.runs import run
from support.tiny_runs import LONG, losses, same_curve, tiny_recipe, write_pairs


# By default, engines without Ray are compared on every stage (test_tuning_engines.py), runs of two workers without
# sharding (test_kills.py), and a sharded run that changes its number of workers (below).
@pytest.mark.nightly
@pytest.mark.parametrize(("workers", "stage"), [(2, 0), (2, 1), (2, 2), (2, 3)])
def test_workers_and_zero_stages_give_one_curve(
    reference: dict[int, float], storage: Path, workers: int, stage: int
) -> None:
    recipe = tiny_recipe(
        storage, f"w{workers}z{stage}", optim=LONG, scaling={"num_workers": workers}, deepspeed={"zero_stage": stage}
    )
    summary = run(recipe)
    same_curve(Path(summary.run_uri), reference)
    assert sorted(reference) == list(range(1, LONG["max_steps"] + 1))
    norms = [line["train/grad_norm"] for line in read_jsonl(Path(summary.run_uri) / "metrics.jsonl")]
    expected = [line["train/grad_norm"] for line in read_jsonl(storage / "reference" / "metrics.jsonl")]
    assert norms == pytest.approx(expected, rel=1e-3)


def test_small_micro_batches_with_text_only_pairs_and_uneven_workers(ray_cluster: None, tmp_path: Path) -> None:
    """Two workers and five pairs per step, most without an image: some micro-batches contain only dummy pairs.

    They score the held-out pairs alike too, between two steps and at the end. With an image preference, whose terms few
    micro-batches have.
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
        "orpo": {"image_beta": 0.5},
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
    assert {"eval/rewards/image_accuracies", "eval/rewards/image_margins"} <= first[0].keys()
    assert second == [pytest.approx(line, abs=1e-4) for line in first]


def evaluations(run_dir: Path) -> list[dict[str, float]]:
    """Read what evaluations found, without their times."""
    lines = [line for line in read_jsonl(run_dir / "metrics.jsonl") if "eval/loss" in line]
    return [{name: line[name] for name in line if not name.endswith(("runtime", "_per_second"))} for line in lines]


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


@pytest.mark.nightly
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


def test_a_sharded_run_goes_on_with_another_number_of_workers(ray_cluster: None, tmp_path: Path) -> None:
    """Engines without Ray are compared for all kinds of tuning in test_other_workers.py."""
    sections: dict[str, Any] = {"deepspeed": {"zero_stage": 2}, "checkpoint": {"every_steps": 4}}
    folder = Path(run(tiny_recipe(tmp_path, "sharded", **sections)).run_uri)
    expected = losses(folder)
    (folder / "final").rename(folder / "was-final")
    first = min(path.name for path in folder.glob("checkpoint_*"))
    more = tiny_recipe(tmp_path, "sharded", scaling={"num_workers": 2}, **sections)
    launch_training(more, Console(file=io.StringIO()), from_checkpoint=first)
    assert json.loads((folder / first / "position.json").read_text())["step"] == 8
    same_curve(folder, expected)


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
