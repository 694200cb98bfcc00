"""Sources -> segments -> rows, and windows of pairs out of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from orpo_ray.data import sources
from orpo_ray.data.easy_vqa import COLORS, SHAPES, easy_vqa_rows
from orpo_ray.data.formats import PreferencePair
from orpo_ray.data.order import Order, row_counts
from orpo_ray.data.reading import ReadSpec, pair_of, read_window
from orpo_ray.data.sources import list_segments, read_segment, source_columns, table_rows
from orpo_ray.errors import BadRow, UserError


def rows(count: int, image: Any = None) -> list[dict[str, Any]]:
    return [
        {"id": f"r{i}", "prompt": f"q{i}", "chosen": "x", "rejected": "y", "images": image or []} for i in range(count)
    ]


def write_jsonl(path: Path, items: list[Any]) -> Path:
    path.write_text("\n".join(item if isinstance(item, str) else json.dumps(item) for item in items) + "\n")
    return path


def read_all(spec: ReadSpec, epoch: int = 0) -> list[dict[str, Any]]:
    tables = [table for number in range(spec.order.windows_per_epoch) for table in read_window(spec, epoch, number)]
    return [row for table in tables for row in table.to_pylist()]


def spec_of(uris: list[str], **changes: Any) -> ReadSpec:
    segments = tuple(list_segments(uris, "data.train"))
    order = Order(row_counts(segments), changes.pop("seed", 0), changes.pop("window", 7))
    base = ReadSpec(segments, ("trl",) * len(segments), order, 4, 0, order.num_rows)
    return replace(base, **changes)


def test_parquet_row_groups_and_jsonl_stretches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "LINES_PER_SEGMENT", 4)
    pq.write_table(pa.Table.from_pylist(rows(10)), tmp_path / "a.parquet", row_group_size=4)
    write_jsonl(tmp_path / "b.jsonl", ["", *rows(3), "", *rows(6)[3:]])
    segments = list_segments([str(tmp_path)], "data.train")
    assert [(s.kind, s.first_row, s.num_rows) for s in segments] == [
        ("parquet", 0, 4), ("parquet", 4, 4), ("parquet", 8, 2), ("jsonl", 0, 4), ("jsonl", 4, 2),
    ]  # fmt: skip
    found = [row["id"] for s in segments for row in table_rows(read_segment(s, range(s.num_rows)), s.kind)]
    assert found == [f"r{i}" for i in range(10)] + [f"r{i}" for i in range(6)]
    picked = table_rows(read_segment(segments[3], [2, 0]), "jsonl")
    assert [row["id"] for row in picked] == ["r2", "r0"]
    assert set(source_columns(segments[0])) == set(source_columns(segments[3])) == set(rows(1)[0])


@pytest.mark.parametrize("uri", ["none.jsonl", "s3://bucket/a", "a.txt", "easy-vqa:validation", "empty.jsonl", "empty"])
def test_sources_that_are_not_there(tmp_path: Path, uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError):
        list_segments([uri], "data.train")


def test_a_parquet_file_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_text("no")
    with pytest.raises(UserError, match="cannot be read"):
        list_segments([str(tmp_path / "a.parquet")], "data.train")


def test_rows_that_are_no_objects_are_bad_rows() -> None:
    lines = [b"{", b"[1]", b'{"a": 1}', b"\xff", b'{"a": ' + b"1" * 5000 + b"}", b"[" * 200_000]
    table = pa.table({"json": pa.array(lines, pa.large_binary())})
    kinds = [type(row) for row in table_rows(table, "jsonl")]
    assert kinds == [BadRow, BadRow, dict, BadRow, BadRow, BadRow]


def test_lines_end_at_newlines_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"id": 1,\r "a": 2}\r\n\r\n{"id": 2}\n{"id": 3}')
    (segment,) = list_segments([str(path)], "data.train")
    read = list(table_rows(read_segment(segment, range(segment.num_rows)), "jsonl"))
    assert [row["id"] for row in read if isinstance(row, dict)] == [1, 2, 3]


def test_globs_reach_every_depth_and_take_only_what_can_be_read(tmp_path: Path) -> None:
    for folder in ("", "sub/", "sub/deep/"):
        (tmp_path / folder).mkdir(exist_ok=True)
        write_jsonl(tmp_path / f"{folder}a.jsonl", rows(1))
    (tmp_path / "x.jsonl").mkdir()
    (tmp_path / "notes.txt").write_text("no rows")
    assert len(list_segments([f"{tmp_path}/**/*.jsonl"], "data.train")) == 3
    assert len(list_segments([str(tmp_path)], "data.train")) == 3
    assert len(list_segments([f"{tmp_path}/*"], "data.train")) == 1
    with pytest.raises(UserError, match=r"no \.parquet or \.jsonl"):
        list_segments([f"{tmp_path}/*.txt"], "data.train")


def test_columns_are_those_of_all_first_rows(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["{", {"prompt": "p"}, *rows(2)])
    (segment,) = list_segments([str(path)], "data.train")
    assert set(source_columns(segment)) == set(rows(1)[0])


def test_easy_vqa_has_only_what_questions_and_like_against_like() -> None:
    pairs = easy_vqa_rows("test")
    assert len(pairs) == 2537
    assert pairs == easy_vqa_rows("test")
    for row in pairs:
        kind = SHAPES if row["chosen"] in SHAPES else COLORS
        assert row["rejected"] in kind
        assert row["rejected"] != row["chosen"]
        assert row["prompt"][0]["content"][1]["text"].startswith("what ")


def test_workers_shares_are_the_whole_and_disjoint(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(rows(50)), tmp_path / "a.parquet", row_group_size=8)
    whole = [row["id"] for row in read_all(spec_of([str(tmp_path)]))]
    assert sorted(whole) == sorted(f"r{i}" for i in range(50))
    for workers in (1, 2, 3):
        shares = [read_all(spec_of([str(tmp_path)], rank=rank, num_workers=workers)) for rank in range(workers)]
        together = sorted((row["slot"], row["id"]) for share in shares for row in share)
        assert [row_id for _, row_id in together] == whole


def test_a_resumed_reader_starts_at_its_slot(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(rows(20)), tmp_path / "a.parquet")
    whole = read_all(spec_of([str(tmp_path)]))
    tail = read_all(spec_of([str(tmp_path)], first_slot=9))
    assert tail == whole[9:]


def test_bad_rows_say_where_they_stand(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "b.jsonl", [rows(1)[0], "{broken", rows(1)[0] | {"chosen": ""}])
    read = read_all(spec_of([str(path)], seed=None))
    pairs = [pair_of(row) for row in read]
    assert isinstance(pairs[0], PreferencePair)
    assert pairs[0].source == f"{path}:line 1"
    assert [(p.reason, row["source"]) for p, row in zip(pairs[1:], read[1:], strict=True)] == [
        ("malformed_row", f"{path}:line 2"),
        ("empty_response", f"{path}:line 3"),
    ]


def test_exchanged_images_are_other_images_for_any_number_of_workers(tmp_path: Path) -> None:
    items = [row | {"images": [f"{i // 2}.png"]} for i, row in enumerate(rows(9))]
    items.append(rows(1)[0] | {"id": "text"})
    items.append(rows(1)[0] | {"id": "two", "images": ["0.png", "1.png"]})
    path = write_jsonl(tmp_path / "b.jsonl", items)
    whole = read_all(spec_of([str(path)], exchange_images=True, window=20))
    before = {row["id"]: row["images"] for row in items}
    for row in whole:
        if row["id"] in ("text", "two") or row["bad"]:
            assert json.loads(row["bad"])[0] == "no_image_to_exchange"
        else:
            assert [image["path"] for image in row["images"]] != before[row["id"]]
    shares = [
        read_all(spec_of([str(path)], exchange_images=True, window=20, rank=rank, num_workers=2)) for rank in (0, 1)
    ]
    key = lambda row: row["slot"]  # noqa: E731
    assert sorted(shares[0] + shares[1], key=key) == sorted(whole, key=key)
