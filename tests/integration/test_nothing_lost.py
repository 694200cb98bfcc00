"""Of 400 rows, 20 are bad in ten ways: these are recorded, and all others are used once per epoch."""

from __future__ import annotations

import json
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from orpo_ray.config.recipe import Recipe
from orpo_ray.data.balance import Packing
from orpo_ray.data.from_recipe import encoder_of, run_data
from orpo_ray.streaming.feed import StepFeed
from orpo_ray.streaming.steps import iter_shares
from orpo_ray.tracking.jsonl import read_jsonl
from support.broken_rows import KINDS, write_broken
from support.kills import one_worker_killed
from support.runs import run
from support.tiny_runs import losses, tiny_recipe

pytestmark = pytest.mark.usefixtures("ray_cluster")

ROWS, OF_EACH, PER_STEP = 400, 2, 20

Broken = tuple[Path, dict[str, str]]


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Broken:
    return write_broken(tmp_path_factory.mktemp("broken"), ROWS, OF_EACH)


def recipe_of(storage: Path, name: str, broken: Broken, workers: int, epochs: int = 1) -> Recipe:
    sections: dict[str, Any] = {
        "data": {"train": str(broken[0]), "shuffle_window": 128, "max_bad_fraction": 0.1},
        "optim": {"epochs": epochs, "max_steps": None, "pairs_per_step": PER_STEP},
        "checkpoint": {"every_steps": 4},
        "scaling": {"num_workers": workers},
    }
    return tiny_recipe(storage, name, **sections)


def check(recipe: Recipe, broken: Broken) -> None:
    """Check what every run must record: the 20 bad rows with their reasons, each once, and the number of all others."""
    folder = Path(recipe.run_uri)
    written = read_jsonl(folder / "bad_rows.jsonl")
    assert {row["source"]: row["reason"] for row in written} == broken[1]
    assert len(written) == OF_EACH * len(KINDS)
    assert sorted(losses(folder)) == list(range(1, ROWS // PER_STEP + 1))
    position = json.loads(max(folder.glob("checkpoint_*/position.json")).read_text())
    bad = OF_EACH * len(KINDS)
    assert (position["step"], position["seen"], position["bad"]) == (ROWS // PER_STEP, ROWS, bad)


def test_every_good_row_once_an_epoch_for_any_number_of_workers(tmp_path: Path, broken: Broken) -> None:
    for workers, epochs in ((1, 1), (3, 2)):
        recipe = recipe_of(tmp_path, "stream", broken, 1, epochs).with_absolute_paths()
        read, _ = run_data(recipe)
        trained: Counter[tuple[int, str]] = Counter()
        bad: Counter[str] = Counter()
        feed = StepFeed(read, encoder_of(recipe), workers, max_encoders=2)
        packing, steps = Packing(4096, "shared_prefix"), epochs * ROWS // PER_STEP
        shares = [iter_shares(partial(feed.take, rank), packing, 0, steps) for rank in range(workers)]
        for together in zip(*shares, strict=True):
            for share in together:
                trained.update((pair.sample_index // ROWS, pair.id) for pair in share.pairs)
                assert share.bad == together[0].bad
            bad.update(record.source for record in together[0].bad)
        assert set(trained.values()) == {1}
        assert len(trained) == epochs * (ROWS - OF_EACH * len(KINDS))
        assert bad == dict.fromkeys(broken[1], epochs)


@pytest.mark.nightly
def test_a_lost_worker_and_another_number_of_workers_change_nothing(tmp_path: Path, broken: Broken) -> None:
    whole = recipe_of(tmp_path, "whole", broken, 1)
    run(whole)
    check(whole, broken)
    killed = recipe_of(tmp_path, "killed", broken, 2)
    with one_worker_killed(killed) as done:
        run(killed)
    assert done[0] < ROWS // PER_STEP
    check(killed, broken)
    assert losses(Path(killed.run_uri)) == pytest.approx(losses(Path(whole.run_uri)), abs=1e-4)
