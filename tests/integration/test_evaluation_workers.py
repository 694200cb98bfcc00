"""A model that is measured by several workers: the same figures as in one process, and one message when one dies."""

from __future__ import annotations

import io
import json
import threading
from pathlib import Path

import pytest
import ray
import torch
from rich.console import Console

from orpo_ray.config.recipe import Recipe
from orpo_ray.errors import UserError
from orpo_ray.evaluation.evaluate_run import EvaluateOptions, Evaluation, evaluate_run
from orpo_ray.evaluation.measuring import Measure, measure
from orpo_ray.model.loading import load_model
from orpo_ray.storage.run_folder import EVAL_PAIRS_FILE, EVAL_TOKENS_FILE
from orpo_ray.tiny_models.easy_vqa import easy_vqa_rows
from orpo_ray.training.evaluation_workers import WorkerLost, on_workers
from support.clusters import processes
from support.finished_runs import finished_run
from support.runs import wait_until
from support.tiny_runs import tiny_recipe, write_pairs

CPU = torch.device("cpu")
# Fewer pairs than workers x micro-batches, so that some of them are dummy pairs.
SMALL = {"max_pairs": 22, "max_new_tokens": 4, "grounding": True}


def evaluation(run: Path, console: Console, measuring: Measure, *overrides: str, generate: int = 0) -> Evaluation:
    benchmark = f"pope:{run.parent / 'pope.jsonl'}"
    options = EvaluateOptions(generate=generate, benchmarks=[benchmark] if generate else [])
    return evaluate_run(str(run), overrides, console, options, measuring)


def write_pope(folder: Path) -> None:
    """Write yes/no questions about pictures, of which the last one is missing."""
    lines = []
    for row in easy_vqa_rows("train")[:7]:
        (folder / f"{row['id']}.png").write_bytes(row["images"][0])
        question = {"question_id": row["id"], "image": f"{row['id']}.png", "text": "Is it red?", "label": "yes"}
        lines.append(json.dumps(question))
    (folder / f"{row['id']}.png").unlink()
    (folder / "pope.jsonl").write_text("\n".join(lines) + "\n")


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return tiny_recipe(tmp_path, "measured", data={"eval": str(write_pairs(tmp_path, 40))}, eval=SMALL)


@pytest.fixture
def run(recipe: Recipe) -> Path:
    return finished_run(recipe, load_model(recipe.model, CPU, 0))


def test_workers_measure_what_one_process_does(ray_cluster: None, run: Path, tmp_path: Path) -> None:
    write_pope(tmp_path)
    said = io.StringIO()
    found = []
    for measuring in (measure, on_workers(3)):
        # With images that are exchanged and blank, answers, benchmark, and the tokens of the report.
        one = evaluation(run, Console(file=said), measuring, generate=5).as_json()
        kept = json.loads((run / EVAL_TOKENS_FILE).read_text()), (run / EVAL_PAIRS_FILE).stat().st_size > 0
        found.append((one, kept))
        (run / EVAL_PAIRS_FILE).unlink()
    (alone, kept_alone), (together, kept_together) = found
    timed = [name for name in alone if name.endswith(("runtime", "per_second"))]
    assert len(timed) == 3
    for each in (alone, together):
        for name in timed:
            each.pop(name)
    assert alone["eval/pairs"] == 22
    assert alone["eval/grounding_pairs"] == 22
    assert len(alone["answers"]) == 5
    assert alone["benchmarks"][0]["bad_rows"] == 1
    assert together == approximately(alone)
    assert kept_together == approximately(kept_alone)
    assert "starting 3 worker(s)" in said.getvalue()
    assert said.getvalue().count("scoring 22 pairs with") == 2
    assert not placement_groups()


def approximately(value: object) -> object:
    """Let numbers at any depth differ by rounding: batches differ with the number of workers."""
    if isinstance(value, dict):
        return {key: approximately(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(approximately(each) for each in value)
    return pytest.approx(value, abs=1e-5) if isinstance(value, float) else value


def placement_groups() -> list[str]:
    """Return the placement groups that still hold room."""
    groups = ray.util.placement_group_table().values()
    return [group["state"] for group in groups if group["state"] != "REMOVED"]


def test_a_worker_that_dies_ends_the_evaluation_with_one_message(ray_cluster: None, run: Path) -> None:
    def kill_one() -> None:
        wait_until(lambda: len(processes("EvaluationWorker")) == 2, "the workers")
        processes("EvaluationWorker")[1].kill()

    killer = threading.Thread(target=kill_one)
    killer.start()
    with pytest.raises(WorkerLost, match=r"a worker was lost: .*\n  fix: run the same command again"):
        evaluation(run, Console(file=io.StringIO()), on_workers(2))
    killer.join()
    wait_until(lambda: not processes("EvaluationWorker"), "the end of the other one")
    assert not placement_groups()


@pytest.mark.parametrize(
    ("count", "message"),
    [(0, "--workers: there must be at least one worker"), (4, r"4 worker\(s\) with 1 CPU\(s\) each.* exceed")],
)
def test_a_number_of_workers_that_cannot_be_is_one_message(
    ray_cluster: None, run: Path, count: int, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        evaluation(run, Console(file=io.StringIO()), on_workers(count), "scaling.cpus_per_worker=1")


def test_an_error_of_the_user_arrives_from_a_worker_as_it_is(ray_cluster: None, run: Path, tmp_path: Path) -> None:
    (tmp_path / "long.jsonl").write_text(
        "".join(json.dumps({"prompt": f"{n} " * 500, "chosen": "a", "rejected": "b"}) + "\n" for n in range(4))
    )
    with pytest.raises(UserError, match="none of the 4 held-out rows can be used"):
        evaluation(run, Console(file=io.StringIO()), on_workers(2), f"data.eval={tmp_path}/long.jsonl")
