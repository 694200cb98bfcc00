"""The package's layers (`[tool.importlinter]` in pyproject.toml), and what must not import Ray or DeepSpeed."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from support.paths import ROOT

PACKAGE = ROOT / "orpo_ray"
FREE_OF_RAY = ("errors", "config", "storage", "tiny_models", "processing", "data", "model", "objective", "planning")


def modules(package: str) -> list[str]:
    """Return the names of all modules of a package, or of a single module."""
    files = sorted((PACKAGE / package).rglob("*.py")) or [PACKAGE / f"{package}.py"]
    return [".".join(file.relative_to(ROOT).with_suffix("").parts) for file in files]


def test_layers_import_downwards_only() -> None:
    lint = Path(sys.executable).with_name("lint-imports")
    result = subprocess.run([lint, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_training_step_modules_import_neither_ray_nor_deepspeed() -> None:
    """Imports each module in a new process and checks `sys.modules`, which also covers indirect imports."""
    names = [name for package in FREE_OF_RAY for name in modules(package)]
    if find_spec("triton") is None:
        names.remove("orpo_ray.model.triton_kernels")
    assert len(names) > 50
    code = (
        f"import importlib, sys\nfor name in {names!r}:\n    importlib.import_module(name)\n"
        "    heavy = {'ray', 'deepspeed'} & set(sys.modules)\n    assert not heavy, f'{name} imports {heavy}'\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["--version"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys\n"
        "from orpo_ray.cli import main\n"
        f"sys.argv = ['orpo-ray', *{arguments!r}]\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code\n"
        "heavy = {'torch', 'ray', 'transformers', 'deepspeed', 'numpy', 'pyarrow'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "orpo-ray" in result.stdout
