"""The Python code in docs/evaluation.md, run on a run folder with LoRA adapters and on its merged export."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console

from orpo_ray.exporting.export import ExportOptions, export_run
from support.finished_runs import finished_run, trained
from support.paths import ROOT
from support.tiny_runs import tiny_recipe


def test_the_code_loads_a_model_and_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (ROOT / "docs" / "evaluation.md").read_text()
    final, merged = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    recipe = tiny_recipe(tmp_path, "my-run", model={"lora": {"r": 4}})
    run = finished_run(recipe, trained(recipe))
    export_run(str(run), ExportOptions(), Console(file=io.StringIO()))
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (64, 64), "red").save("photo.jpg")
    for code, folder in ((final, run / "final"), (merged, run / "export")):
        where = str(folder.relative_to(run))
        assert f"runs/my-run/{where}" in code
        names: dict[str, Any] = {}
        exec(code.replace(f"runs/my-run/{where}", str(folder)), names)
        adapted = any("lora_A" in name for name in names["model"].state_dict())
        assert adapted == (folder.name == "final")
    assert capsys.readouterr().out
