"""Run folders that trials side by side write: logs, checkpoints, final adapters, and a run that leaves."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from orpo_ray.config.load import parse_recipe
from orpo_ray.config.recipe import Recipe
from orpo_ray.data.balance import Packing, PairSize, StepShare, StepTotals, distribute
from orpo_ray.data.encoding import EncodedPair, PairEncoder
from orpo_ray.data.order import Order
from orpo_ray.data.reading import ReadSpec, pair_of, read_windows
from orpo_ray.data.shards import list_file_shards
from orpo_ray.errors import UserError
from orpo_ray.model.loading import load_model
from orpo_ray.objective.pair_model import PairModel
from orpo_ray.processing.pixel_norm import PixelNorm
from orpo_ray.processing.processor import load_processor
from orpo_ray.storage.run_folder import RunFolder
from orpo_ray.training.checkpoint import load_checkpoint
from orpo_ray.training.checkpoint_choice import checkpoint_names
from orpo_ray.training.packed_runs import PackedData, PackedRuns
from orpo_ray.training.replicated_engine import ReplicatedEngine
from support.tiny_runs import write_pairs

TINY, STEPS, CPU = "orpo-ray/tiny-smolvlm", 4, torch.device("cpu")


@pytest.fixture(autouse=True)
def process_group(tmp_path: Path) -> Iterator[None]:
    """A process group of this process."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> PackedData:
    folder = tmp_path_factory.mktemp("pairs")
    segments = list_file_shards(str(write_pairs(folder, 6)), "data.train")
    read = ReadSpec(tuple(segments), ("trl",), Order((6,), None, 10), 6, 0, 2 * STEPS)
    rows = [pair_of(row) for table in read_windows(read, [(0, 0)]) for row in table.to_pylist()]
    encoder = PairEncoder(load_processor(TINY, None), max_length=256)
    pairs: Any = encoder.encode_many(rows, [folder] * len(rows))  # type: ignore[arg-type]

    def share(step: int, own: list[EncodedPair], packing: Packing) -> StepShare:
        sizes = [PairSize.of(pair) for pair in own]
        places = distribute(sizes, 1, packing)[0]
        return StepShare(step, StepTotals.of(sizes), [[own[index] for index in each] for each in places], [])

    def shares(first: int, packing: Packing) -> Iterator[StepShare]:
        for step in range(first, STEPS):
            yield share(step, [pairs[2 * step % 6], pairs[(2 * step + 1) % 6]], packing)

    def held_out(exchange_images: bool, packing: Packing) -> Iterator[StepShare]:
        yield share(0, pairs[:3] if not exchange_images else [], packing)

    return PackedData(read, shares, held_out, "", encoder, STEPS)


class Heard:
    """What a listener heard; asks one run to stop at a step."""

    def __init__(self, stop: str = "", at: int = 0) -> None:
        self.reports: list[tuple[str, int]] = []
        self.ends: dict[str, Exception | None] = {}
        self.steps: dict[str, int] = {}
        self._stop, self._at = stop, at

    def tell(self, name: str, **state: Any) -> None:
        self.steps[name] = state.get("step", self.steps.get(name, 0))

    def warn(self, name: str, text: str) -> None:
        pass

    def report(self, name: str, metrics: dict[str, float]) -> None:
        assert any(key.startswith(("eval/", "train/")) for key in metrics)
        if "step" in metrics:  # those of a checkpoint on the way have none
            self.reports.append((name, int(metrics["step"])))

    def ended(self, name: str, error: Exception | None) -> None:
        self.ends[name] = error

    def asks_to_stop(self, name: str) -> bool:
        return name == self._stop and self.steps[name] >= self._at


def recipes_in(storage: Path) -> dict[str, Recipe]:
    """Three trials, in run folders of one sweep."""
    own: dict[str, Any] = {
        "calm": ({"r": 4}, {"learning_rate": 1e-3}, 0.1),
        "wide": ({"r": 8, "alpha": 5}, {"learning_rate": 2e-3, "seed": 3}, 1.0),
        "lost": ({"r": 4}, {"learning_rate": 1e-3}, 0.5),
    }
    return {
        name: parse_recipe(
            {
                "name": f"sweep/trials/{name}",
                "model": {"id": TINY, "lora": lora},
                "data": {"train": "none", "eval": "none"},
                "orpo": {"beta": beta},
                "optim": {"pairs_per_step": 2, "warmup": 0, **optim},
                "eval": {"every_steps": 2, "grounding": False},
                "checkpoint": {"every_steps": 2, "storage": str(storage)},
            }
        )
        for name, (lora, optim, beta) in own.items()
    }


def packed(
    recipes: dict[str, Recipe], data: PackedData, heard: Heard, checkpoints: dict[str, str] | None = None
) -> PackedRuns:
    first = next(iter(recipes.values()))
    model = PairModel(load_model(first.model, CPU, first.optim.seed), PixelNorm.of(data.encoder.processor))
    for recipe in recipes.values():
        RunFolder(recipe.run_uri).make()
    return PackedRuns(recipes, {name: (checkpoints or {}).get(name) for name in recipes}, model, data, heard, "here")


def final_of(recipe: Recipe) -> dict[str, torch.Tensor]:
    return load_file(RunFolder(recipe.run_uri).path / "final" / "adapter_model.safetensors")


def test_every_folder_is_that_of_a_run(data: PackedData, tmp_path: Path) -> None:
    recipes, heard = recipes_in(tmp_path), Heard()
    pack = packed(recipes, data, heard)
    shutil.rmtree(RunFolder(recipes["lost"].run_uri).path)
    pack.run()
    assert list(heard.ends) == ["lost", "calm", "wide"]
    assert isinstance(heard.ends["lost"], OSError)
    assert heard.ends["calm"] is None
    assert heard.ends["wide"] is None
    for name, rank in (("calm", 4), ("wide", 8)):
        folder = RunFolder(recipes[name].run_uri)
        lines = [json.loads(line) for line in (folder.path / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines if "train/loss" in line] == [1, 2, 3, 4]
        assert [line["step"] for line in lines if "eval/loss" in line] == [2, 4]
        assert json.loads((folder.path / "final" / "adapter_config.json").read_text())["r"] == rank
        assert [step for own, step in heard.reports if own == name] == [2, 4]
    # A run of its own goes on from the checkpoint of step 2, to the same adapters.
    wide = recipes["wide"]
    oldest = checkpoint_names(RunFolder(wide.run_uri))[-1]
    model = PairModel(load_model(wide.model, CPU, 0), PixelNorm.of(data.encoder.processor))
    engine = ReplicatedEngine(model, wide, STEPS, 1)
    position, _ = load_checkpoint(oldest, engine, wide, data.train, "here")
    assert position.step == 2
    # So do the same runs side by side, in other folders.
    again = Heard()
    two = {name: recipe for name, recipe in recipes.items() if name != "lost"}
    for recipe in two.values():
        (RunFolder(recipe.run_uri).path / "final").rename(RunFolder(recipe.run_uri).path / "first")
    oldest_of = {name: checkpoint_names(RunFolder(recipe.run_uri))[-1] for name, recipe in two.items()}
    packed(two, data, again, oldest_of).run()
    for recipe in two.values():
        before = load_file(RunFolder(recipe.run_uri).path / "first" / "adapter_model.safetensors")
        for path, weight in final_of(recipe).items():
            torch.testing.assert_close(weight, before[path], rtol=1e-4, atol=1e-5, msg=path)


def test_a_run_that_is_asked_to_stop_leaves_at_once(data: PackedData, tmp_path: Path) -> None:
    recipes, heard = recipes_in(tmp_path), Heard(stop="wide", at=1)
    recipes.pop("lost")
    packed(recipes, data, heard).run()
    assert list(heard.ends) == ["wide", "calm"]
    assert heard.steps == {"calm": STEPS, "wide": 1}
    assert not (RunFolder(recipes["wide"].run_uri).path / "final").exists()
    assert final_of(recipes["calm"])


def test_a_folder_that_cannot_be_used_ends_its_own_run(data: PackedData, tmp_path: Path) -> None:
    recipes, heard = recipes_in(tmp_path), Heard()
    recipes.pop("wide")
    (RunFolder(recipes["lost"].run_uri).path / "metrics.jsonl").mkdir(parents=True)
    packed(recipes, data, heard).run()
    assert isinstance(heard.ends["lost"], OSError)
    assert heard.ends["calm"] is None
    assert final_of(recipes["calm"])


def test_checkpoints_of_different_steps_are_refused(data: PackedData, tmp_path: Path) -> None:
    recipes, heard = recipes_in(tmp_path), Heard()
    recipes.pop("lost")
    packed(recipes, data, heard).run()
    newest = {"calm": checkpoint_names(RunFolder(recipes["calm"].run_uri))[0]}
    with pytest.raises(UserError, match=r"steps \[0, 4\]"):
        packed(recipes, data, heard, newest)
