"""Loading a model runs no code, reads no pickles and changes no revision, unless the recipe allows it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from orpo_ray.config.recipe import Recipe
from orpo_ray.config.schema import ModelConfig
from orpo_ray.data.from_recipe import encoder_of
from orpo_ray.errors import UserError
from orpo_ray.model.loading import commit_of, load_model
from orpo_ray.processing.processor import load_processor
from orpo_ray.storage.run_folder import METRICS_FILE, RECIPE_FILE, RunFolder
from orpo_ray.tiny_models.build import resolve
from orpo_ray.training.run_identity import check_run_folder, pinned
from support.tiny_runs import tiny_recipe

TINY = "orpo-ray/tiny-llava"
CPU = torch.device("cpu")
COMMIT = "c0ffee00" * 5


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Copy the folder of the tiny model."""
    return Path(shutil.copytree(resolve(TINY), tmp_path / "model"))


def load(folder: Path, **section: Any) -> torch.nn.Module:
    return load_model(ModelConfig(id=str(folder), **section), CPU, seed=0)


@pytest.fixture
def with_code(model: Path) -> tuple[Path, Path]:
    """A model with its own Python code for config and processor, which writes the returned marker file if it is run."""
    marker = model.parent / "ran"
    code = (
        "import pathlib\n"
        f"pathlib.Path({str(marker)!r}).write_text('ran')\n"
        "from transformers import LlavaConfig, LlavaProcessor\n"
        "class OwnConfig(LlavaConfig):\n    pass\n"
        "class OwnProcessor(LlavaProcessor):\n    pass\n"
    )
    (model / "own.py").write_text(code)
    for name, auto_map in (
        ("config.json", {"AutoConfig": "own.OwnConfig"}),
        ("processor_config.json", {"AutoProcessor": "own.OwnProcessor"}),
    ):
        path = model / name
        path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": auto_map}))
    return model, marker


def test_code_of_a_known_family_is_not_run(with_code: tuple[Path, Path]) -> None:
    folder, marker = with_code
    load(folder)
    load_processor(str(folder), None)
    assert not marker.exists()


def test_a_model_that_is_its_own_code_says_which_field(with_code: tuple[Path, Path]) -> None:
    folder, marker = with_code
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "own"}))
    with pytest.raises(UserError) as error:
        load(folder)
    assert error.value.field == "model.trust_remote_code"
    assert not marker.exists()


def test_code_is_run_when_the_recipe_says_so(with_code: tuple[Path, Path]) -> None:
    folder, marker = with_code
    commit_of(ModelConfig(id=str(folder), trust_remote_code=True))
    assert marker.exists()
    encoder = encoder_of(tiny_recipe(folder.parent, "run", model={"id": str(folder), "trust_remote_code": True}))
    assert type(encoder.build().processor).__name__ == "OwnProcessor"


@pytest.fixture
def pickled(model: Path) -> Path:
    """The same model with its weights in a .bin file."""
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    return model


def test_pickled_weights_are_refused_unless_allowed(pickled: Path) -> None:
    with pytest.raises(UserError) as error:
        load(pickled)
    assert error.value.field == "model.allow_pickle"
    allowed = load(pickled, allow_pickle=True).state_dict()
    for name, value in load_model(ModelConfig(id=TINY), CPU, seed=0).state_dict().items():
        assert torch.equal(allowed[name], value), name


class Malicious:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def test_a_pickle_that_is_allowed_still_runs_no_code(pickled: Path) -> None:
    marker = pickled.parent / "ran"
    weights: dict[str, Any] = torch.load(pickled / "pytorch_model.bin")
    torch.save(weights | {"x": Malicious(marker)}, pickled / "pytorch_model.bin")
    with pytest.raises(UserError, match="more than tensors"):
        load(pickled, allow_pickle=True)
    assert not marker.exists()


def test_a_folder_without_weights_is_not_called_pickled(model: Path) -> None:
    (model / "model.safetensors").unlink()
    with pytest.raises(UserError) as error:
        load(model)
    assert error.value.field == "model.id"


def saved(tmp_path: Path, revision: str | None) -> RunFolder:
    """Write the folder of a run that made steps, with its resolved recipe."""
    recipe = of(tmp_path, revision)
    folder = RunFolder(recipe.run_uri)
    folder.make()
    (folder.path / RECIPE_FILE).write_text(recipe.to_yaml())
    (folder.path / METRICS_FILE).write_text("{}\n")
    return folder


def test_a_run_that_made_no_step_may_be_another_recipe_s(tmp_path: Path) -> None:
    folder = saved(tmp_path, "main")
    (folder.path / METRICS_FILE).unlink()
    assert check_run_folder(of(tmp_path, None), folder) is None


def of(tmp_path: Path, revision: str | None) -> Recipe:
    return tiny_recipe(tmp_path, "run", model={"id": "owner/name", "revision": revision})


@pytest.mark.parametrize("asked", [None, "main", "v1.0", COMMIT])
def test_a_run_goes_on_with_the_commit_that_it_began_with(tmp_path: Path, asked: str | None) -> None:
    run = check_run_folder(of(tmp_path, asked), saved(tmp_path, COMMIT))
    assert run is not None
    assert pinned(of(tmp_path, asked), run).model.revision == COMMIT


@pytest.mark.parametrize(("began", "asked"), [(COMMIT, "d" * 40), ("main", None), (None, COMMIT)])
def test_another_revision_is_another_recipe(tmp_path: Path, began: str | None, asked: str | None) -> None:
    with pytest.raises(UserError, match=r"model\.revision"):
        check_run_folder(of(tmp_path, asked), saved(tmp_path, began))


def test_a_folder_has_no_commit(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, "run")
    assert pinned(recipe, None) == recipe
