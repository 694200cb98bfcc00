"""Sources are listed as shards, and read as rows and as windows of pairs."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from orpo_ray.data import shards as data_shards
from orpo_ray.data.bad_rows import BadRow
from orpo_ray.data.pairs import PreferencePair
from orpo_ray.data.reading import pair_at, pair_of
from orpo_ray.data.shards import read_rows
from orpo_ray.data.sources import read_first_rows
from orpo_ray.errors import RowError, UserError
from orpo_ray.tiny_models.easy_vqa import COLORS, SHAPES, YES_NO, easy_vqa_rows
from support.sources import ids_of, list_shards, read_all, rows, spec_of, write_jsonl, write_tar


def test_parquet_row_groups_and_jsonl_ranges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_shards, "ROWS_PER_SHARD", 4)
    pq.write_table(pa.Table.from_pylist(rows(10)), tmp_path / "a.parquet", row_group_size=4)
    write_jsonl(tmp_path / "b.jsonl", ["", *rows(3), "", *rows(6)[3:]])
    shards = list_shards(str(tmp_path))
    assert [(s.kind, s.first_row, s.num_rows) for s in shards] == [
        ("parquet", 0, 4), ("parquet", 4, 4), ("parquet", 8, 2), ("jsonl", 0, 4), ("jsonl", 4, 2),
    ]  # fmt: skip
    assert ids_of(str(tmp_path)) == [f"r{i}" for i in range(10)] + [f"r{i}" for i in range(6)]
    picked = read_rows(shards[3], [2, 0])
    assert [row["id"] for row in picked if isinstance(row, dict)] == ["r2", "r0"]
    for shard in (shards[0], shards[3]):
        columns, first = read_first_rows(shard)
        assert set(columns) == set(rows(1)[0])
        assert first[0]["id"] == "r0"


def test_a_json_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_shards, "ROWS_PER_SHARD", 4)
    path = tmp_path / "a.json"
    path.write_text(json.dumps([*rows(5), 3, rows(7)[6]]))
    shards = list_shards(str(path))
    assert [(s.first_row, s.num_rows) for s in shards] == [(0, 4), (4, 3)]
    found = read_rows(shards[1], [2, 1, 0])
    assert [row["id"] if isinstance(row, dict) else row.reason for row in found] == ["r6", "malformed_row", "r4"]
    (tmp_path / "b.json").write_text('{"a": 1}')
    with pytest.raises(UserError, match="must contain a list of rows, found dict"):
        list_shards(str(tmp_path / "b.json"))


def test_webdataset_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images in order, columns from JSON or texts, names longer than a tar header allows."""
    monkeypatch.setattr(data_shards, "ROWS_PER_SHARD", 2)
    long = "x" * 200
    row = json.dumps({"prompt": "q", "chosen": "x", "rejected": "y"}).encode()
    members = [
        ("a/1.0.jpg", b"one"), ("a/1.1.png", b"two"), ("a/1.json", row),
        ("a/2.json", row[:-1]),
        (f"a/{long}.prompt.txt", b"q"), (f"a/{long}.chosen.txt", b"x"), (f"a/{long}.rejected.txt", "ü".encode()),
        ("a/4.txt", b"\xff"), ("a/4.seg.cls", b"0"),
        ("b/1.json", json.dumps({"id": "own"}).encode()),
    ]  # fmt: skip
    shards = list_shards(str(write_tar(tmp_path / "a.tar", members)))
    assert [(s.first_row, s.num_rows) for s in shards] == [(0, 2), (2, 2), (4, 1)]
    first, broken = read_rows(shards[0], [0, 1])
    assert first == {"id": "a/1", "images": [b"one", b"two"], "prompt": "q", "chosen": "x", "rejected": "y"}
    assert isinstance(broken, RowError)
    binary, texts = read_rows(shards[1], [1, 0])
    assert isinstance(binary, RowError)
    assert texts == {"id": f"a/{long}", "prompt": "q", "chosen": "x", "rejected": "ü"}
    assert read_rows(shards[2], [0]) == [{"id": "own"}]
    assert read_first_rows(shards[0])[0] == ["id", "prompt", "chosen", "rejected", "images"]


def test_what_save_to_disk_writes(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    data = Dataset.from_list(rows(25))
    data.save_to_disk(tmp_path / "one", num_shards=2)
    assert ids_of(str(tmp_path / "one")) == [f"r{i}" for i in range(25)]
    data.select([3, 1, 2]).save_to_disk(tmp_path / "picked")
    assert ids_of(str(tmp_path / "picked")) == ["r3", "r1", "r2"]
    DatasetDict(train=data, test=data).save_to_disk(tmp_path / "dict")
    assert len(ids_of(str(tmp_path / "dict" / "test"))) == 25
    with pytest.raises(UserError, match=r"(?s)several splits.*dict/train.*dict/test"):
        list_shards(str(tmp_path / "dict"))


def test_record_batches_are_read_by_offset(tmp_path: Path) -> None:
    table = pa.Table.from_pylist(rows(10))
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=4)
    shards = list_shards(str(tmp_path))
    assert [(s.first_row, s.num_rows) for s in shards] == [(0, 4), (4, 4), (8, 2)]
    assert [row["id"] for row in read_rows(shards[1], [3, 0]) if isinstance(row, dict)] == ["r7", "r4"]
    assert shards[1].describe(3) == f"{tmp_path}/a.arrow:row 7"


@pytest.mark.parametrize(
    "uri", ["none.jsonl", "ftp://host/a", "a.txt", "easy-vqa:validation", "empty.jsonl", "empty", "", "none/*.jsonl"]
)
def test_missing_sources(tmp_path: Path, uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError):
        list_shards(uri)


@pytest.mark.parametrize("suffix", ["parquet", "arrow", "tar", "json"])
def test_a_file_with_a_wrong_suffix(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    path.write_text("no")
    with pytest.raises(UserError, match="cannot read the file"):
        list_shards(str(path))


def test_json_rows_that_are_not_objects_are_bad_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines = [b"{", b"[1]", b'{"a": 1}', b"\xff", b'{"a": ' + b"1" * 5000 + b"}", b"[" * 200_000]
    path.write_bytes(b"\n".join(lines))
    (shard,) = list_shards(str(path))
    kinds = [type(row) for row in read_rows(shard, range(6))]
    assert kinds == [RowError, RowError, dict, RowError, RowError, RowError]


def test_only_line_feeds_end_a_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"id": 1,\r "a": 2}\r\n\r\n{"id": 2}\n{"id": 3}')
    assert ids_of(str(path)) == [1, 2, 3]


def test_globs_match_at_any_depth_and_skip_other_files(tmp_path: Path) -> None:
    for folder in ("", "sub/", "sub/deep/"):
        (tmp_path / folder).mkdir(exist_ok=True)
        write_jsonl(tmp_path / f"{folder}a.jsonl", rows(1))
    (tmp_path / "x.jsonl").mkdir()
    (tmp_path / "notes.txt").write_text("no rows")
    assert len(list_shards(f"{tmp_path}/**/*.jsonl")) == 3
    assert len(list_shards(str(tmp_path))) == 3
    assert len(list_shards(f"{tmp_path}/*")) == 1
    assert len(list_shards(f"{tmp_path}/s?b/[ad].jsonl")) == 1
    with pytest.raises(UserError, match="no data files found"):
        list_shards(f"{tmp_path}/*.txt")


def test_negated_and_invalid_globs(tmp_path: Path) -> None:
    for name in "abc":
        write_jsonl(tmp_path / f"{name}.jsonl", rows(1))
    assert len(list_shards(f"{tmp_path}/[!a].jsonl")) == 2
    assert len(list_shards(f"{tmp_path}/[a-b].jsonl")) == 2
    with pytest.raises(UserError, match="not a valid glob"):
        list_shards(f"{tmp_path}/[z-a].jsonl")


def test_hidden_files_are_skipped(tmp_path: Path) -> None:
    for name in (".hidden/a.jsonl", ".ipynb_checkpoints/b.jsonl", ".c.jsonl", "d.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_jsonl(tmp_path / name, rows(1))
    assert [shard.path for shard in list_shards(str(tmp_path))] == [f"{tmp_path}/d.jsonl"]
    assert len(list_shards(f"{tmp_path}/.hidden")) == 1


def test_metadata_files_apply_to_their_own_folder(tmp_path: Path) -> None:
    """Saved datasets and other files in one folder are all read, once."""
    from datasets import Dataset, DatasetDict

    Dataset.from_list(rows(3)).save_to_disk(tmp_path / "one")
    Dataset.from_list(rows(4)).save_to_disk(tmp_path / "two")
    write_jsonl(tmp_path / "a.jsonl", rows(2))
    assert sum(shard.num_rows for shard in list_shards(str(tmp_path))) == 9
    DatasetDict(test=Dataset.from_list(rows(1))).save_to_disk(tmp_path / "deep" / "dict")
    with pytest.raises(UserError, match=r"(?s)several splits.*deep/dict/test"):
        list_shards(str(tmp_path))


def test_a_file_name_with_wildcards(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a[1].jsonl", rows(1))
    assert ids_of(f"{tmp_path}/a[1].jsonl") == ["r0"]


def test_columns_are_those_of_all_first_rows(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["{", {"prompt": "p"}, *rows(2)])
    (shard,) = list_shards(str(path))
    assert set(read_first_rows(shard)[0]) == set(rows(1)[0])
    write_jsonl(path, ["{", "[1]"])
    (shard,) = list_shards(str(path))
    with pytest.raises(UserError, match="none of the first rows"):
        read_first_rows(shard)


def test_easy_vqa_has_only_what_questions_with_answers_of_one_kind() -> None:
    pairs = easy_vqa_rows("test")
    assert len(pairs) == 2537
    assert pairs == easy_vqa_rows("test")
    for row in pairs:
        kind = SHAPES if row["chosen"] in SHAPES else COLORS
        assert row["rejected"] in kind
        assert row["rejected"] != row["chosen"]
        assert row["prompt"][0]["content"][1]["text"].startswith("what ")


def _text_only_accuracy(pairs: list[dict[str, Any]], held_out: list[dict[str, Any]]) -> float:
    """The accuracy of always preferring the answer that was chosen more often for a question and two answers."""
    votes: Counter[tuple[str, str, str]] = Counter()
    for row in pairs:
        question = row["prompt"][0]["content"][1]["text"]
        votes[question, row["chosen"], row["rejected"]] += 1
        votes[question, row["rejected"], row["chosen"]] -= 1
    scores = [votes[row["prompt"][0]["content"][1]["text"], row["chosen"], row["rejected"]] for row in held_out]
    return sum(0.5 if score == 0 else float(score > 0) for score in scores) / len(scores)


def test_the_splits_with_text_priors() -> None:
    """What a text-only model gets right: the training splits can be solved by text, their held-out splits cannot."""
    everything, balanced = easy_vqa_rows("all-train"), easy_vqa_rows("yes-no-test")
    yes_no = [row for row in everything if row["chosen"] in YES_NO]
    assert (len(everything), len(yes_no), len(balanced)) == (38575, 28407, 2492)
    assert _text_only_accuracy(yes_no, yes_no) > 0.8
    assert _text_only_accuracy(yes_no, balanced) == 0.5
    training = easy_vqa_rows("yes-no-train")
    assert len(training) == 10298
    assert _text_only_accuracy(training, training) == 0.5
    assert {row["id"] for row in training} < {row["id"] for row in yes_no}
    colors, even, held_out = map(easy_vqa_rows, ("color-train", "color-balanced", "color-test"))
    assert (len(colors), len(even), len(held_out)) == (10377, 2548, 614)
    assert 0.87 < _text_only_accuracy(colors, colors) < 0.88
    assert _text_only_accuracy(colors, held_out) == _text_only_accuracy(even, held_out) == 0.5
    assert {row["id"] for row in even} < {row["id"] for row in colors}
    assert {row["id"] for row in held_out} < {row["id"] for row in balanced}
    prior, test = easy_vqa_rows("prior-train"), easy_vqa_rows("test")
    assert 0.79 < _text_only_accuracy(prior, prior) < 0.82
    assert 0.47 < _text_only_accuracy(prior, test) < 0.53
    assert {row["id"] for row in prior} < {row["id"] for row in easy_vqa_rows("train")}


def test_a_resumed_reader_starts_at_its_sample(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(rows(20)), tmp_path / "a.parquet")
    whole = read_all(spec_of([str(tmp_path)]))
    tail = read_all(spec_of([str(tmp_path)], first_sample=9))
    assert tail == whole[9:]


def test_bad_rows_have_id_and_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_shards, "ROWS_PER_SHARD", 2)
    lines = ["", rows(1)[0], "", "", "{broken", "", rows(1)[0] | {"chosen": "", "id": 7}]
    path = write_jsonl(tmp_path / "b.jsonl", lines)
    read = read_all(spec_of([str(path)], seed=None))
    pairs = [pair_of(row) for row in read]
    assert isinstance(pairs[0], PreferencePair)
    assert pairs[0].source == f"{path}:line 2"
    assert [(bad.sample_index, bad.reason, bad.id, bad.source) for bad in pairs[1:] if isinstance(bad, BadRow)] == [
        (1, "malformed_row", f"{path}:line 5", f"{path}:line 5"),
        (2, "empty_response", "7", f"{path}:line 7"),
    ]


def test_the_digest_identifies_a_data_set(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "b.jsonl", rows(5))
    first = spec_of([str(path)]).digest
    assert spec_of([str(path)]).digest == first
    write_jsonl(path, [*rows(4), rows(1)[0] | {"chosen": "something else"}])
    assert spec_of([str(path)]).digest != first


def test_every_start_of_a_run_has_one_pipeline_and_every_run_its_own(tmp_path: Path) -> None:
    spec = spec_of([str(write_jsonl(tmp_path / "b.jsonl", rows(5)))])
    assert spec.of_run("runs/a") == spec.of_run("runs/a")
    assert spec.of_run("runs/a").pipeline != spec.of_run("runs/b").pipeline
    assert spec.of_run("runs/a").digest == spec.digest


def test_images_are_exchanged_alike_from_any_position(tmp_path: Path) -> None:
    items = [row | {"images": [f"{i // 2}.png"]} for i, row in enumerate(rows(9))]
    items.append(rows(1)[0] | {"id": "text"})
    items.append(rows(1)[0] | {"id": "two", "images": ["0.png", "1.png"]})
    path = write_jsonl(tmp_path / "b.jsonl", items)
    whole = read_all(spec_of([str(path)], exchange_images=True, window=20))
    before = {row["id"]: row["images"] for row in items}
    for row in whole:
        if row["id"] in ("text", "two") or row["bad"]:
            assert row["bad"]["reason"] == "no_image_to_exchange"
        else:
            assert [image["path"] for image in row["images"]] != before[row["id"]]
    tail = read_all(spec_of([str(path)], exchange_images=True, window=20, first_sample=5))
    assert tail == whole[5:]


def test_a_pair_is_found_by_its_sample_index(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "b.jsonl", rows(20))
    spec = spec_of([str(path)])
    for row in read_all(spec, epoch=1)[::7]:
        assert pair_at(spec, row["sample_index"])[1].id == row["id"]
