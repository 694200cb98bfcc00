"""Cells of all notebooks run in order, except those tagged as training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from support.paths import ROOT


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_cells_run(path: Path) -> None:
    names: dict[str, Any] = {}
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    for cell in cells:
        source = compile("".join(cell["source"]), f"{path.name}:{cell['id']}", "exec")
        if "trains" not in cell["metadata"]["tags"]:
            exec(source, names)
    assert float(names["loss"]) > 0
