"""Damaged files: one message with file and fix, or bad rows where single rows are damaged."""

from __future__ import annotations

import json
import random
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from orpo_ray.config.load import parse_recipe
from orpo_ray.data.from_recipe import run_data
from orpo_ray.data.shards import Shard, _read_json_list, read_rows
from orpo_ray.data.sources import list_sources, read_first_rows
from orpo_ray.errors import RowError, UserError
from orpo_ray.storage.files import TooLarge, is_permanent
from support.commands import orpo_ray_here
from support.paths import ROOT
from support.sources import list_shards, read_all, rows, spec_of, write_jsonl, write_tar

FIX = "copy or write the file again, or remove it from the data"


def write_parquet(path: Path, compression: str = "snappy", num_rows: int = 300) -> Path:
    table = pa.Table.from_pylist([row | {"prompt": f"question {row['id']}"} for row in rows(num_rows)])
    pq.write_table(table, path, row_group_size=100, compression=compression, use_dictionary=False)
    return path


def damage_group(path: Path, group: int) -> None:
    """Overwrite the pages of a row group's prompts; the footer stays whole."""
    column = pq.read_metadata(path).row_group(group).column(1)
    data = bytearray(path.read_bytes())
    first = column.data_page_offset
    data[first : first + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    path.write_bytes(data)


def data_of(path: Path, **changes: Any) -> Any:
    raw = {"name": "a", "model": {"id": "m"}, "data": {"train": str(path), **changes}}
    return run_data(parse_recipe(raw))


@pytest.mark.parametrize("command", [["train"], ["data", "check"], ["data", "prepare"]])
@pytest.mark.parametrize("damage", ["page", "truncated", "not UTF-8", "metadata"])
def test_commands_say_it_in_one_message(tmp_path: Path, command: list[str], damage: str) -> None:
    path = write_parquet(tmp_path / "a.parquet")
    if damage == "page":
        damage_group(path, 0)
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "not UTF-8":
        path = tmp_path / "a.jsonl"
        path.write_text("\n".join('{"prompt": "\xfc"}' for _ in range(3)), encoding="latin-1")
    else:
        path = tmp_path / "saved"
        path.mkdir()
        (path / "state.json").write_text('{"_data_files": [{"filename": ')
    overrides = [f"data.train={path}", "data.eval={}", "eval.every_steps=null", f"checkpoint.storage={tmp_path}/runs"]
    result = orpo_ray_here(*command, str(ROOT / "recipes/quickstart.yaml"), *overrides, cwd=tmp_path)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert str(path) in result.stderr
    assert "fix:" in result.stderr
    assert len(result.stderr) < 1500


@pytest.mark.parametrize("compression", ["snappy", "zstd", "none"])
def test_a_damaged_page_is_an_error_of_the_user(tmp_path: Path, compression: str) -> None:
    path = write_parquet(tmp_path / "a.parquet", compression)
    damage_group(path, 1)
    with pytest.raises(UserError) as error:
        data_of(path, eval_fraction=0.2)  # the split is made by the driver
    assert str(error.value).startswith(f"{path}: rows 100 to 199 cannot be read: ")
    assert error.value.fix == FIX
    read, _ = data_of(path)
    with pytest.raises(UserError, match="rows 100 to 199"):
        read_all(read)


def test_a_file_that_vanishes_is_an_error_of_the_user(tmp_path: Path) -> None:
    spec = spec_of([str(write_jsonl(tmp_path / "a.jsonl", rows(3)))])
    (tmp_path / "a.jsonl").unlink()
    with pytest.raises(UserError, match="rows 0 to 2 cannot be read"):
        read_all(spec)


@pytest.mark.parametrize("kind", ["parquet", "arrow", "tar", "json", "jsonl"])
def test_a_file_that_is_replaced_by_a_shorter_one_is_an_error_of_the_user(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"a.{kind}"
    written(path, kind)
    spec = spec_of([str(path)])
    written(tmp_path / f"b.{kind}", kind, count=17)
    (tmp_path / f"b.{kind}").replace(path)
    _read_json_list.cache_clear()  # another process reads
    with pytest.raises(UserError, match=r"cannot be read: .+") as error:
        read_all(spec)
    assert error.value.field == str(path)
    assert error.value.fix == FIX


def test_a_jsonl_file_that_was_cut_says_how_many_rows_are_left(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", rows(40))
    spec = spec_of([str(path)])
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:25]))
    with pytest.raises(UserError, match=r"rows 0 to 39 cannot be read: .* of 40 rows there, 25 are left"):
        read_all(spec)


def test_text_that_is_not_utf_8_is_one_bad_row(tmp_path: Path) -> None:
    texts = pa.array([b"q0", b"q1 \xff", b"q2"]).view(pa.string())
    others = {name: pa.array([f"{name}{row}" for row in range(3)]) for name in ("id", "chosen", "rejected")}
    pq.write_table(pa.table(others | {"prompt": texts}), tmp_path / "a.parquet")
    (shard,) = list_shards(str(tmp_path / "a.parquet"))
    found = read_rows(shard, [2, 1, 0])
    assert [row if isinstance(row, RowError) else row["prompt"] for row in found[::2]] == ["q2", "q0"]
    assert isinstance(found[1], RowError)
    assert "a value cannot be read: 'utf-8' codec can't decode" in str(found[1])
    columns, first = read_first_rows(shard)
    assert (len(columns), [row["prompt"] for row in first]) == (4, ["q0", "q2"])
    assert [row["bad"] and row["bad"]["reason"] for row in read_all(spec_of([shard.path], seed=None))] == [
        None,
        "malformed_row",
        None,
    ]


def test_broken_lines_are_bad_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    good = [json.dumps(row).encode() for row in rows(3)]
    path.write_bytes(b"\n".join([good[0], good[1][:-5], b"\xff" + good[1], good[2]]))
    found = read_all(spec_of([str(path)], seed=None))
    assert [row["bad"] and row["bad"]["source"].rpartition(":")[2] for row in found] == [None, "line 2", "line 3", None]


@pytest.mark.parametrize("text", ["{", "[]", '{"_data_files": 3}', '{"_data_files": [{}]}', '{"_data_files": [[]]}'])
def test_damaged_metadata_of_a_folder(tmp_path: Path, text: str) -> None:
    (tmp_path / "state.json").write_text(text)
    with pytest.raises(UserError):
        list_shards(str(tmp_path))


@pytest.mark.parametrize("kind", ["parquet", "arrow", "tar", "json", "jsonl"])
def test_random_damage_gives_rows_or_one_message(tmp_path: Path, kind: str) -> None:
    whole = written(tmp_path / f"whole.{kind}", kind)
    damaged = tmp_path / f"damaged.{kind}"
    draw = random.Random(0)
    outcomes = set()
    for _ in range(100):
        data = bytearray(whole)
        place = draw.randrange(len(data))
        data[place : place + 8] = draw.randbytes(8)
        damaged.write_bytes(data[: draw.choice([len(data), len(data), draw.randrange(len(data))])])
        outcomes.add(outcome(damaged))
    assert "message" in outcomes
    assert outcomes <= {"rows", "message"}


def written(path: Path, kind: str, count: int = 40) -> bytes:
    items = rows(count)
    if kind == "parquet":
        write_parquet(path, num_rows=300 * count // 40)
    elif kind == "arrow":
        table = pa.Table.from_pylist(items)
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=10)
    elif kind == "tar":
        write_tar(path, [(f"{row['id']}.json", json.dumps(row).encode()) for row in items])
    elif kind == "json":
        path.write_text(json.dumps(items))
    else:
        write_jsonl(path, items)
    return path.read_bytes()


def outcome(path: Path) -> str:
    try:
        (source,) = list_sources({str(path): 1.0}, "data.train")
        for shard in source.shards:
            read_first_rows(shard)
            assert len(read_rows(shard, range(shard.num_rows))) == shard.num_rows
    except UserError as error:
        return "message" if str(path) in str(error) and error.fix else str(error)
    return "rows"


def test_failures_of_a_store_are_not_the_users(tmp_path: Path) -> None:
    gone = "When reading information for key 'a': AWS Error NETWORK_CONNECTION during GetObject operation: curlCode: 28"
    temporary = [OSError(gone), ConnectionError("reset"), TimeoutError(), OSError(5, "Input/output error")]
    temporary += [OSError("google::cloud::Status(UNAVAILABLE: try again)"), TooLarge("large")]
    assert not any(map(is_permanent, temporary))
    permanent = [OSError("Corrupt snappy compressed data."), pa.ArrowInvalid("x"), tarfile.ReadError(), ValueError()]
    assert all(map(is_permanent, [*permanent, FileNotFoundError(2, "x"), PermissionError(13, "x")]))
    shard = Shard("jsonl", str(tmp_path), 0, 1, length=1)
    with pytest.raises(UserError):  # a folder
        read_rows(shard, [0])
