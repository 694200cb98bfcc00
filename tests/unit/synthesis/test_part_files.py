"""The files of a part."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from orpo_ray.data.bad_rows import BadRow
from orpo_ray.data.formats import detect_format, to_pair
from orpo_ray.data.groups import Grouping
from orpo_ray.errors import RowError
from orpo_ray.storage.run_folder import RunFolder
from orpo_ray.synthesis.candidates import Candidate
from orpo_ray.synthesis.outcome import Synthesized
from orpo_ray.synthesis.part_files import read_facts, write_part
from orpo_ray.synthesis.row_result import RowResult
from support.synthesis import lines_of, pairs_of, row_of

NO_GROUPS = Grouping()


def results() -> list[RowResult]:
    best, worst = Candidate("red", "model", 0.7, 5, 1.5), Candidate("blue", "given", score=0.25)
    made = RowResult(row_of(0), candidates=[best, worst], left_out=1, pair=(best, worst))
    thrown = RowResult(row_of(1), candidates=[best])
    thrown.fail(RowError("one_answer", "only one"))
    bad = RowResult(BadRow(-1, "b", "f:2", "malformed_row", "no"))
    bad.fail(RowError("malformed_row", "no"))
    return [made, thrown, bad]


def test_pairs_are_rows_of_a_prepared_set_and_every_row_has_a_line(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path))
    assert read_facts(folder, 2) is None
    written = write_part(folder, 2, results(), NO_GROUPS)
    assert read_facts(folder, 2) == written
    assert (written.rows, written.pairs, written.thrown_away, written.margins) == (3, 1, {"one_answer": 1}, 1.25)
    assert [row.reason for row in written.bad_rows] == ["malformed_row"]
    (row,) = pairs_of(tmp_path)
    assert (row["chosen_score"], row["chosen_seed"], row["rejected_origin"], row["rejected_seed"]) == (
        1.5,
        5,
        "given",
        None,
    )
    assert detect_format(row, [row], {}, "auto", "f") == "trl"
    pair = to_pair(row, "trl", {}, "f")
    assert (pair.id, pair.chosen, pair.rejected, pair.prompt) == ("r0", "red", "blue", row_of(0).prompt)
    assert pair.images == row_of(0).images
    assert [line["outcome"] for line in lines_of(tmp_path)] == ["pair", "one_answer", "malformed_row"]
    assert lines_of(tmp_path)[0]["candidates"][1] == {"text": "blue", "origin": "given", "score": 0.25}


def test_pairs_keep_the_columns_of_their_language_and_domain(tmp_path: Path) -> None:
    made, thrown, bad = results()
    assert not isinstance(made.row, BadRow)
    made.row = replace(made.row, language="de", domain="charts")
    write_part(RunFolder(str(tmp_path)), 0, [made, thrown, bad], Grouping("lang", "chosen_origin"))
    (row,) = pairs_of(tmp_path)
    assert (row["lang"], row["chosen_origin"]) == ("de", "model"), "a column of the set itself stays what it is"
    write_part(RunFolder(str(tmp_path)), 0, [made], Grouping("script", "topic"))
    (row,) = pairs_of(tmp_path)
    assert row["topic"] == "charts"
    assert "script" not in row, "it is detected when the pairs are read"


def test_a_part_without_pairs_is_a_part(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path))
    written = write_part(folder, 0, results()[1:], NO_GROUPS)
    assert read_facts(folder, 0) == written
    assert pairs_of(tmp_path) == []


def test_parts_add_up(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path))
    parts = [write_part(folder, 0, results(), NO_GROUPS), write_part(folder, 1, results()[:2], NO_GROUPS)]
    made = Synthesized.of("u", parts)
    assert (made.rows, made.pairs, made.thrown_away, len(made.bad)) == (5, 2, {"one_answer": 2}, 1)
    assert made.thrown_away_fraction == 0.5  # of the four usable rows
    assert (made.mean_margin, made.candidates, made.left_out) == (1.25, 6, 2)
    assert json.dumps(made.as_json())
