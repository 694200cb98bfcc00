"""The house's floors: a file imports only from files that stand before it, and some floors stay light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "orpo_ray"

FLOORS = [
    "errors",
    "storage",
    "sections",
    "compatible",
    "recipe",
    "run_folder",
    "data.easy_vqa",
    "data.pairs",
    "data.formats",
    "data.fetch",
    "data.images",
    "data.containers",
    "data.sources",
    "data.order",
    "data.encoding",
    "data.packing",
    "data.reading",
    "data.split",
    "data.blind",
    "data.check",
    "data.check_page",
    "data.pipeline",
    "data.stream",
    "data.survey",
    "model.families",
    "model.tiny_families",
    "model.tiny",
    "model.packed_flash",
    "model.shared_prefix",
    "model.quantizing",
    "model.lora",
    "model.loading",
    "model.adapters",
    "model.merging",
    "objective.orpo",
    "objective.logps",
    "objective.forward",
    "objective.steps",
    "results.tracking",
    "results.scoring",
    "training.deepspeed",
    "training.checkpoint",
    "training.data",
    "training.bad_rows",
    "training.progress",
    "training.worker",
    "training.launch",
    "training.sweep",
    "results.evaluate",
    "results.model_card",
    "results.publishing",
    "results.export",
    "results.data_check",
    "results.data_prepare",
    "cli",
    "__main__",
]

WITHOUT_RAY_AND_DEEPSPEED = [
    name
    for name in FLOORS
    if name.startswith(("model.", "objective.", "data."))
    and name not in ("data.pipeline", "data.stream", "data.survey")
]


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def imports_of(path: Path) -> set[str]:
    """Every module named in an import anywhere in the file, deferred ones too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")


def test_every_file_has_a_floor() -> None:
    assert {module_name(path) for path in FILES} == set(FLOORS)


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_come_from_below(path: Path) -> None:
    own = FLOORS.index(module_name(path))
    below = {name.removeprefix("orpo_ray.") for name in imports_of(path) if name.startswith("orpo_ray.")}
    above = sorted(name for name in below if FLOORS.index(name) >= own)
    assert not above, f"{module_name(path)} imports from its own floor or above: {above}"


@pytest.mark.parametrize("name", WITHOUT_RAY_AND_DEEPSPEED)
def test_can_be_used_in_a_plain_loop(name: str) -> None:
    path = PACKAGE / Path(*name.split(".")).with_suffix(".py")
    heavy = {module for module in imports_of(path) if module.split(".")[0] in ("ray", "deepspeed")}
    assert not heavy


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"]])
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
    assert "train" in result.stdout.lower()
