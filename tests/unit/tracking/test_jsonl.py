"""JSON Lines files of a run folder: damaged lines are named, one that a kill cut off is not counted."""

from __future__ import annotations

from pathlib import Path

import pytest

from orpo_ray.errors import UserError
from orpo_ray.tracking.jsonl import keep_lines, read_jsonl, read_whole_lines
from orpo_ray.tracking.metrics_file import is_metrics_line


@pytest.mark.parametrize("damage", [b'{"step": 2, "tr', b"\xff\xfe\x00", b"[" * 100_000, b"7"])
def test_a_damaged_line_is_named_and_the_others_are_read(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + damage + b'\n{"step": 3}\n{"step": 4, "tr')
    assert read_whole_lines(path) == ([{"step": 1}, {"step": 3}], [2])
    for read in (read_jsonl, lambda path: keep_lines(path, lambda line: True)):
        with pytest.raises(UserError, match=r"metrics.jsonl: line 2 is damaged\n  fix: delete the damaged line"):
            read(path)
    path.write_bytes(path.read_bytes().replace(damage + b"\n", b""))
    assert read_jsonl(path) == [{"step": 1}, {"step": 3}]


def test_a_line_without_its_fields_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{}\n{"step": 2}\n{}\n')
    assert read_whole_lines(path, lambda line: "step" in line) == ([{"step": 2}], [1, 3])
    with pytest.raises(UserError, match="2 lines are damaged, the first of them line 1"):
        read_jsonl(path, is_metrics_line)
    path.write_text('{"step": null}\n{"step": "7"}\n{"step": 1, "train/loss": "x"}\n{"step": 2, "train/loss": null}\n')
    assert read_whole_lines(path, is_metrics_line) == ([{"step": 2, "train/loss": None}], [1, 2, 3])
    assert read_whole_lines(tmp_path / "none") == ([], [])
