"""The package's metadata: one version, declared dependencies, and extras that error messages name."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tomllib
import zipfile
from functools import partial
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import orpo_ray
from orpo_ray.extras import EXTRAS
from support.paths import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DISTRIBUTIONS = packages_distributions()


def names(requirements: list[str]) -> set[str]:
    """Distribution names of requirements, in their canonical form."""
    return {canonicalize_name(Requirement(each).name) for each in requirements}


def imported_modules() -> set[str]:
    """Top-level names of everything that the package imports, at the top of a file or inside a function."""
    found = set()
    for file in Path(orpo_ray.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module.split(".")[0])
    return found - set(sys.stdlib_module_names) - {"orpo_ray"}


def test_the_version_has_one_source() -> None:
    assert PROJECT["dynamic"] == ["version"]
    assert "version" not in PROJECT
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == orpo_ray.__version__


def test_the_package_is_typed() -> None:
    assert Path(orpo_ray.__file__).with_name("py.typed").is_file()


def test_every_import_is_a_declared_dependency() -> None:
    core = names(PROJECT["dependencies"])
    extras = {module: names(PROJECT["optional-dependencies"][extra]) for module, extra in EXTRAS.items()}
    for module in imported_modules() - {"triton"}:  # comes with torch, where torch has use for it
        distributions = {canonicalize_name(name) for name in DISTRIBUTIONS[module]}
        assert distributions & (core | extras.get(module, set())), f"{module} is imported but not declared"


def test_extras_are_imported_inside_functions_only() -> None:
    for file in Path(orpo_ray.__file__).parent.rglob("*.py"):
        for node in ast.parse(file.read_text()).body:
            imported = {alias.name for alias in node.names} if isinstance(node, ast.Import) else set()
            imported |= {node.module} if isinstance(node, ast.ImportFrom) and node.module else set()
            assert not {name.split(".")[0] for name in imported} & set(EXTRAS), file


def test_all_installs_every_extra() -> None:
    extras = PROJECT["optional-dependencies"]
    (all_of_them,) = extras["all"]
    assert Requirement(all_of_them).extras == set(EXTRAS.values())


NEEDS = (
    {
        "easy_vqa": "from orpo_ray.tiny_models.easy_vqa import easy_vqa_rows; easy_vqa_rows('train')",
        "sklearn": "from orpo_ray.data_report.text_only_baseline import text_only_accuracy; text_only_accuracy([])",
        "wandb": "from orpo_ray.extras import require; require('wandb', 'tracking.wandb.enabled')",
    }
    | {
        name: f"from orpo_ray.extras import require; require('{name}', 'tracking.{name}.enabled')"
        for name in ("tensorboard", "mlflow", "trackio")
    }
    | {"optuna": "from orpo_ray.extras import require; require('optuna', 'tune.searcher')"}
)


@pytest.mark.parametrize("module", EXTRAS)
def test_a_missing_extra_is_named(module: str) -> None:
    code = f"""
import sys
sys.modules[{module!r}] = None  # what Python does when a package is absent
from orpo_ray.errors import UserError
try:
    {NEEDS[module]}
except UserError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert f'pip install "orpo-ray[{EXTRAS[module]}]"' in result.stdout


def test_the_wheel_holds_recipes_and_pages(tmp_path: Path) -> None:
    """Builds the wheel without its build dependencies' network, if they are installed."""
    wheels = pytest.importorskip("hatchling.builders.wheel", reason="no hatchling (pip install hatchling)")
    (built,) = wheels.WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    with zipfile.ZipFile(built) as wheel:
        names = set(wheel.namelist())
    assert {f"orpo_ray/recipes/{path.name}" for path in (ROOT / "recipes").glob("*.yaml")} <= names
    for name in ("pages/page.css", "pages/page.js", "pages/parts.html", "report/report_page.html", "py.typed"):
        assert f"orpo_ray/{name}" in names
    assert not [name for name in names if name.startswith("recipes/") or "/tests/" in name]


@pytest.mark.nightly
@pytest.mark.timeout(1800)
def test_an_installed_package_writes_its_recipes(tmp_path: Path) -> None:
    """Installs the wheel, without its dependencies, beside those of this environment, and runs it from elsewhere."""
    run = partial(subprocess.run, check=True, capture_output=True, text=True)
    run([sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", str(tmp_path), str(ROOT)])
    (built,) = tmp_path.glob("*.whl")
    run([sys.executable, "-m", "pip", "install", "--no-deps", "--target", str(tmp_path / "there"), str(built)])
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "there")}
    command = [sys.executable, "-m", "orpo_ray"]
    run([*command, "init", "quickstart"], cwd=tmp_path, env=environment)
    tiny = ["optim.max_steps=2", "optim.pairs_per_step=4", "eval.max_pairs=8"]
    run([*command, "train", "quickstart.yaml", *tiny], cwd=tmp_path, env=environment)
    assert (tmp_path / "runs" / "quickstart" / "report.html").is_file()
