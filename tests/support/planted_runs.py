"""Run folders with planted curves and scores of pairs, made without training."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from orpo_ray.config.load import parse_recipe, read_mapping
from orpo_ray.config.recipe import Recipe
from orpo_ray.data.from_recipe import held_out_data
from orpo_ray.evaluation.pair_scores import write_pair_scores
from orpo_ray.evaluation.token_scores import write_tokens
from orpo_ray.storage.run_folder import EVAL_PAIRS_FILE, EVAL_PAIRS_START_FILE, RunFolder
from orpo_ray.tracking.generations import Generation, GenerationsFile
from support.planted_scores import planted
from support.tiny_runs import tiny_recipe, write_pairs

STEPS = 120


def metrics(steps: int = STEPS, seed: int = 0) -> list[dict[str, Any]]:
    """Return the lines of `metrics.jsonl` of a run that learns, with an evaluation every 30 steps."""
    rng = np.random.default_rng(seed)
    lines: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        learned = 1 - math.exp(-step / (0.3 * steps))
        chosen, rejected = -2.4 + 1.6 * learned, -2.4 + 0.7 * learned
        figures = {
            "loss": 4.1 - 2.6 * learned, "nll_loss": 3 - 2 * learned, "log_odds_ratio": -0.69 + 0.5 * learned,
            "rewards/chosen": chosen, "rewards/rejected": rejected, "rewards/margins": chosen - rejected,
            "rewards/accuracies": 0.5 + 0.4 * learned,
        }  # fmt: skip
        noisy = {f"train/{name}": value + 0.08 * rng.normal() for name, value in figures.items()}
        other = {
            "learning_rate": 1e-5 * (1 - step / steps), "grad_norm": 3 + rng.gamma(2, 0.5),
            "pairs_per_second": 40 + rng.normal(), "data_wait_fraction": 0.03 + 0.01 * rng.random(),
        }  # fmt: skip
        lines.append({"step": step} | noisy | {f"train/{name}": value for name, value in other.items()})
        if step % 30 == 0:
            lines.append({"step": step} | {f"eval/{name}": value for name, value in figures.items()})
    lines.append({"step": 60, "train/restarts": 1, "train/repeated_steps": 7})
    return lines


def planted_run(
    folder: Path, name: str = "planted", accuracy: float = 0.9, on_start: bool = True, pairs: int = 80, seed: int = 0,
    finished: bool = True, **sections: Any,
) -> Path:  # fmt: skip
    """Write a run folder, with the images of its held-out pairs beside it."""
    data = {"train": "easy-vqa:train", "eval": str(write_pairs(folder / "data", pairs, "test"))}
    recipe = tiny_recipe(folder, name, **({"data": data} | sections)).with_absolute_paths()
    run = Path(recipe.run_uri)
    run.mkdir(parents=True)
    (run / "recipe.yaml").write_text(recipe.to_yaml())
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics(seed=seed)))
    bad = [{"id": f"{n}", "source": f"mine.jsonl:{n}", "reason": reason, "detail": "900 tokens"}
           for n, reason in enumerate(["too_long"] * 5 + ["missing_image"] * 2)]  # fmt: skip
    (run / "bad_rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in bad))
    (run / "environment.json").write_text(json.dumps({"orpo-ray": "0.2.0", "torch": "2.13.0", "cpus": "2"}))
    (run / "data.json").write_text(json.dumps([["train.jsonl", "0123456789abcdef"]]))
    _write_scores(recipe, run, planted(pairs, accuracy, exchanged=0.5, seed=seed), EVAL_PAIRS_FILE)
    if on_start:
        _write_scores(recipe, run, planted(pairs, 0.5, seed=seed + 1), EVAL_PAIRS_START_FILE)
    _write_generations(recipe, run)
    _write_tokens(recipe, run, pairs)
    if finished:
        (run / "final").mkdir()
        (run / "final" / "config.json").write_text("{}")
    return run


def score_again(run: Path) -> None:
    """Plant scores again, after the held-out data has changed."""
    recipe = parse_recipe(read_mapping(run / "recipe.yaml"))
    pairs = len((run.parent / "data" / "test.jsonl").read_text().splitlines())
    _write_scores(recipe, run, planted(pairs, 0.9, exchanged=0.5), EVAL_PAIRS_FILE)
    _write_scores(recipe, run, planted(pairs, 0.5, seed=1), EVAL_PAIRS_START_FILE)
    _write_tokens(recipe, run, pairs)
    (run / "generations.jsonl").unlink()
    _write_generations(recipe, run)


def _write_tokens(recipe: Recipe, run: Path, pairs: int) -> None:
    """Write log-probs of tokens, of all pairs but every fourth."""
    held_out = held_out_data(recipe)
    assert held_out is not None
    tokens = {
        index: {
            "chosen": [("Yes", -0.1), (",", -1.5), (" <b>it</b>", -3.0), (" is.", -6.0)],
            "rejected": [("No.", -2.5)],
        }
        for index in range(pairs)
        if index % 4
    }
    write_tokens(RunFolder(str(run)), tokens, held_out.digest)  # type: ignore[arg-type]


def _write_generations(recipe: Recipe, run: Path) -> None:
    """Write answers to two pairs at seven steps."""
    held_out = held_out_data(recipe)
    assert held_out is not None
    tracker = GenerationsFile(RunFolder(str(run)), 0)
    for step in range(0, STEPS + 1, 20):
        answers = [
            Generation(place, f"answered {place}", held_out.digest, "Is it red?", "Yes.", "No.",
                       f"greedy at {step}", f"<b>sampled</b> at {step} " + "word " * 40)
            for place in (0, 3)
        ]  # fmt: skip
        tracker.log_generations(step, answers)
    tracker.close()


def _write_scores(recipe: Recipe, run: Path, scores: pa.Table, name: str) -> None:
    held_out = held_out_data(recipe)
    assert held_out is not None
    write_pair_scores(RunFolder(str(run)), name, scores, data=held_out.digest)
