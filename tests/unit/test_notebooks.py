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


@pytest.mark.nightly
@pytest.mark.timeout(1800)
def test_the_story_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All cells, also those that train, in fewer steps."""
    monkeypatch.chdir(tmp_path)
    path = ROOT / "notebooks" / "preference_optimization_smolvlm.ipynb"
    names: dict[str, Any] = {}
    for cell in json.loads(path.read_text())["cells"]:
        if cell["cell_type"] == "code":
            source = "".join(cell["source"])
            for many, few in (("440", "40"), ("110", "20"), ('"eval.every_steps": 55', '"eval.every_steps": 10')):
                source = source.replace(many, few)
            exec(compile(source, f"{path.name}:{cell['id']}", "exec"), names)
    assert names["run"].metrics["step"] == 40
    assert len(names["compared"].scored.answers) == 3
    assert len(names["sweep"].trials) == 2
    page = (tmp_path / "runs" / "notebook" / "report.html").read_text()
    assert page.count('class="exchange"') == 3
    for shown in ("run", "compared"):
        assert names[shown]._repr_html_()
