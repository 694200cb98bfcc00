"""A report of a run folder with damaged files: what is damaged is left out, and named with the fix."""

from __future__ import annotations

import html
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from orpo_ray.errors import UserError
from orpo_ray.evaluation.pair_scores import read_pair_scores, read_whole_pair_scores
from orpo_ray.report.page import render_report
from orpo_ray.report.run_data import read_run
from orpo_ray.report.run_list import list_runs
from orpo_ray.storage.run_folder import RunFolder
from support.commands import orpo_ray_here
from support.planted_runs import planted_run

TABLES = ("eval_pairs.parquet", "eval_pairs_start.parquet")
OBJECTS = ("eval_tokens.json", "environment.json", "data.json")
LINES = ("metrics.jsonl", "bad_rows.jsonl", "generations.jsonl")


def damage(path: Path, how: str) -> None:
    whole = path.read_bytes()
    if how == "random":
        path.write_bytes(bytes(range(255, 0, -1)) * 8 + b"\n")
    elif how == "truncated":
        path.write_bytes(whole[: len(whole) // 2])
    elif how == "middle":
        path.write_bytes(whole[:40] + b"\xff" * (len(whole) // 2) + whole[40 + len(whole) // 2 :])
    else:
        path.write_bytes(b"")


@pytest.mark.parametrize("how", ["random", "truncated", "middle", "empty"])
@pytest.mark.parametrize("name", TABLES + OBJECTS)
def test_a_damaged_file_is_left_out_and_named(tmp_path: Path, name: str, how: str) -> None:
    run = planted_run(tmp_path)
    damage(run / name, how)
    read = read_run(RunFolder(str(run)))
    (problem,) = read.problems
    assert str(problem).startswith(f"{run / name}: the file is damaged\n  fix: delete the file")
    assert ("orpo-ray evaluate" in str(problem)) == (name in ("eval_pairs.parquet", "eval_tokens.json"))
    assert f"Left out: {html.escape(str(run / name))}: the file is damaged" in render_report([read])


@pytest.mark.parametrize("name", LINES)
def test_damaged_lines_are_left_out_and_the_others_shown(tmp_path: Path, name: str) -> None:
    run = planted_run(tmp_path)
    whole = (run / name).read_bytes().splitlines(keepends=True)
    (run / name).write_bytes(b"".join([whole[0], b"\xff\n", b"{}\n", *whole[1:]]))
    read = read_run(RunFolder(str(run)))
    (problem,) = read.problems
    assert str(problem).startswith(f"{run / name}: 2 lines are damaged, the first of them line 2\n")
    assert (read.step, len(read.bad_rows), len(read.generations)) == (120, 7, 2)
    assert "2 lines are damaged" in render_report([read])


@pytest.mark.parametrize(
    "content", ["[]", '{"pairs": {}}', '{"data": "x", "pairs": 3}', '{"data": "x", "pairs": {"a": 1}}']
)
def test_tokens_of_another_form_are_damaged(tmp_path: Path, content: str) -> None:
    run = planted_run(tmp_path)
    (run / "eval_tokens.json").write_text(content)
    assert "the file is damaged" in str(read_run(RunFolder(str(run))).problems[0])


def test_a_damaged_run_spoils_neither_a_report_of_several_nor_a_list(tmp_path: Path) -> None:
    whole, damaged = (planted_run(tmp_path / name, name) for name in ("whole", "damaged"))
    for name in TABLES + OBJECTS + LINES:
        damage(damaged / name, "random")
    done = orpo_ray_here("report", str(damaged), str(whole), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("warning: left out of the report: ") == 8
    assert (tmp_path / "report.html").is_file()
    assert len(list_runs(str(tmp_path / "damaged"))) == 1


def test_scores_that_can_be_done_without(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path))
    pq.write_table(pa.table({"other": [1]}), tmp_path / "eval_pairs.parquet")
    with pytest.raises(UserError, match="the file holds no scores of pairs"):
        read_pair_scores(folder, "eval_pairs.parquet")
    assert read_whole_pair_scores(folder, "eval_pairs.parquet") is None
    assert read_whole_pair_scores(folder, "eval_pairs_start.parquet") is None
