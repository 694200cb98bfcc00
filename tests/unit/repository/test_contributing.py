"""The table of packages in CONTRIBUTING.md: complete, and in the order that the layers have."""

from __future__ import annotations

import re
import tomllib

from support.paths import ROOT

PACKAGE = ROOT / "orpo_ray"


def test_the_table_has_every_package_in_the_order_of_the_layers() -> None:
    table = re.findall(r"^\| `(\w+)` \| .+ \|$", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    found = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert set(table) == found - {"__init__", "__main__"}
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (layers,) = [contract["layers"] for contract in contracts if contract["type"] == "layers"]
    level = {name: -number for number, layer in enumerate(layers) for name in re.findall(r"\w+", layer)}
    assert [level[name] for name in table] == sorted(level[name] for name in table)
