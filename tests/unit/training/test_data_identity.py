"""A resumed run refuses other data, and names the files that changed."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from orpo_ray.data import content
from orpo_ray.errors import UserError
from orpo_ray.storage.run_folder import DATA_FILE, RunFolder
from orpo_ray.training.data_identity import check_data
from support.sources import rows, spec_of, write_jsonl


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    folder = RunFolder(str(tmp_path / "run"))
    folder.make()
    return folder


def write(data: Path, changed: dict[str, str] | None = None) -> str:
    """Write three files of 50 rows; `changed` replaces fields of all rows of the second one."""
    data.mkdir(exist_ok=True)
    for number in range(3):
        table = rows(50)
        if changed and number == 1:
            table = [row | changed for row in table]
        pq.write_table(pa.Table.from_pylist(table), data / f"{number}.parquet", compression="none")
    return str(data)


@pytest.mark.parametrize("whole", [True, False])
def test_swapped_answers_are_noticed_and_named(
    folder: RunFolder, tmp_path: Path, whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not whole:
        monkeypatch.setattr(content, "WHOLE_BYTES", 0)
        monkeypatch.setattr(content, "PIECE_BYTES", 64)
    source = write(tmp_path / "data")
    check_data(spec_of([source]), folder, is_new=True)
    before = (tmp_path / "data/1.parquet").stat().st_size
    check_data(spec_of([source]), folder, is_new=False)
    write(tmp_path / "data", {"chosen": "y", "rejected": "x"})
    assert (tmp_path / "data/1.parquet").stat().st_size == before
    with pytest.raises(UserError, match=r"have changed since the run began: 1\.parquet\n.*fix: resume with the same"):
        check_data(spec_of([source]), folder, is_new=False)


def test_files_may_move_to_another_folder(folder: RunFolder, tmp_path: Path) -> None:
    check_data(spec_of([write(tmp_path / "data")]), folder, is_new=True)
    (tmp_path / "data").rename(tmp_path / "moved")
    check_data(spec_of([str(tmp_path / "moved")]), folder, is_new=False)
    (tmp_path / "moved/2.parquet").rename(tmp_path / "moved/other.parquet")
    with pytest.raises(UserError, match=r"2\.parquet, other\.parquet"):
        check_data(spec_of([str(tmp_path / "moved")]), folder, is_new=False)


@pytest.mark.parametrize("text", ["", "{", '"x"'])
def test_a_run_without_a_readable_list_gets_one(folder: RunFolder, tmp_path: Path, text: str) -> None:
    source = str(write_jsonl(tmp_path / "a.jsonl", rows(3)))
    (folder.path / DATA_FILE).write_text(text)
    check_data(spec_of([source]), folder, is_new=False)
    assert [name for name, _ in json.loads((folder.path / DATA_FILE).read_text())] == ["a.jsonl"]


def test_the_built_in_data_has_no_files(folder: RunFolder) -> None:
    check_data(spec_of(["easy-vqa:train"]), folder, is_new=True)
    assert json.loads((folder.path / DATA_FILE).read_text()) == []
